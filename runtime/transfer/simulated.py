"""A transfer on a virtual clock: one link, a fixed time per load. The simulator replays traces through it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from runtime.transfer.base import Transfer, TransferStats
from runtime.transfer.queue import LoadQueue, LoadState, QueuedLoad
from runtime.vocabulary import Load

COLD_LOADS = 8
"""Loads after the link was idle that may take longer: neither it nor who waits for it is at speed yet."""


class SimulatedTransfer(Transfer):
    """Loads experts in virtual time, one after another; nothing is moved, nothing ever fails.

    Args:
        load_s: virtual seconds that the link is busy with one expert.
        load_bytes: bytes that `stats().num_bytes` counts per load.
        slowdown: computing takes that much longer, as a share, while a load is under way.
        cold_s: what each of the first `COLD_LOADS` loads takes in addition.
    Only `advance`, `wait_any` and `drain` move its clock.

    Attributes:
        num_cold: loads that ended and were cold, since the start.
    """

    def __init__(self, load_s: float, load_bytes: int = 0, slowdown: float = 0.0, cold_s: float = 0.0) -> None:
        if min(load_s, load_bytes, slowdown, cold_s) < 0:
            raise ValueError(
                f"{load_s} and {cold_s} s and {load_bytes} bytes a load, slowdown {slowdown}: all must be 0 or more"
            )
        self._now_s = 0.0
        self._load_s, self._load_bytes, self._stretch = load_s, load_bytes, 1.0 + slowdown
        self._cold_s, self._num_since_idle, self.num_cold = cold_s, 0, 0
        self._queue = LoadQueue()
        self._current: QueuedLoad | None = None
        self._started_s = 0.0
        self._stats = TransferStats()
        self._busy_since_s = 0.0
        self._is_closed = False

    @property
    def now_s(self) -> float:
        """See `Transfer.now_s`: the virtual time."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let the caller compute for `seconds` (0 or more) while the link goes on; longer where that slows it down."""
        if seconds < 0:
            raise ValueError(f"time cannot go back by {-seconds} s")
        until_s = self._now_s + (seconds if self._current is None else seconds * self._stretch)
        while self._current is not None and self._end_s <= until_s:
            ended_s = self._end_s
            self._end_current()
            if self._current is None and self._stretch > 1.0:  # nothing starts before the caller comes back
                until_s = ended_s + (until_s - ended_s) / self._stretch
        self._now_s = until_s

    def submit(self, loads: Sequence[Load]) -> None:
        """See `Transfer.submit`. An idle link starts on the first of `loads` at once."""
        if self._is_closed:
            raise ValueError("the transfer is closed")
        self._queue.put(loads, lambda _: 1)
        if self._current is None:
            self._num_since_idle = 0
            self._start_next(self._now_s)

    def promote(self, expert: int) -> None:
        """See `Transfer.promote`."""
        self._queue.promote(expert)

    def cancel(self, expert: int) -> bool:
        """See `Transfer.cancel`."""
        return self._queue.cancel(expert)

    def is_ready(self, expert: int) -> bool:
        """See `Transfer.is_ready`."""
        load = self._queue.find(expert)
        return load is not None and load.state is LoadState.READY

    def has_failed(self, expert: int) -> bool:
        """See `Transfer.has_failed`."""
        return False

    def is_filling(self, slot: int) -> bool:
        """See `Transfer.is_filling`."""
        return self._queue.is_filling(slot)

    def wait_any(self, experts: Collection[int]) -> list[int]:
        """See `Transfer.wait_any`. Moves `now_s` to the earliest end of a load among `experts`."""
        ready = [expert for expert in experts if self.is_ready(expert)]
        began_s = self._now_s
        while not ready:
            if self._current is None:
                raise ValueError(f"none of the experts {sorted(experts)} is being loaded: submit them first")
            self._end_current()
            ready = [expert for expert in experts if self.is_ready(expert)]
        self._stats.stall_s += self._now_s - began_s
        return ready

    def drain(self) -> None:
        """See `Transfer.drain`. Moves `now_s` to the end of the load under way."""
        self._queue.cancel_queued()
        if self._current is not None:
            self._end_current()

    def stats(self) -> TransferStats:
        """See `Transfer.stats`."""
        s = self._stats
        under_way_s = self._now_s - self._busy_since_s if self._current is not None else 0.0
        cancelled = self._queue.num_cancelled
        return TransferStats(s.num_loads, s.num_bytes, cancelled, s.busy_s + under_way_s, s.stall_s)

    def reset_stats(self) -> None:
        """See `Transfer.reset_stats`."""
        self._stats, self._queue.num_cancelled = TransferStats(), 0
        self._busy_since_s = self._now_s

    def close(self) -> None:
        """See `Transfer.close`."""
        self.drain()
        self._is_closed = True

    @property
    def _end_s(self) -> float:
        return self._started_s + self._load_s + (self._cold_s if self._is_cold else 0.0)

    @property
    def _is_cold(self) -> bool:
        return self._num_since_idle <= COLD_LOADS

    def _start_next(self, at_s: float) -> None:
        taken = self._queue.take()
        self._current = taken[0] if taken is not None else None
        self._started_s = self._busy_since_s = at_s
        if taken is not None:
            self._num_since_idle += 1
            self._stats.num_bytes += self._load_bytes

    def _end_current(self) -> None:
        assert self._current is not None
        self._now_s = max(self._now_s, self._end_s)
        self._queue.finish(self._current)
        self._stats.num_loads += 1
        self.num_cold += self._is_cold
        self._stats.busy_s += self._end_s - self._busy_since_s
        self._start_next(self._end_s)
