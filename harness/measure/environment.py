"""What goes on beside a trial: whether a measurement was made under the conditions of those it is compared with.

Judged against what is usual here, not against silence: on a shared machine some load is always there.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness.hardware.counters import Snapshot, read_snapshot
from harness.hardware.readings import GpuState, Status
from harness.measure.stats import median
from runtime import machine

GPU_LOST = "GPU lost"
"""Begins the message of a trial that lost it: no further one can be measured."""

_REMEMBERED = 9
"""Trials that say what is usual: a change that stays is the new usual after five."""
_SLACK = {
    # Steal of 5-25 % comes and goes on shared machines; a quarter of the cores more is felt by any configuration.
    "steal_share": (0.25, "other machines took {:.0%} of the cores"),
    "foreign_share": (0.25, "other processes took {:.0%} of the cores"),
    # Heat lowers the clocks by about a half while it lasts: 10 % of the time is 5 % of the latency.
    "thermal_share": (0.1, "the CPU was throttled for heat {:.0%} of the time"),
    "quota_share": (0.1, "the control group waited for its CPU quota in {:.0%} of the periods"),
}
_WAIT_SLACK = 0.1
"""By how much more a trial must wait for a CPU before others are to blame. Where they fill all cores, they take the
less the more threads a configuration has: what they took is then no measure of how they disturbed it."""
_LEAST_AVAILABLE = 0.8
"""Of the usual available memory: it is also the page cache, which decides how often the disk is read."""
_ALL_OWN = 0.9
"""Share of the cores above which a trial used up the quota itself; that is the configuration's doing."""
_LOST = (Status.GPU_LOST, Status.RESET_REQUIRED)


