"""The weights that stay in memory do not depend on the checkpoint's files any more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import save_tiny
from torch.nn import Parameter

import runtime
from runtime.own_memory import _CHUNK_BYTES, _mappings, copy_out


def test_copies_are_equal_lie_alike_and_share_as_before(tmp_path: Path) -> None:
    file, other = tmp_path / "a name.safetensors", tmp_path / "other.safetensors"
    weights = {"odd": torch.rand(3), "long": torch.rand(_CHUNK_BYTES // 2), "matrix": torch.rand(5, 7).bfloat16()}
    for path in (file, other):
        save_file(weights, path)
    with safe_open(file, "pt") as mapped, safe_open(other, "pt") as kept:
        # Parameters, as a model has them: the tensors that safetensors hands out keep the mapping itself.
        found = {name: Parameter(mapped.get_tensor(name), requires_grad=False) for name in weights}
        apart = kept.get_tensor("long")
    tied, turned, own = Parameter(found["long"]), Parameter(found["matrix"].T), torch.rand(4)
    before = {name: tensor.data_ptr() for name, tensor in found.items()}
    unmoved = apart.data_ptr(), own.data_ptr()
    copy_out([*found.values(), tied, turned, apart, own], [file])
    for name, tensor in found.items():
        assert torch.equal(tensor, weights[name]) and tensor.dtype == weights[name].dtype
        assert tensor.data_ptr() != before[name] and tensor.data_ptr() % 64 == before[name] % 64
    assert tied.data_ptr() == found["long"].data_ptr() and torch.equal(turned, weights["matrix"].T)
    assert (apart.data_ptr(), own.data_ptr()) == unmoved
    del mapped
    assert not _mappings([file]) and _mappings([other])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_keeps_no_file_mapped(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_tiny(tmp_path, dtype=dtype)
    with runtime.load(folder) as engine:
        assert not _mappings([folder / "model.safetensors"])
        assert engine.model(torch.arange(6)[None]).logits.isfinite().all()
