"""Bandwidth between host and GPU as a curve over sizes: by kind of host memory, by direction, and beside a computation.

One sample is 16 copies between two events of the device. Before anything is timed the link is woken: one that is idle
trains down to its first generation, and takes copies to come back. What the link is, is read while it copies.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from harness.hardware.bandwidth import SIZES, fit
from harness.hardware.readings import GpuReadings, GpuState, Reading
from harness.hardware.verdicts import Judgement, Link, judge_link
from harness.measure.stats import summarize
from runtime.machine import format_bytes

NUM_COPIES = 16
NUM_SAMPLES = 7
_MAX_VARIATION = 0.05  # of one point's samples, standard deviation over mean
_AWAKE_READS, _AWAKE_S, _WAKE_TIMEOUT_S = 3, 0.3, 3.0
_WATCHED_S = 0.5  # of copying while the link is read: many times what the read takes


class HostBuffer(enum.StrEnum):
    """Kinds of host memory that can be copied from and to."""

    PINNED = "pinned"
    REGISTERED = "registered"
    """Mapped first, then registered with the driver: of exactly the size that is wanted."""
    PAGEABLE = "pageable"


class Direction(enum.StrEnum):
    """Which way; `BOTH` times copies to the device while others go to the host."""

    TO_DEVICE = "H2D"
    TO_HOST = "D2H"
    BOTH = "H2D beside D2H"


class CopyError(Exception):
    """Memory that is not to be had, or a device that does not copy; the message says what."""


class CopyDevice(Protocol):
    """What the measurement asks of a GPU. Every method raises CopyError where the device refuses."""

    def allocate(self, memory: HostBuffer, num_bytes: int) -> None:
        """Two buffers of `num_bytes` in the host and two on the device, instead of those before."""

    def start(self, direction: Direction, num_bytes: int, num_copies: int, *, under_load: bool) -> None:
        """Enqueue copies of `num_bytes` between two events, and return once the first is under way.

        `under_load`: beside a computation bound by memory.
        """

    def finish(self) -> float:
        """Wait for what was started; the seconds between its two events."""

    def is_intact(self, num_bytes: int) -> bool:
        """Whether random bytes that were copied there and back are still the same."""


@dataclass(frozen=True)
class CopyPoint:
    """Copies of one size: seconds of one, by the samples' median and interquartile range.

    Attributes:
        variation: the samples' standard deviation over their mean.
        is_steady: False where that stayed high when measured again.
    """

    num_bytes: int
    copy_s: float
    iqr_s: float
    variation: float
    is_steady: bool

    @property
    def bytes_per_s(self) -> float:
        """At the median."""
        return self.num_bytes / self.copy_s


@dataclass(frozen=True)
class CopySeries:
    """The curve of one kind of memory and one direction, with or without load. `problem`: what was refused, or ""."""

    memory: HostBuffer
    direction: Direction
    under_load: bool
    points: tuple[CopyPoint, ...]
    latency_s: float | None
    asymptote_bytes_per_s: float | None
    problem: str


@dataclass(frozen=True)
class Copies:
    """All series of one GPU, and its state while it copied; None where that could not be seen."""

    expert_bytes: int
    series: tuple[CopySeries, ...]
    while_copying: GpuState | None

    @property
    def best_pinned_bytes_per_s(self) -> float | None:
        """The highest rate to the device from pinned memory, without load."""
        wanted = [
            one
            for one in self.series
            if one.memory is not HostBuffer.PAGEABLE and one.direction is Direction.TO_DEVICE and not one.under_load
        ]
        return max((point.bytes_per_s for one in wanted for point in one.points), default=None)

    def to_device_bytes_per_s(self, *, under_load: bool = False) -> float | None:
        """At the size of an expert, from memory such as the engine's: registered, else pinned. None: not measured.

        Args:
            under_load: beside a computation, where that was measured.
        """
        rates = {
            (one.under_load, one.memory): point.bytes_per_s
            for one in self.series
            if one.direction is Direction.TO_DEVICE
            for point in one.points
            if point.num_bytes == self.expert_bytes
        }
        order = [(loaded, memory) for loaded in (under_load, False) for memory in _LIKE_THE_ENGINE]
        return next((rates[one] for one in order if one in rates), None)

    def judge(self, gpu: GpuReadings) -> Judgement:
        """The verdict on the link of `gpu`."""
        state = self.while_copying
        now = None if state is None else _link(state.pcie_generation, state.pcie_width)
        best = _link(gpu.pcie_generation_max, gpu.pcie_width_max)
        return judge_link(f"link of GPU {gpu.index}", self.best_pinned_bytes_per_s, now, best)


_LIKE_THE_ENGINE = (HostBuffer.REGISTERED, HostBuffer.PINNED)

PLAN = (
    (HostBuffer.PINNED, Direction.TO_DEVICE, False),
    (HostBuffer.PINNED, Direction.TO_HOST, False),
    (HostBuffer.PINNED, Direction.BOTH, False),
    (HostBuffer.PINNED, Direction.TO_DEVICE, True),
    (HostBuffer.REGISTERED, Direction.TO_DEVICE, False),
    (HostBuffer.REGISTERED, Direction.TO_HOST, False),
    (HostBuffer.PAGEABLE, Direction.TO_DEVICE, False),
    (HostBuffer.PAGEABLE, Direction.TO_HOST, False),
)


def measure_copies(
    device: CopyDevice,
    expert_bytes: int,
    largest_bytes: int,
    read_state: Callable[[], GpuState],
    best_generation: int | None,
    *,
    budget_s: float = 30.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Copies:
    """Measure every series of `PLAN`, in about `budget_s` seconds after the link is awake.

    Sizes for which there is no time or no memory are left out; the expert's is not. A device that stops copying leaves
    what was measured before, and the reason.

    Args:
        largest_bytes: no buffer is larger; where even that is refused, half of it is tried, and so on.
        best_generation: of the link; None: not known.
    """
    runner = _Runner(device, clock, expert_bytes, read_state)
    state, series = None, list[CopySeries]()
    memory, room_bytes, problem = None, 0, ""
    end = clock() + budget_s
    for number, (wanted, direction, under_load) in enumerate(PLAN):
        if wanted is not memory:
            memory = wanted
            room_bytes, problem = runner.allocate(memory, largest_bytes)
            if state is None and room_bytes:
                started = clock()
                state, stopped = runner.wake(room_bytes, best_generation)
                problem, end = stopped or problem, end + clock() - started
        share_s = (end - clock()) / (len(PLAN) - number)
        points, stopped = runner.points(direction, under_load, room_bytes, share_s)
        latency_s, asymptote = fit([(point.num_bytes, point.copy_s) for point in points])
        why = stopped or problem
        series.append(CopySeries(memory, direction, under_load, tuple(points), latency_s, asymptote, why))
    return Copies(expert_bytes, tuple(series), state)


@dataclass
class _Runner:
    device: CopyDevice
    clock: Callable[[], float]
    expert_bytes: int
    read_state: Callable[[], GpuState]

    def allocate(self, memory: HostBuffer, largest_bytes: int) -> tuple[int, str]:
        """Bytes of the largest buffers that can be had, at least an expert's, else 0; and what was refused."""
        wanted, problem = max(largest_bytes, self.expert_bytes), ""
        while wanted:
            try:
                self.device.allocate(memory, wanted)
                break
            except CopyError as error:
                problem = f"{format_bytes(wanted)} refused: {error}"
                wanted = max(wanted // 2, self.expert_bytes) if wanted > self.expert_bytes else 0
        else:
            return 0, problem
        try:
            is_intact = self.device.is_intact(wanted)
        except CopyError as error:
            return 0, str(error)
        return (wanted, problem) if is_intact else (0, "copied bytes do not come back as they were")

    def wake(self, room_bytes: int, best_generation: int | None) -> tuple[GpuState | None, str]:
        """Copy until the link is at its best or is not going to be; its state while a last batch copies."""
        size, copied_s, in_a_row = min(room_bytes, 64 << 20), 0.0, 0
        try:
            while copied_s < _WAKE_TIMEOUT_S and (in_a_row < _AWAKE_READS if best_generation else copied_s < _AWAKE_S):
                state, seconds = self._watched(size, NUM_COPIES)
                copied_s += seconds
                in_a_row = in_a_row + 1 if state.pcie_generation.value == best_generation else 0
            num_copies = max(NUM_COPIES, round(_WATCHED_S / (seconds / NUM_COPIES)))
            return self._watched(size, num_copies)[0], ""
        except CopyError as error:
            return None, str(error)

    def _watched(self, size: int, num_copies: int) -> tuple[GpuState, float]:
        self.device.start(Direction.TO_DEVICE, size, num_copies, under_load=False)
        state = self.read_state()
        return state, self.device.finish()

    def points(
        self, direction: Direction, under_load: bool, room_bytes: int, budget_s: float
    ) -> tuple[list[CopyPoint], str]:
        """The points for which there are room and time, and why it stopped early."""
        end, points = self.clock() + budget_s, list[CopyPoint]()
        for size in sorted({*SIZES, self.expert_bytes}):
            left_s = end - self.clock()
            expected_s = points[-1].copy_s * size / points[-1].num_bytes if points else 0.0
            has_time = size == self.expert_bytes or expected_s * NUM_COPIES * (NUM_SAMPLES + 1) <= left_s
            if size > room_bytes or not has_time:
                continue
            try:
                points.append(self._point(direction, under_load, size))
            except CopyError as error:
                return points, str(error)
        return points, ""

    def _point(self, direction: Direction, under_load: bool, size: int) -> CopyPoint:
        self._sample(direction, under_load, size)
        for _ in range(2):
            samples = [self._sample(direction, under_load, size) for _ in range(NUM_SAMPLES)]
            variation = float(np.std(samples) / np.mean(samples))
            if variation <= _MAX_VARIATION:
                break
        summary = summarize(samples)
        return CopyPoint(size, summary.median, summary.iqr, variation, variation <= _MAX_VARIATION)

    def _sample(self, direction: Direction, under_load: bool, size: int) -> float:
        self.device.start(direction, size, NUM_COPIES, under_load=under_load)
        return self.device.finish() / NUM_COPIES


def _link(generation: Reading[int], width: Reading[int]) -> Link | None:
    return None if generation.value is None or width.value is None else Link(generation.value, width.value)


def copy_lines(copies: Copies, size_name: Callable[[int], str]) -> Iterable[str]:
    """A table for people: GB/s by series and size, a `~` behind what was not steady."""
    sizes: Sequence[int] = sorted({point.num_bytes for one in copies.series for point in one.points})
    yield f"copies     {'GB/s at':<26}" + "".join(f"{size_name(size):>10}" for size in sizes)
    for one in copies.series:
        rates = {
            point.num_bytes: f"{point.bytes_per_s / 1e9:.2f}{'' if point.is_steady else '~'}" for point in one.points
        }
        name = f"{one.memory} {one.direction}{' + load' if one.under_load else ''}"
        cells = "".join(f"{rates.get(size, '-'):>10}" for size in sizes)
        yield f"{'':11}{name:<26}{cells}" + (f"  ({one.problem})" if one.problem else "")
