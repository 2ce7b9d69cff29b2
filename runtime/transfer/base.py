"""The contract of a transfer: it acts on what the cache decided, and never decides itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from runtime.vocabulary import Load


@dataclass(slots=True)
class TransferStats:
    """Counters since the last reset. `num_bytes` counts bytes asked of the medium, alignment included.

    `busy_s` is the time in which at least one read was under way, `stall_s` the time that `wait_any` blocked its
    caller. `num_retries` counts reads that were tried again, `num_failed_loads` loads that failed for all that.

    Where experts come through a further tier, the medium is the last one on their way, and what the disk brought into
    the tier before it is counted as `num_disk_loads`, `num_disk_bytes` and `disk_busy_s`; else these are 0.
    """

    num_loads: int = 0
    num_bytes: int = 0
    num_cancelled: int = 0
    busy_s: float = 0.0
    stall_s: float = 0.0
    num_retries: int = 0
    num_failed_loads: int = 0
    num_disk_loads: int = 0
    num_disk_bytes: int = 0
    disk_busy_s: float = 0.0


class Transfer(ABC):
    """Moves experts into slots. The engine's thread is the only caller; a transfer has threads or streams of its own.

    Ownership: from `submit` until the load is ready or cancelled, the slot's memory belongs to the transfer. The caller
    guarantees that nobody computes with a slot that it submits a load for.
    """

    @property
    @abstractmethod
    def now_s(self) -> float:
        """Seconds on the clock of `stats`; only differences mean anything."""

    @abstractmethod
    def submit(self, loads: Sequence[Load]) -> None:
        """Queue `loads`, in order, demand before every queued prefetch. Returns at once. Demand may all be started at
        once.

        If an earlier load is queued for one of the slots it is cancelled; if one is under way, the new load starts
        after it has ended. Loads of one call for the same slot, or an expert that is already queued, are caller's bugs.

        Raises:
            TransferError: a load of which `wait_any` or `is_ready` said that it is ready failed for all that, and what
                was computed with it may be wrong; said once, and `loads` are not queued. See `has_failed`.
        """

    @abstractmethod
    def promote(self, expert: int) -> None:
        """Treat the load of `expert` as demand from now on. No effect when it is not queued."""

    @abstractmethod
    def cancel(self, expert: int) -> bool:
        """Drop the load of `expert` if it has not started; True when it was dropped."""

    @abstractmethod
    def is_ready(self, expert: int) -> bool:
        """True when the last load of `expert` has ended well (and for ever after, until it is submitted again), or when
        the device will wait for it, see `submit`."""

    @abstractmethod
    def has_failed(self, expert: int) -> bool:
        """True when the last load of `expert` failed or was given up; it can be submitted again."""

    @abstractmethod
    def is_filling(self, slot: int) -> bool:
        """True while something may still write into `slot`: a load of it is under way, or was given up before its
        read returned. A load that is submitted for it meanwhile does not start."""

    @abstractmethod
    def wait_any(self, experts: Collection[int]) -> list[int]:
        """Block until at least one of `experts` is ready; return all of them that are, in the order given.

        Raises:
            TransferError: the load of one of `experts` failed, or one that was said to be ready; or nothing moves any
                more: then what is under way is given up. They can be submitted again, into slots that are not
                `is_filling`.
        """

    @abstractmethod
    def drain(self) -> None:
        """Cancel what is queued and block until nothing is under way, or nothing moves any more: then what is under way
        is given up. The transfer stays usable."""

    def recover(self) -> None:
        """`drain` after an interrupt, which may have come anywhere: what it left half done is given up, too."""
        self.drain()

    @abstractmethod
    def stats(self) -> TransferStats:
        """A copy of the counters since the last `reset_stats`."""

    @abstractmethod
    def reset_stats(self) -> None:
        """Set all counters to zero."""

    @abstractmethod
    def close(self) -> None:
        """Drain, stop the threads and release files. Idempotent."""