@dataclass(frozen=True)
class GpuConditions:
    """Of the GPU during a trial. `lost`: why it cannot be asked any more, empty while it can.

    Attributes:
        pcie_generation, pcie_width: the highest seen while the trial ran; None where it was not seen.
        foreign_processes: on the GPU before or after the trial.
    """

    lost: str = ""
    throttle_reasons: tuple[str, ...] = ()
    pcie_generation: int | None = None
    pcie_width: int | None = None
    foreign_processes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Conditions:
    """What went on beside a trial.

    Attributes:
        steal_share, foreign_share, own_share: of the cores' time, taken by other machines, by other processes, and by
            the trial. wait_share: of the time in which the trial could have run but waited for a CPU; None: not known.
            thermal_share, quota_share: see `_SLACK`. memory_stall_share: of the time, and swapped_bytes: both may be
            the trial's own doing.
        available_bytes: memory that others left, the less of before and after.
    """

    steal_share: float
    foreign_share: float
    own_share: float
    thermal_share: float
    quota_share: float
    memory_stall_share: float
    swapped_bytes: int
    available_bytes: int
    wait_share: float | None = None
    gpu: GpuConditions | None = None

    @classmethod
    def between(cls, before: Snapshot, after: Snapshot, own_cpu_s: float) -> Conditions:
        """From the counters before and after a trial, which used `own_cpu_s` of CPU time."""
        wall_s = max(after.time_s - before.time_s, 1e-3)
        cores_s = len(os.sched_getaffinity(0)) * wall_s
        throttled = [late - early for early, late in zip(before.throttled_ms, after.throttled_ms, strict=True)]
        num_periods = after.num_periods - before.num_periods
        return cls(
            steal_share=(after.steal_s - before.steal_s) / cores_s,
            foreign_share=max(0.0, after.busy_s - before.busy_s - own_cpu_s) / cores_s,
            own_share=own_cpu_s / (machine.cpu_count() * wall_s),
            thermal_share=max(throttled, default=0) / 1e3 / wall_s,
            quota_share=(after.num_quota_waits - before.num_quota_waits) / num_periods if num_periods else 0.0,
            memory_stall_share=(after.memory_stall_s - before.memory_stall_s) / wall_s,
            swapped_bytes=after.swapped_bytes - before.swapped_bytes,
            available_bytes=min(before.available_bytes, after.available_bytes),
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON; flat, without the GPU where there is none."""
        found = asdict(self)
        gpu = found.pop("gpu") or {}
        rounded = {name: round(one, 4) if isinstance(one, float) else one for name, one in found.items()}
        return {**rounded, **{f"gpu_{name}": one for name, one in gpu.items()}}


def changes(now: Conditions, earlier: Sequence[Conditions]) -> str:
    """What is not as it usually was, empty where everything is; with nothing `earlier` everything is usual."""
    if not earlier:
        return ""
    reasons = []
    for name, (slack, words) in _SLACK.items():
        usual, found = median([getattr(one, name) for one in earlier]), getattr(now, name)
        if found - usual > slack and _is_others_doing(name, now, earlier):
            reasons.append(f"{words.format(found)}, usually {usual:.0%}")
    usual = median([one.available_bytes for one in earlier])
    if now.available_bytes < _LEAST_AVAILABLE * usual:
        left, usually = machine.format_bytes(now.available_bytes), machine.format_bytes(usual)
        reasons.append(f"others left {left} of memory, usually {usually}")
    if now.gpu is not None:
        reasons += _gpu_changes(now.gpu, [one.gpu for one in earlier if one.gpu is not None])
    return "; ".join(reasons)


def _is_others_doing(name: str, now: Conditions, earlier: Sequence[Conditions]) -> bool:
    if name == "quota_share":
        return now.own_share <= _ALL_OWN
    waited = [one.wait_share for one in earlier if one.wait_share is not None]
    if name == "foreign_share" and now.wait_share is not None and waited:
        return now.wait_share - median(waited) > _WAIT_SLACK
    return True


def _gpu_changes(now: GpuConditions, earlier: Sequence[GpuConditions]) -> list[str]:
    reasons = []
    for name in ("pcie_generation", "pcie_width"):
        seen = [getattr(one, name) for one in earlier if getattr(one, name) is not None]
        found = getattr(now, name)
        if found is not None and seen and found < median(seen):
            reasons.append(f"the GPU's {name.replace('pcie_', 'PCIe ')} fell to {found} from {median(seen):.0f}")
    for name, words in (("throttle_reasons", "the GPU was throttled"), ("foreign_processes", "new on the GPU")):
        lists = [getattr(one, name) for one in earlier]
        new = [one for one in getattr(now, name) if 2 * sum(one in other for other in lists) < len(lists)]
        if new:
            reasons.append(f"{words}: {', '.join(map(str, new))}")
    return reasons


class Surroundings:
    """Watches trials one after another and judges each by those before it.

    Args:
        gpu_state: asks the GPU that the trials run on; None: they run on none.
        read: the machine's counters now.
    """

    def __init__(
        self, gpu_state: Callable[[], GpuState] | None = None, read: Callable[[], Snapshot] = read_snapshot
    ) -> None:
        self._gpu_state, self._read = gpu_state, read
        self._earlier: deque[Conditions] = deque(maxlen=_REMEMBERED)

    def watch(self) -> SurroundingsWatch:
        """Begin to watch a trial that is about to start."""
        return SurroundingsWatch(self._gpu_state, self._read)

    def changed(self, now: Conditions) -> str:
        """What was not as usual in a trial that has ended; empty where everything was. Every trial is to be told."""
        reason = changes(now, self._earlier)
        self._earlier.append(now)
        return reason


class SurroundingsWatch:
    """Of one trial. Made by `Surroundings.watch`."""

    def __init__(self, gpu_state: Callable[[], GpuState] | None, read: Callable[[], Snapshot]) -> None:
        self._gpu_state, self._read = gpu_state, read
        self._before, self._own_s = read(), time.process_time()
        self._around = [] if gpu_state is None else [gpu_state()]
        self._running: list[GpuState] = []

    def sample(self) -> str:
        """Look at the GPU while the trial runs; says when it is lost."""
        if self._gpu_state is None:
            return ""
        self._running.append(self._gpu_state())
        return lost_of(self._running[-1:])

    def end(self, trial_cpu_s: float, wait_share: float | None = None) -> Conditions:
        """The trial has ended, its process is gone.

        Args:
            trial_cpu_s: CPU time that it used. wait_share: see `Conditions`.
        """
        own_s = trial_cpu_s + time.process_time() - self._own_s
        after = self._read()
        if self._gpu_state is not None:
            self._around.append(self._gpu_state())
        gpu = None if self._gpu_state is None else _gpu_conditions(self._around, self._running)
        return replace(Conditions.between(self._before, after, own_s), wait_share=wait_share, gpu=gpu)


def _gpu_conditions(around: Sequence[GpuState], running: Sequence[GpuState]) -> GpuConditions:
    """An idle link trains down, so that only what was seen while the trial ran counts; the trial's own process is on
    the GPU then, so that others are looked for around it."""

    def highest(name: str) -> int | None:
        return max(filter(None, (getattr(one, name).value for one in running)), default=None)

    reasons = {reason for one in running for reason in one.throttle_reasons.value or ()}
    processes = {process for one in around for process in one.foreign_processes.value or ()}
    return GpuConditions(
        lost=lost_of([*running, *around]),
        throttle_reasons=tuple(sorted(reasons)),
        pcie_generation=highest("pcie_generation"),
        pcie_width=highest("pcie_width"),
        foreign_processes=tuple(sorted(processes)),
    )


def lost_of(states: Sequence[GpuState]) -> str:
    """Why the GPU cannot be asked any more, beginning with `GPU_LOST`; empty while it can."""
    return next((f"{GPU_LOST}: NVML says {one.status}" for one in states if one.status in _LOST), "")
