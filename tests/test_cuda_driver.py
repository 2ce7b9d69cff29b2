"""What calls CUDA, on a driver that is none: `fake_cuda`. Whole engines, and what they are told when it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from fake_cuda import FakeCuda
from tiny import EXPERTS, LAYERS, TOP_K, save_tiny

import runtime
from runtime import build, devices, host_memory, numa
from runtime.cache.miss import MissRates
from runtime.cuda_driver import CudaDriver
from runtime.errors import DeviceError, ExpertFlowError, TransferError
from runtime.probe import gpu_bandwidth
from runtime.readback import CudaReader, CudaUploader, upload
from runtime.transfer.cuda import CudaTransfer
from runtime.transfer.cuda_streams import CudaStreams, pins_beyond
from runtime.transfer.device_slots import DeviceSlots
from runtime.transfer.host_slab import HostSlab
from runtime.vocabulary import Load, LoadReason

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has a CUDA of its own")

GPU = torch.device("cuda", 0)
ROW_BYTES, NUM_EXPERTS = 8192, LAYERS * EXPERTS
SOME = {"tiers.host_bytes": NUM_EXPERTS // 3 * ROW_BYTES}
TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda.installed() as installed:
        yield installed


@pytest.fixture
def two() -> Iterator[FakeCuda]:
    with fake_cuda.installed(2) as installed:
        yield installed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@torch.inference_mode()
def logits_of(engine: runtime.Engine, cuda: FakeCuda) -> list[torch.Tensor]:
    """Of a prompt, of tokens after it, of a batch; nothing but the one read per layer may have made the host wait."""
    device = engine.model.device
    ids = engine.tokenizer(TEXT, return_tensors="pt")["input_ids"].to(device)
    model: Any = engine.model
    before, waits = cuda.num_syncs, cuda.calls["cuStreamSynchronize"]
    out = model(ids[:, :-4], use_cache=True)
    found = [out.logits[:, -1]]
    for place in range(4):
        step = ids[:, ids.shape[1] - 4 + place :][:, :1]
        out = model(step, past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits[:, -1])
    found.append(model(ids.repeat(3, 1), use_cache=False).logits[:, -1])
    assert cuda.num_syncs == before
    assert cuda.calls["cuStreamSynchronize"] - waits == LAYERS * 6
    return [one.cpu() for one in found]


SETTINGS: dict[str, dict[str, Any]] = {
    "one slot": {"cache.slots": 1},
    "few": {"cache.slots": TOP_K},
    "a quarter": {"cache.slots": "25%", "compute.decode": "grouped_mm", "compute.prefill": "eager"},
    "one stream": {"cache.slots": "25%", "transfer.streams": 1},
    "prefetch": {"cache.slots": 10, "predictor.kind": "gate_lookahead", "prefetch.depth": 2},
    "all": {},
    "disk": {"cache.slots": 4, **SOME},
    "disk, prefetch": {"cache.slots": 6, "predictor.kind": "gate_lookahead", "prefetch.depth": 1, **SOME},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_engine_equals_the_resident_model(checkpoint: Path, cuda: FakeCuda, name: str) -> None:
    overrides = SETTINGS[name]
    with runtime.load_reference(checkpoint, device=GPU, overrides=overrides) as reference:
        expected = logits_of(reference, cuda)
    assert all(one.isfinite().all() for one in expected)
    with runtime.load(checkpoint, device=GPU, overrides=overrides) as engine:
        assert sum(cuda.registered.values()) > 0
        found = logits_of(engine, cuda)
        assert all(map(torch.equal, found, expected))
        engine.check_integrity()
        stats = engine.stats()
        assert stats.num_loads > 0 and stats.peak_gpu_bytes > 0
        assert cuda.num_pageable == 0 and stats.num_failed_loads == 0
    assert not cuda.registered
