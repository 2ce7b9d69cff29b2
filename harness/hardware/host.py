"""The host's memory: how much there is, how much can be pinned, and which processors are near which part of it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime import machine

NODES = Path("/sys/devices/system/node")
_CAP_IPC_LOCK = 14  # capability(7): lock memory without a limit
_KEPT_FREE = 0.1  # of all memory: pinned pages cannot be reclaimed, and a machine without any that can thrashes


@dataclass(frozen=True)
class HostMemory:
    """Bytes, under the tightest control group.

    Attributes:
        memlock_bytes: RLIMIT_MEMLOCK; None where this process has no limit.
        pinnable_bytes: what can be pinned now: the smaller of that limit and what is available, a tenth kept free.
            Under WSL2 the true limit is far lower, and only trying finds it.
    """

    total_bytes: int
    available_bytes: int
    memlock_bytes: int | None
    pinnable_bytes: int


def host_memory() -> HostMemory:
    """What this process can have now."""
    total, available = machine.total_memory_bytes(), machine.available_memory_bytes()
    limit = memlock_limit_bytes()
    free = max(0, available - int(_KEPT_FREE * total))
    return HostMemory(total, available, limit, free if limit is None else min(free, limit))


def memlock_limit_bytes() -> int | None:
    """RLIMIT_MEMLOCK of this process; None: unlimited, or a capability lifts it."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY or _may_lock() else limit


def _may_lock() -> bool:
    for line in (machine.PROC / "self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


def numa_cpus(node: int) -> frozenset[int]:
    """Processors of a NUMA node; empty where the kernel does not tell."""
    try:
        spans = (NODES / f"node{node}" / "cpulist").read_text().strip().split(",")
    except OSError:
        return frozenset()
    cpus = set[int]()
    for span in filter(None, spans):
        first, _, last = span.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


@contextmanager
def near(node: int | None) -> Iterator[None]:
    """Run on the processors of a NUMA node, so that memory touched first meanwhile lies there.

    No effect where the node is not known or none of its processors may be used.
    """
    before = os.sched_getaffinity(0)
    wanted = before & numa_cpus(node) if node is not None else set()
    if wanted:
        os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
