"""Passes that load whole layers ahead of their routers, on a device that reorders, delays and fails."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fake_streams import FakeStreams

from runtime.cache.coordinator import Coordinator
from runtime.cache.governor import Governor
from runtime.cache.residency import Count, Residency
from runtime.errors import TransferError
from runtime.predictors.base import NoPredictor, Observation
from runtime.transfer.cuda import CudaTransfer, Lane
from runtime.vocabulary import Pass, Phase

LAYERS, EXPERTS, TOP_K = 8, 32, 4
LONG = 2048  # tokens of a prompt


def coordinator_of(slots: int, transfer: CudaTransfer) -> Coordinator:
    residency = Residency(LAYERS, EXPERTS, slots, TOP_K, "next_use")
    return Coordinator(residency, transfer, NoPredictor(), governor=Governor(0), prefetch_count=0, streams=True)


def observation(num_tokens: int, step: int = 0) -> Observation:
    return Observation(Pass(Phase.PREFILL, num_tokens, step), np.zeros((num_tokens, 1), np.int64))


def compute_on_streams(slots: int, seed: int, ignored: set[Lane]) -> tuple[FakeStreams, Coordinator]:
    """Prompts and decode steps whose kernels look at what lies in the slots, on streams that run when they like."""
    rng = random.Random(seed)
    streams = FakeStreams(LAYERS * EXPERTS, slots, 64, seed)
    streams.ignored = ignored
    coordinator = coordinator_of(slots, CudaTransfer(streams, slots, piece_bytes=24, window_bytes=48))
    for step, num_tokens in enumerate([LONG, 1, LONG, LONG]):
        seen = observation(num_tokens, step)
        coordinator.begin(seen.passing)
        for layer in range(LAYERS):
            chosen = TOP_K if num_tokens == 1 else rng.randint(26, EXPERTS)
            demand = sorted(layer * EXPERTS + expert for expert in rng.sample(range(EXPERTS), chosen))
            served: list[int] = []
            for group in coordinator.serve(layer, demand, [1] * chosen, seen):
                for expert in group:
                    streams.read(coordinator.residency.slot_of(expert), expert)
                for _ in range(rng.choice([0, 0, 3, 12])):
                    streams.step()
                served += group
            assert sorted(served) == demand
            coordinator.residency.check_integrity()
        if rng.random() < 0.3:
            streams.run()
    assert streams.num_blocked == 0
    streams.run()
    return streams, coordinator


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("slots", [1, 2, 3, 8, EXPERTS // 2, EXPERTS, 2 * EXPERTS, LAYERS * EXPERTS])
def test_no_kernel_reads_a_slot_that_is_not_its_experts(slots: int, seed: int) -> None:
    streams, coordinator = compute_on_streams(slots, seed, set())
    assert streams.num_read > 1000 and not streams.wrong
    assert coordinator.residency.counts()[Count.PREFETCH_USED] > 0


@pytest.mark.parametrize("lane", [Lane.DEMAND, Lane.COMPUTE])
def test_the_streams_notice_every_wait_that_is_left_out(lane: Lane) -> None:
    assert any(compute_on_streams(EXPERTS // 2, seed, {lane})[0].wrong for seed in range(3))


def test_a_stream_is_enqueued_whole_and_at_once() -> None:
    """Whatever the window: the host may be busy until the next layer."""
    streams = FakeStreams(LAYERS * EXPERTS, 2 * EXPERTS, 64)
    coordinator = coordinator_of(2 * EXPERTS, CudaTransfer(streams, 2 * EXPERTS, piece_bytes=24, window_bytes=1))
    coordinator.begin(observation(LONG).passing)
    streams.run()
    assert streams.copied == list(range(EXPERTS))
    next(iter(coordinator.serve(0, list(range(EXPERTS)), [1] * EXPERTS, observation(LONG))))
    streams.run()
    assert streams.copied == list(range(2 * EXPERTS))


def test_a_failed_copy_of_a_stream_ends_the_pass_and_the_next_one_goes_well() -> None:
    streams = FakeStreams(LAYERS * EXPERTS, EXPERTS // 2, 64)
    coordinator = coordinator_of(EXPERTS // 2, CudaTransfer(streams, EXPERTS // 2))
    streams.refused = {20}  # of the first layer; found no slot at first
    seen = observation(LONG)
    coordinator.begin(seen.passing)
    with pytest.raises(TransferError, match=r"number 20\): CUDA error: no copy of 20"):
        list(coordinator.serve(0, list(range(EXPERTS)), [1] * EXPERTS, seen))
    coordinator.recover()
    coordinator.residency.check_integrity()
    streams.refused = set()
    coordinator.begin(seen.passing)
    for layer in range(LAYERS):
        demand = list(range(layer * EXPERTS, (layer + 1) * EXPERTS))
        for group in coordinator.serve(layer, demand, [1] * EXPERTS, seen):
            for expert in group:
                streams.read(coordinator.residency.slot_of(expert), expert)
    streams.run()
    assert streams.num_read == 2 * LAYERS * EXPERTS and not streams.wrong
