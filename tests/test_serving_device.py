"""Continuous batching as a GPU's engine does it, on streams that this machine can run, and what transformers is told
where it would ask a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from late_streams import compute_late
from tiny import VOCABULARY, save_tiny
from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs

import runtime
from runtime import batching, devices
from runtime.batching import PAGE_TOKENS, kv_tokens
from runtime.errors import BudgetError
from runtime.profile import Profile
from runtime.prompts import PromptRequest
from runtime.schedulers.fifo import Fifo
from runtime.schedulers.make import build_scheduler
from runtime.serving import run_batch


def _text(length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(length).integers(1, len(VOCABULARY), length).tolist())


REQUESTS = [PromptRequest(f"r{i}", _text(3 + 4 * i), 9 - i, task=f"t{i % 2}") for i in range(5)]
SLOTS = {"cache.slots": "25%", "prefetch.depth": 1, "predictor.kind": "previous_token"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_late(monkeypatch)


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[runtime.Engine]:
    with runtime.load(checkpoint, overrides={"cache.slots": 8}) as engine:
        yield engine


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("kind", [("fifo", 3, 1), ("route_overlap", 2, 2), ("deadline", 2, 2)])
def test_the_same_tokens_as_the_resident_model_in_the_same_batches(
    checkpoint: Path, kind: tuple[str, int, int]
) -> None:
    keys = dict(zip(("scheduler.kind", "scheduler.group", "scheduler.window"), kind, strict=True))
    found = []
    for load, overrides in ((runtime.load_reference, {}), (runtime.load, SLOTS)):
        with load(checkpoint, overrides={**overrides, **keys}) as engine:
            for concurrency in (None, 3):
                scheduler = build_scheduler(Profile.default().with_overrides(keys))
                run = run_batch(engine, REQUESTS, scheduler, concurrency=concurrency)
                found.append([request.token_ids for request in run.requests])
            engine.check_integrity()
            if load is runtime.load:
                assert engine.stats().num_loads > 0 and engine.stats().cache.num_prefetch_issued > 0
    assert found[:2] == found[2:]


def test_a_run_computes_on_the_stream_that_its_inputs_are_made_on(
    engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_batch(engine, REQUESTS, Fifo(2)).requests
    made, make = [], ContinuousBatchingIOs.__init__

    def with_stream(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        made.append(self)
        self.compute_stream = "a stream of its own, as on a GPU"

    monkeypatch.setattr(ContinuousBatchingIOs, "__init__", with_stream)
    found = run_batch(engine, REQUESTS, Fifo(2)).requests
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert made and all(one.compute_stream is None for one in made)


def test_the_profile_sizes_the_kv_cache_and_not_what_is_free(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(batching, "ContinuousBatchingConfig", _recording(told))
    keys = {"cache.slots": 8, "cache.kv_bytes": 24 * PAGE_TOKENS * 2 * 3 * 16 * 4}
    with runtime.load(checkpoint, overrides=keys) as engine:
        assert kv_tokens(engine) == 24 * PAGE_TOKENS
        sizes = {}
        for name, available in (("plenty", 1 << 40), ("just enough", 8 << 20)):
            monkeypatch.setattr(PagedAttentionMemoryHandler, "get_available_memory", lambda self, a=available: a)
            run_batch(engine, [PromptRequest(f"r{i}", _text(40), 60) for i in range(8)], Fifo(8))
            sizes[name] = told[-1].num_blocks, told[-1].max_batch_tokens
        assert sizes["plenty"] == sizes["just enough"] and sizes["plenty"][0] == 24
        for one in told:
            assert one.use_async_batching is False and one.use_cuda_graph is False and one.max_memory_percent == 1.0
            assert one.default_compile_level == 0 and one.cpu_offload_space == 0.0
        monkeypatch.setattr(PagedAttentionMemoryHandler, "get_available_memory", lambda self: 1 << 10)
        with pytest.raises(BudgetError, match=rf"KV cache of {24 * PAGE_TOKENS} tokens .*; take fewer expert slots"):
            run_batch(engine, [PromptRequest(f"r{i}", _text(40), 60) for i in range(8)], Fifo(8))


def _recording(told: list[Any]) -> Any:
    plain = batching.ContinuousBatchingConfig

    class Recorded(plain):  # type: ignore[misc, valid-type]
        def __post_init__(self) -> None:
            super().__post_init__()
            told.append(self)

    return Recorded


def test_a_gpu_whose_memory_runs_out_is_no_fault_of_the_model(
    engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")

    with monkeypatch.context() as patched:
        patched.setattr(engine.model.lm_head, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            run_batch(engine, REQUESTS, Fifo(2))
    with monkeypatch.context() as patched:
        patched.setattr(ContinuousBatchingIOs, "__init__", full)
        with pytest.raises(BudgetError, match=r"no memory for a KV cache of \d+ tokens \(CUDA out of memory\); take"):
            run_batch(engine, REQUESTS, Fifo(2))
    assert len(run_batch(engine, REQUESTS, Fifo(2)).requests) == len(REQUESTS)


def test_what_names_no_gpu_means_the_models() -> None:
    within: Any = devices.current(torch.device("cuda", 1))
    assert isinstance(within, torch.cuda.device) and within.idx == 1
    assert not isinstance(devices.current(devices.CPU), torch.cuda.device)
