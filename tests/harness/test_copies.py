"""The measurement of copies, on a device with a virtual clock: what it finds, what it leaves out, what it survives."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from typing import Any

import pytest
from fake_nvml import FakeNvml

from harness.hardware.copies import (
    NUM_COPIES,
    PLAN,
    Copies,
    CopyError,
    Direction,
    HostBuffer,
    copy_lines,
    measure_copies,
)
from harness.hardware.nvml import gpu_state, read_gpus
from harness.hardware.readings import GpuState
from harness.hardware.verdicts import Verdict

EXPERT_BYTES, LARGEST_BYTES = 6_291_456 + 512, 1 << 30
LATENCY_S = 8e-6
RATES = {HostBuffer.PINNED: 25e9, HostBuffer.REGISTERED: 24e9, HostBuffer.PAGEABLE: 6e9}


class FakeDevice:
    """Copies take latency + bytes / rate of virtual time; the link trains up while they go on.

    `refuse_above`: bytes of pinned or registered memory. `noise`: relative. `generations`: of the link after each so
    many seconds of copying. `lost_after`: copies started before the device is gone.
    """

    def __init__(self, *, refuse_above: int = 1 << 62, noise: float = 0.0, lost_after: int | None = None) -> None:
        self.now, self.copied_s, self.num_started = 0.0, 0.0, 0
        self.refuse_above, self.noise, self.lost_after = refuse_above, noise, lost_after
        self.draw, self.is_copying, self.corrupts = random.Random(0), False, set[HostBuffer]()
        self.memory, self.largest, self.slower, self.is_closed = HostBuffer.PAGEABLE, 4, 1.0, False
        self.sizes: list[int] = []
        self._seconds = 0.0

    @property
    def generation(self) -> int:
        return min(self.largest, 1 + int(self.copied_s / 0.1)) if self.is_copying else 1

    def state(self) -> GpuState:
        fake = FakeNvml()
        fake.link = (self.generation, 16)
        return gpu_state(0, fake)

    def allocate(self, memory: HostBuffer, num_bytes: int) -> None:
        if memory is not HostBuffer.PAGEABLE and num_bytes > self.refuse_above:
            raise CopyError("out of memory")
        self.memory = memory

    def start(self, direction: Direction, num_bytes: int, num_copies: int, *, under_load: bool) -> None:
        self.num_started += 1
        if self.lost_after is not None and self.num_started > self.lost_after:
            raise CopyError("the GPU is lost")
        self.sizes.append(num_bytes)
        self.is_copying = True
        rate = RATES[self.memory] * (0.5 if under_load else 1.0) * (0.8 if direction is Direction.BOTH else 1.0)
        rate *= 2.0 ** (self.generation - 4) / self.slower
        self._seconds = num_copies * (LATENCY_S + num_bytes / rate) * (1 + self.noise * self.draw.uniform(-1, 1))

    def finish(self) -> float:
        self.is_copying = False
        self.copied_s += self._seconds
        self.now += self._seconds
        return self._seconds

    def close(self) -> None:
        self.is_closed = True

    def is_intact(self, num_bytes: int) -> bool:
        return self.memory not in self.corrupts


def _measure(device: FakeDevice, **given: Any) -> Copies:
    largest = given.pop("largest_bytes", LARGEST_BYTES)
    return measure_copies(device, EXPERT_BYTES, largest, device.state, 4, clock=lambda: device.now, **given)


def _by_plan(copies: Copies) -> dict[Any, Any]:
    return {(one.memory, one.direction, one.under_load): one for one in copies.series}


def test_the_curves_find_latency_and_asymptote_of_every_kind() -> None:
    series = _by_plan(_measure(FakeDevice(), budget_s=60.0))
    assert list(series) == list(PLAN)
    for (memory, direction, under_load), one in series.items():
        rate = RATES[memory] * (0.5 if under_load else 1) * (0.8 if direction is Direction.BOTH else 1)
        assert one.asymptote_bytes_per_s == pytest.approx(rate) and one.latency_s == pytest.approx(LATENCY_S)
        assert all(point.is_steady and point.iqr_s < 1e-9 for point in one.points) and not one.problem
    pinned = series[PLAN[0]].points
    assert [point.num_bytes for point in pinned][:2] == [4096, 16384] and pinned[-1].num_bytes == 1 << 30
    assert EXPERT_BYTES in {point.num_bytes for point in pinned}


def test_the_link_is_awake_before_anything_is_timed_and_read_while_it_copies() -> None:
    copies = _measure(FakeDevice(), budget_s=5.0)
    assert copies.while_copying is not None and copies.while_copying.pcie_generation.value == 4
    assert copies.series[0].points[0].copy_s == pytest.approx(LATENCY_S + 4096 / 25e9)
    gpu = read_gpus(FakeNvml()).gpus[0]
    assert gpu.pcie_generation.value == 1, "idle, it has trained down"
    assert copies.judge(gpu).verdict is Verdict.OK


def test_a_link_that_never_gets_there_is_degraded_and_not_waited_for() -> None:
    device = FakeDevice()
    device.largest = 2
    copies = _measure(device, budget_s=5.0)
    judgement = copies.judge(read_gpus(FakeNvml()).gpus[0])
    assert judgement.verdict is Verdict.DEGRADED_LINK and "PCIe 2 x16 while copying, PCIe 4 x16" in judgement.reason
    assert device.now < 12


def test_a_slow_link_underperforms() -> None:
    device = FakeDevice()
    device.slower = 2.0
    judgement = _measure(device, budget_s=5.0).judge(read_gpus(FakeNvml()).gpus[0])
    assert judgement.verdict is Verdict.UNDERPERFORMING and "12.4 GB/s, 39% of what PCIe 4 x16" in judgement.reason


@pytest.mark.parametrize("slower", [1.0, 1000.0])
def test_the_budget_holds_and_the_expert_is_always_in(slower: float) -> None:
    device = FakeDevice()
    device.slower = slower
    copies = _measure(device, budget_s=4.0)
    timed = [{point.num_bytes for point in one.points} for one in copies.series]
    assert all(EXPERT_BYTES in sizes for sizes in timed)
    expert_s = sum(LATENCY_S + EXPERT_BYTES * slower * 2.5 / RATES[memory] for memory, _, _ in PLAN)
    assert device.now < 4.0 + 3.6 + 2 * NUM_COPIES * 17 * expert_s
    assert (1 << 30) not in timed[0]


def test_noise_is_measured_again_and_flagged() -> None:
    calm, noisy = (_measure(FakeDevice(noise=noise), budget_s=5.0) for noise in (0.01, 0.3))
    points = [[point for one in copies.series for point in one.points] for copies in (calm, noisy)]
    assert all(point.is_steady and 0 < point.variation < 0.05 and point.iqr_s > 0 for point in points[0])
    assert sum(point.is_steady for point in points[1]) < 0.1 * len(points[1])
    repeated = FakeDevice(noise=0.3)
    _measure(repeated, budget_s=5.0)
    assert repeated.sizes.count(4096) == pytest.approx(len(PLAN) * 15, abs=7)
    assert "~" in "\n".join(copy_lines(noisy, str))


def test_pinned_memory_that_is_refused_is_halved_and_said() -> None:
    copies = _measure(FakeDevice(refuse_above=300 << 20), budget_s=60.0)
    one = copies.series[0]
    assert one.points[-1].num_bytes == 256 << 20 and one.problem == "537 MB refused: out of memory"
    assert copies.series[-1].points[-1].num_bytes == 1 << 30 and not copies.series[-1].problem
    tight = _measure(FakeDevice(refuse_above=EXPERT_BYTES), budget_s=5.0)
    assert tight.series[0].points[-1].num_bytes == EXPERT_BYTES


def test_without_pinned_memory_there_is_no_verdict_but_the_pageable_curve() -> None:
    copies = _measure(FakeDevice(refuse_above=0), budget_s=5.0)
    assert [bool(one.points) for one in copies.series] == [False] * 6 + [True] * 2
    assert all("refused: out of memory" in one.problem for one in copies.series[:6])
    assert copies.judge(read_gpus(FakeNvml()).gpus[0]).verdict is Verdict.UNMEASURABLE
    assert json.loads(json.dumps(asdict(copies)))["series"][0]["points"] == []


def test_bytes_that_come_back_changed_are_not_timed() -> None:
    device = FakeDevice()
    device.corrupts = {HostBuffer.REGISTERED}
    series = _by_plan(_measure(device, budget_s=5.0))
    for (memory, _, _), one in series.items():
        assert bool(one.points) == (memory is not HostBuffer.REGISTERED)
        assert ("do not come back" in one.problem) == (memory is HostBuffer.REGISTERED)


@pytest.mark.parametrize("lost_after", [0, 1, 20, 100, 400])
def test_a_gpu_that_is_lost_leaves_what_was_measured(lost_after: int) -> None:
    copies = _measure(FakeDevice(lost_after=lost_after), budget_s=5.0)
    assert len(copies.series) == len(PLAN) and copies.series[-1].problem == "the GPU is lost"
    assert bool(copies.series[0].points) == (lost_after >= 20)
