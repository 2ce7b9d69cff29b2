"""The way of a GPU through the engine, experts in host memory and slots elsewhere, on streams that this machine can
run: a copy happens when the computation asks for it, and not before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from late_streams import LateStreams
from tiny import EXPERTS, LAYERS, TOP_K, save_tiny

import runtime
from runtime import build
from runtime.errors import DeviceError, ProfileError
from runtime.model import load_offloaded, load_resident
from runtime.profile import Match, Profile
from runtime.transfer.host_slab import ALIGNMENT_BYTES, HostSlab
from runtime.transfer.store import ExpertStore

PROMPT = "the quick brown fox jumps"
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CudaStreams", LateStreams)
    monkeypatch.setattr(build, "is_gpu", lambda device: True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def _tokens(engine: runtime.Engine) -> list[int]:
    ids = engine.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    found: list[int] = engine.model.generate(ids, **GREEDY)[0].tolist()  # type: ignore[operator]
    return found


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("decode", ["eager", "grouped_mm"])
@pytest.mark.parametrize("slots", [1, TOP_K, "25%", LAYERS * EXPERTS])
def test_the_same_tokens_at_every_budget(checkpoint: Path, slots: int | str, decode: str) -> None:
    overrides = {"cache.slots": slots, "compute.decode": decode}
    with runtime.load_reference(checkpoint, overrides=overrides) as reference:
        expected = _tokens(reference)
    with runtime.load(checkpoint, overrides=overrides) as engine:
        assert _tokens(engine) == expected
        engine.check_integrity()
        assert engine.stats().num_loads > 0
        assert engine.replay_loads([]) >= 0.0
        assert any("pinned host memory" in note for note in engine.notes)


@pytest.mark.usefixtures("late")
def test_the_kernel_of_the_cpu_is_replaced_and_said(checkpoint: Path) -> None:
    with runtime.load(checkpoint) as engine:
        assert engine.profile.compute.decode == "eager"
        assert any("gemv is for the CPU" in note for note in engine.notes)


def test_tensors_of_a_slab_start_where_a_gpu_wants_them(checkpoint: Path) -> None:
    loaded = load_offloaded(str(checkpoint), dtype=torch.float32)  # has to be converted
    store = ExpertStore.open(loaded.model, loaded.files, loaded.layers)
    slab = HostSlab(store)
    resident = dict(load_resident(str(checkpoint), dtype=torch.float32).model.named_parameters())
    for expert in store.experts:
        layer, index = divmod(expert, store.num_experts)
        for place in slab.tensors(expert):
            assert place.slot_offset % ALIGNMENT_BYTES == 0
            view = slab.arena.view(slab.start(expert) // slab.slot_bytes, place)
            assert torch.equal(view, resident[f"{store.prefixes[layer]}.{place.name}"][index])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_one_line(checkpoint: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=rf"device '{device}': this torch \(.*\) sees no GPU"):
        runtime.load(checkpoint, device=device)
    tuned = Profile.default().model_copy(update={"match": Match(device="cuda:NVIDIA H200")})
    with pytest.raises(DeviceError, match="sees no GPU"):
        runtime.load(tuned, checkpoint)
    with pytest.raises(ProfileError, match="device: profile cuda:NVIDIA H200, here cpu"):
        runtime.load(tuned, checkpoint, device="cpu")


@pytest.mark.parametrize("device", ["meta", "gpu", "mps"])
def test_a_device_that_nothing_runs_on(checkpoint: Path, device: str) -> None:
    with pytest.raises(DeviceError, match=rf"device '{device}' is not one that this runs on"):
        runtime.load(checkpoint, device=device)
