"""The machine's counters of CPU time, heat, quotas and memory pressure, which a trial's surroundings are judged by."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from runtime import machine


@dataclass(frozen=True)
class Snapshot:
    """Counters of the machine at one moment.

    Attributes:
        busy_s, steal_s: of all CPUs that this process may use, by anybody, and by the hypervisor for other machines.
        throttled_ms: for heat, by CPU and by package; empty where the kernel does not say.
        num_periods, num_quota_waits: of the control group's CPU quota.
        memory_stall_s: in which somebody waited for memory.
    """

    time_s: float
    busy_s: float
    steal_s: float
    throttled_ms: tuple[int, ...]
    num_periods: int
    num_quota_waits: int
    memory_stall_s: float
    swapped_bytes: int
    available_bytes: int


def read_snapshot(proc: Path = machine.PROC, system: Path = Path("/sys")) -> Snapshot:
    """Read the counters; those that the kernel does not keep are zero."""
    busy_s, steal_s = _cpu_s(proc)
    throttled = sorted(system.glob("devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_total_time_ms"))
    swap = dict(line.split() for line in _lines(proc / "vmstat") if line.startswith("pswp"))
    stalls = [line.rpartition("total=")[2] for line in _lines(proc / "pressure/memory") if line.startswith("some")]
    num_periods, num_quota_waits = machine.cpu_quota_periods()
    return Snapshot(
        time_s=time.monotonic(),
        busy_s=busy_s,
        steal_s=steal_s,
        throttled_ms=tuple(int("".join(_lines(path)) or 0) for path in throttled),
        num_periods=num_periods,
        num_quota_waits=num_quota_waits,
        memory_stall_s=sum(map(int, stalls)) / 1e6,
        swapped_bytes=sum(map(int, swap.values())) * os.sysconf("SC_PAGE_SIZE"),
        available_bytes=machine.available_memory_bytes(),
    )


def _cpu_s(proc: Path) -> tuple[float, float]:
    """Busy and stolen seconds of the CPUs that this process may use."""
    allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    rows = [line.split() for line in _lines(proc / "stat")]
    # user nice system idle iowait irq softirq steal; guests are in user already
    ticks = [[int(one) for one in row[1:9]] for row in rows if row and row[0] in allowed]
    per_s = os.sysconf("SC_CLK_TCK")
    busy = sum(sum(one[:3]) + sum(one[5:7]) for one in ticks)
    return busy / per_s, sum(sum(one[7:8]) for one in ticks) / per_s


def process_fields(pid: int | None) -> list[str]:
    """Of /proc/PID/stat, those after the name, which may hold anything; empty where there is no such process."""
    return " ".join(_lines(machine.PROC / str(pid) / "stat")).rpartition(")")[2].split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
