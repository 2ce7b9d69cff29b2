"""The host's memory: how much there is, how much of it can be pinned, and how much of it experts may take."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from runtime import machine
from runtime.errors import BudgetError
from runtime.machine import format_bytes

_CAP_IPC_LOCK = 14  # capability(7): lock memory without a limit
_KEPT_FREE = 0.1  # of all memory: pinned pages cannot be reclaimed, and a machine without any that can thrashes


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes, under the tightest control group.

    Attributes:
        memlock_bytes: RLIMIT_MEMLOCK; None where this process has no limit.
    """

    total_bytes: int
    available_bytes: int
    memlock_bytes: int | None

    @property
    def kept_bytes(self) -> int:
        """Left free whatever is asked for: a tenth of all memory."""
        return int(_KEPT_FREE * self.total_bytes)

    @property
    def usable_bytes(self) -> int:
        """What is available now, less what is kept free."""
        return max(0, self.available_bytes - self.kept_bytes)

    @property
    def pinnable_bytes(self) -> int:
        """What can be pinned now. Under WSL2 the true limit is far lower, and only trying finds it."""
        return self.usable_bytes if self.memlock_bytes is None else min(self.usable_bytes, self.memlock_bytes)


def host_memory() -> HostMemory:
    """What this process can have now."""
    return HostMemory(machine.total_memory_bytes(), machine.available_memory_bytes(), memlock_limit_bytes())


def memlock_limit_bytes() -> int | None:
    """RLIMIT_MEMLOCK of this process; None: unlimited, or a capability lifts it."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY or _may_lock() else limit


def _may_lock() -> bool:
    for line in (machine.PROC / "self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


class PoolNeed(NamedTuple):
    """What the experts of one pool take in host memory.

    Attributes:
        num_experts: of all its layers.
        slab_bytes: of one where every expert of the model is in memory.
        row_bytes: of one where some stay on disk, in a row that files are read into.
        least_rows: with fewer of these a layer step would wait for itself.
    """

    num_experts: int
    slab_bytes: int
    row_bytes: int
    least_rows: int


class PoolShare(NamedTuple):
    """Host memory of one pool: `num_rows` rows of `row_bytes` each, the first `num_pinned` of them pinned."""

    num_rows: int
    num_pinned: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class HostPlan:
    """Where the experts of a model will rest, said before any memory is taken.

    Attributes:
        shares: of each pool.
        holds_all: every expert is in host memory, and nothing is read from disk once the model is loaded.
        disk_bytes: of the experts that are not in host memory at any one time.
        limits: what decided it, for people.
    """

    shares: tuple[PoolShare, ...]
    holds_all: bool
    disk_bytes: int
    limits: str

    @property
    def pinned_bytes(self) -> int:
        """What the GPU copies from by itself."""
        return sum(share.num_pinned * share.row_bytes for share in self.shares)

    @property
    def pageable_bytes(self) -> int:
        """What the driver copies from through memory of its own."""
        return sum((share.num_rows - share.num_pinned) * share.row_bytes for share in self.shares)

    def describe(self) -> str:
        """One line."""
        parts = [f"{format_bytes(self.pinned_bytes)} of pinned host memory"]
        if self.pageable_bytes:
            parts.append(f"{format_bytes(self.pageable_bytes)} of pageable host memory")
        what = "hold all experts" if self.holds_all else f"hold experts, {format_bytes(self.disk_bytes)} stay on disk"
        return f"{' and '.join(parts)} {what} ({self.limits})"


def plan_host(needs: Sequence[PoolNeed], memory: HostMemory, host_bytes: int | None = None) -> HostPlan:
    """How the experts of `needs` are spread over pinned memory, pageable memory and the disk.

    Args:
        host_bytes: of memory that they may take (`tiers.host_bytes`); None: what can be had.

    Raises:
        BudgetError: more is asked for than can be had, or not even the rows of one layer step fit.
    """
    whole_bytes = sum(need.num_experts * need.slab_bytes for need in needs)
    allowed_bytes = memory.usable_bytes
    limits = f"{_free(memory)}{_memlock(memory)}"
    if host_bytes is not None:
        wanted_bytes = min(host_bytes, whole_bytes)
        if wanted_bytes > memory.usable_bytes:
            raise BudgetError(
                f"{format_bytes(wanted_bytes)} of host memory are asked for (tiers.host_bytes), but {_free(memory)}: "
                f"set at most {memory.usable_bytes} bytes, or leave it out; the rest of the experts stays on disk"
            )
        allowed_bytes, limits = wanted_bytes, f"tiers.host_bytes {format_bytes(host_bytes)}; {limits}"
    holds_all = whole_bytes <= allowed_bytes
    rows = [(need.num_experts, need.slab_bytes) for need in needs] if holds_all else _rows(needs, allowed_bytes, limits)
    left_bytes = allowed_bytes if memory.memlock_bytes is None else min(allowed_bytes, memory.memlock_bytes)
    shares = []
    for num_rows, row_bytes in rows:
        num_pinned = min(num_rows, left_bytes // row_bytes)
        left_bytes -= num_pinned * row_bytes
        shares.append(PoolShare(num_rows, num_pinned, row_bytes))
    absent = [(need.num_experts - share.num_rows) * need.slab_bytes for need, share in zip(needs, shares, strict=True)]
    return HostPlan(tuple(shares), holds_all, sum(absent), limits)


def _rows(needs: Sequence[PoolNeed], allowed_bytes: int, limits: str) -> list[tuple[int, int]]:
    """Rows of each pool, in proportion to what it would take, and their bytes."""
    total_bytes = sum(need.num_experts * need.row_bytes for need in needs)
    rows = [min(allowed_bytes * need.num_experts // total_bytes, need.num_experts) for need in needs]
    if any(number < need.least_rows for number, need in zip(rows, needs, strict=True)):
        # The smallest sum whose shares are large enough, or that holds everything.
        least_bytes = max(-(-need.least_rows * total_bytes // need.num_experts) for need in needs)
        least_bytes = min(least_bytes, sum(need.num_experts * need.slab_bytes for need in needs))
        sums = " + ".join(f"{need.least_rows} rows of {format_bytes(need.row_bytes)}" for need in needs)
        raise BudgetError(
            f"{format_bytes(allowed_bytes)} of host memory do not hold the experts of one layer step ({sums}, which "
            f"takes {least_bytes} bytes in all; {limits}): free memory, raise tiers.host_bytes, or compute on the CPU"
        )
    return [(number, need.row_bytes) for number, need in zip(rows, needs, strict=True)]


def _free(memory: HostMemory) -> str:
    return f"{format_bytes(memory.available_bytes)} are free, {format_bytes(memory.kept_bytes)} of them kept so"


def _memlock(memory: HostMemory) -> str:
    limit = memory.memlock_bytes
    return "" if limit is None else f", RLIMIT_MEMLOCK {format_bytes(limit)}"
