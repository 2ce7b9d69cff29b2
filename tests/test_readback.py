"""Reading from a device that works on behind the host's back: what comes, how often the host waits, and for whom."""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from late_streams import compute_late
from tiny import LAYERS, TOP_K, save_tiny

import runtime
from harness.measure.runner import Decoder
from runtime import build, build_predictors, passes
from runtime.errors import DeviceError, UsageError
from runtime.predictors import gate_lookahead
from runtime.predictors.gate_lookahead import plain_top_k
from runtime.readback import CudaReader, HostReader
from runtime.vocabulary import Pass

PROMPT, NEW = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5]


class LateDriver:
    """See `runtime.readback.Driver`: copies happen when they are waited for, in memory that held something else."""

    def __init__(self) -> None:
        self.pending: list[tuple[int, int, int]] = []
        self.num_waits = 0
        self.is_lost = False
        self.allocated: list[int] = []

    def download(self, target: int, source: int, num_bytes: int) -> None:
        if self.is_lost:
            raise RuntimeError("CUDA error 700")
        self.pending.append((target, source, num_bytes))

    def wait(self) -> None:
        self.num_waits += 1
        for target, source, num_bytes in self.pending:
            ctypes.memmove(target, source, num_bytes)
        self.pending.clear()

    def pinned(self, num_bytes: int) -> torch.Tensor:
        self.allocated.append(num_bytes)
        return torch.full((num_bytes,), 255, dtype=torch.uint8)


def test_tensors_of_any_dtype_shape_and_stride_come_with_one_wait() -> None:
    driver = LateDriver()
    reader = CudaReader(driver)
    wide = torch.arange(24.0).reshape(4, 6)
    wanted = [
        torch.tensor([[7, -1]]),
        wide.bfloat16(),
        wide.t(),  # not contiguous
        wide[:, ::2].half(),
        torch.tensor([True, False, True]),  # the next one is not aligned in what is read
        torch.tensor(3.5, dtype=torch.float64),
        torch.zeros(0, 5),
        wide.clone().requires_grad_(),
    ]
    found = reader(wanted)
    assert driver.num_waits == reader.num_waits == 1
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other.detach())


def test_what_was_read_stays_whatever_is_read_later() -> None:
    driver = LateDriver()
    reader = CudaReader(driver)
    tensors = [torch.full((count,), count) for count in (3, 200_000, 3, 400_000, 5)]
    kept = [reader([tensor])[0] for tensor in tensors]
    for one, other in zip(kept, tensors, strict=True):
        assert torch.equal(one, other)
    assert driver.allocated == sorted(set(driver.allocated)) and len(driver.allocated) == 3, "it grows as it must"


def test_a_read_that_fails_leaves_nothing_under_way() -> None:
    driver = LateDriver()
    reader = CudaReader(driver)
    driver.is_lost = True
    with pytest.raises(DeviceError, match=r"the GPU has failed \(CUDA error 700\); start this process anew"):
        reader([torch.ones(3)])
    assert not driver.pending and driver.num_waits == 1
    driver.is_lost = False
    assert reader([torch.ones(3)])[0].tolist() == [1, 1, 1]


def test_where_the_host_computes_nothing_is_copied() -> None:
    tensors = [torch.ones(3), torch.arange(6).reshape(2, 3).t()]
    assert all(one is other for one, other in zip(HostReader()(tensors), tensors, strict=True))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[CudaReader]:
    """Engines as on a GPU, on streams and copies that happen late; their readers."""
    made: list[CudaReader] = []

    def reader_for(device: torch.device) -> CudaReader:
        made.append(CudaReader(LateDriver()))
        return made[-1]

    compute_late(monkeypatch)
    monkeypatch.setattr(build, "reader_for", reader_for)
    return made


@torch.inference_mode()
def _logits(engine: runtime.Engine) -> torch.Tensor:
    decoder = Decoder(engine.model)
    return torch.stack([decoder.logits(PROMPT), *(decoder.logits([token]) for token in NEW)])


PREFETCH: dict[str, Any] = {
    "predictor.kind": "gate_lookahead",
    "prefetch.adaptive": False,
    "prefetch.on_trial": False,
    "cache.slots": 12,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "without": {"prefetch.depth": 0, "cache.slots": 12},
    **{f"depth {depth}": {**PREFETCH, "prefetch.depth": depth} for depth in (1, 2, 3)},
    "every second pass": {**PREFETCH, "prefetch.depth": 2, "predictor.every": 2},
    "a policy that foresees": {**PREFETCH, "prefetch.depth": 1, "cache.policy": "plec"},
    "one slot": {**PREFETCH, "prefetch.depth": 1, "cache.slots": 1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_host_waits_once_per_layer_whatever_is_forecast(
    checkpoint: Path, readers: list[CudaReader], name: str
) -> None:
    with runtime.load_reference(checkpoint) as reference:
        expected = _logits(reference)
    with runtime.load(checkpoint, overrides=SETTINGS[name]) as engine:
        before = readers[-1].num_waits
        assert torch.equal(_logits(engine), expected)
        assert readers[-1].num_waits - before == LAYERS * (1 + len(NEW))
        cache = engine.stats().cache
        assert (cache.num_prefetch_issued > 0) == (name != "without")


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_read_with_the_choice_changes_no_decision(
    checkpoint: Path, readers: list[CudaReader], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    found = []
    for read in (build.reader_for, lambda device: HostReader()):
        monkeypatch.setattr(build, "reader_for", read)
        with runtime.load(checkpoint, overrides=SETTINGS[name]) as engine:
            found.append((_logits(engine).tolist(), engine.stats().cache))
    assert found[0] == found[1]


def test_routers_asked_for_their_logits_alone_forecast_the_same(
    checkpoint: Path, readers: list[CudaReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where each call that is left out counts."""
    found = []

    def lookahead_router(router: Any, norm: Any, hidden_size: int) -> Any:
        top_k = plain_top_k(router)
        assert top_k == TOP_K
        return replace(gate_lookahead.lookahead_router(router, norm, hidden_size), top_k=top_k)

    for changed in (False, True):
        if changed:
            monkeypatch.setattr(build_predictors, "lookahead_router", lookahead_router)
        with runtime.load(checkpoint, overrides=SETTINGS["depth 2"]) as engine:
            engine.start_trace(lookahead=2)
            found.append((_logits(engine).tolist(), engine.stats().cache, engine.trace().predicted.tolist()))
    assert found[0] == found[1]


def test_substitution_is_a_part_of_the_read(checkpoint: Path, readers: list[CudaReader]) -> None:
    overrides = {"cache.slots": 8, "numerics": "lossy.substitute"}
    for more in ({}, {"predictor.kind": "gate_lookahead", "prefetch.depth": 1}):
        with runtime.load(checkpoint, overrides={**overrides, **more}) as engine:
            before = readers[-1].num_waits
            _logits(engine)
            assert readers[-1].num_waits - before == LAYERS * (1 + len(NEW))
            assert engine.stats().cache.num_substituted > 0


def test_a_trace_costs_one_more_wait_per_layer(checkpoint: Path, readers: list[CudaReader]) -> None:
    traces = []
    for lookahead in (0, 2):
        with runtime.load(checkpoint, overrides=SETTINGS["depth 1"]) as engine:
            engine.start_trace(lookahead=lookahead)
            before = readers[-1].num_waits
            _logits(engine)
            assert readers[-1].num_waits - before == 2 * LAYERS * (1 + len(NEW))
            traces.append(engine.trace())
    plain, predicted = traces
    assert (plain.experts == predicted.experts).all() and (plain.weights == predicted.weights).all()
    assert plain.predicted is None and predicted.predicted is not None


def test_token_ids_of_a_gpu_are_read_when_somebody_looks(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "_token_ids", passes.DeviceIds)
    seen: list[Pass] = []
    with runtime.load(checkpoint) as engine:
        engine.on_pass(seen.append)
        _logits(engine)
        assert [len(one.token_ids) for one in seen] == [len(PROMPT)] + [1] * len(NEW)
        with pytest.raises(UsageError, match="there while it runs"):
            seen[0].token_ids[0]  # the memory of a pass that has ended may hold another's
        engine.start_trace()
        _logits(engine)
        recorded = engine.trace().token_ids
        assert recorded is not None and recorded.tolist() == PROMPT + NEW
        assert np.array(seen[-1].token_ids).tolist() == list(seen[-1].token_ids) == NEW[-1:], "what was looked at stays"


_SYNCHRONISING = ("cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Which module of ours called a tensor's method that makes the host wait on a GPU, how often."""
    counts: Counter[str] = Counter()

    def counted(method: Callable[..., Any], name: str, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        module = sys._getframe(2).f_globals.get("__name__", "")
        if module.partition(".")[0] == "runtime":
            counts[f"{module} {name}"] += 1
        return method(tensor, *args, **kwargs)

    for name in _SYNCHRONISING:
        own = partial(counted, getattr(torch.Tensor, name), name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, *a, _own=own, **k: _own(tensor, *a, **k))
    yield counts


@pytest.mark.parametrize("name", SETTINGS)
def test_no_other_call_of_ours_makes_the_host_wait(
    checkpoint: Path, readers: list[CudaReader], request: pytest.FixtureRequest, name: str
) -> None:
    with runtime.load(checkpoint, overrides=SETTINGS[name]) as engine:
        asked = request.getfixturevalue("asked")
        _logits(engine)
        assert asked.pop("runtime.passes tolist") == 1 + len(NEW), "token ids, which lie on the host here"
        assert not asked
