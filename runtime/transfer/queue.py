"""The order of loads: demand before prefetch, first come first served inside, one load at a time per slot.

Pure bookkeeping: no lock, no clock, no I/O. A load is handed out in pieces, so that several threads can share it and so
that a demand load overtakes, at the next piece, a prefetch that is half read.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from runtime.errors import TransferError
from runtime.vocabulary import Load, LoadReason


class LoadState(enum.IntEnum):
    """Where a load is in its life; from READY on it has ended.

    GIVEN_UP: it has failed, but a read for it has not returned and may still write into its slot.
    """

    QUEUED = 0
    UNDER_WAY = 1
    GIVEN_UP = 2
    READY = 3
    FAILED = 4
    CANCELLED = 5


@dataclass(eq=False, slots=True)
class QueuedLoad:
    """One load. `after` is the load that must leave the slot first; `error` says why the load failed."""

    expert: int
    slot: int
    reason: LoadReason
    num_pieces: int
    num_taken: int = 0
    num_done: int = 0
    state: LoadState = LoadState.QUEUED
    after: QueuedLoad | None = None
    error: str = ""

    @property
    def has_failed(self) -> bool:
        """True when it will not be ready any more."""
        return self.state in (LoadState.FAILED, LoadState.GIVEN_UP)

    @property
    def has_ended(self) -> bool:
        """True when nobody reads for this load any more."""
        return self.state >= LoadState.READY

    @property
    def is_filling(self) -> bool:
        """True when somebody may be reading for it."""
        return self.state in (LoadState.UNDER_WAY, LoadState.GIVEN_UP)


@dataclass(slots=True)
class LoadQueue:
    """Loads by the time and the reason of their submission, and the last load of every expert and slot."""

    num_cancelled: int = 0
    num_failed: int = 0
    num_given_up: int = 0  # and whose reads have not returned
    under_way: dict[QueuedLoad, None] = field(default_factory=dict)
    _by_expert: dict[int, QueuedLoad] = field(default_factory=dict)
    _by_slot: dict[int, QueuedLoad] = field(default_factory=dict)
    _waiting: tuple[dict[QueuedLoad, None], dict[QueuedLoad, None]] = field(default_factory=lambda: ({}, {}))

    def put(self, loads: Sequence[Load], num_pieces: Callable[[int], int]) -> None:
        """Queue `loads`; a load that is still queued for one of their slots is cancelled."""
        for expert, slot, reason in loads:
            earlier = self._by_slot.get(slot)
            new = QueuedLoad(expert, slot, reason, num_pieces(expert))
            if earlier is not None:
                new.after = earlier if earlier.is_filling else earlier.after
                self._drop(earlier)
            self._by_expert[expert] = self._by_slot[slot] = new
            self._waiting[reason][new] = None

    def find(self, expert: int) -> QueuedLoad | None:
        """The last load of `expert`, whatever became of it."""
        return self._by_expert.get(expert)

    def in_slot(self, slot: int) -> QueuedLoad | None:
        """The last load of `slot`, whatever became of it."""
        return self._by_slot.get(slot)

    def is_filling(self, slot: int) -> bool:
        """True while a load of `slot` may be writing into it."""
        load = self._by_slot.get(slot)
        return load is not None and (load.is_filling or (load.after is not None and load.after.is_filling))

    def ready(
        self, experts: Collection[int], describe: Callable[[int], str], also: Collection[QueuedLoad] = ()
    ) -> list[int]:
        """Those of `experts` that are ready, or whose load is one of `also`, in the order given.

        Raises:
            TransferError: the load of one of them failed. ValueError: none of them is being loaded.
        """
        found, is_coming = [], False
        for expert in experts:
            load = self.find(expert)
            if load is None or load.state is LoadState.CANCELLED:
                continue
            if load.has_failed:
                raise TransferError(f"{describe(expert)} (number {expert}): {load.error}")
            if load.state is LoadState.READY or load in also:
                found.append(expert)
            is_coming = True
        if not is_coming:
            raise ValueError(f"none of the experts {sorted(experts)} is being loaded: submit them first")
        return found

    @property
    def has_waiting(self) -> bool:
        """True when a piece is still to be taken, now or later."""
        return any(self._waiting)

    @property
    def demanded(self) -> list[QueuedLoad]:
        """Demand loads of which a piece is still to be taken."""
        return list(self._waiting[LoadReason.DEMAND])

    def promote(self, expert: int) -> None:
        """Move what is left of a prefetch behind the queued demand loads."""
        load = self._by_expert.get(expert)
        if load is not None and load in self._waiting[LoadReason.PREFETCH]:
            del self._waiting[LoadReason.PREFETCH][load]
            load.reason = LoadReason.DEMAND
            self._waiting[LoadReason.DEMAND][load] = None

    def cancel(self, expert: int) -> bool:
        """Drop the load of `expert` if no piece of it was taken."""
        load = self._by_expert.get(expert)
        return load is not None and self._drop(load)

    def cancel_queued(self) -> None:
        """Drop every load of which no piece was taken."""
        for load in [load for waiting in self._waiting for load in waiting]:
            self._drop(load)

    def take(self) -> tuple[QueuedLoad, int] | None:
        """The next piece to read, as its load and its number in it; None when there is none now."""
        for waiting in self._waiting:
            for load in waiting:
                if load.after is None or load.after.has_ended:
                    return load, self._take_from(load)
        return None

    def take_rest(self, load: QueuedLoad) -> range:
        """Take every piece of a load that waits, whether it is its turn or not; their numbers in it."""
        first = load.num_taken
        if first < load.num_pieces:
            load.num_taken = load.num_pieces - 1
            self._take_from(load)
        return range(first, load.num_taken)

    def finish(self, load: QueuedLoad, error: str = "", num_pieces: int = 1) -> bool:
        """Note that pieces were read, or why they could not be; True when the load has ended with them."""
        load.num_done += num_pieces
        if error:
            self._fail(load, error)
        return self._end(load)

    def give_up(self, error: str) -> None:
        """Fail every load under way, whether or not its reads return."""
        for load in list(self.under_way):
            self._fail(load, error)
            if not self._end(load):
                load.state = LoadState.GIVEN_UP
                self.num_given_up += 1
        self.under_way.clear()

    def _fail(self, load: QueuedLoad, error: str) -> None:
        """Take no further piece of a load."""
        if not load.error:
            load.error, load.num_pieces = error, load.num_taken
            self._waiting[load.reason].pop(load, None)
            self.num_failed += 1

    def _end(self, load: QueuedLoad) -> bool:
        """Note that a load has ended if nothing of it is left to read."""
        if load.num_done < load.num_pieces:
            return False
        self.under_way.pop(load, None)
        self.num_given_up -= load.state is LoadState.GIVEN_UP
        load.state = LoadState.FAILED if load.error else LoadState.READY
        return True

    def _take_from(self, load: QueuedLoad) -> int:
        if load.state is LoadState.QUEUED:
            load.state, load.after = LoadState.UNDER_WAY, None
            self.under_way[load] = None
        load.num_taken += 1
        if load.num_taken == load.num_pieces:
            del self._waiting[load.reason][load]
        return load.num_taken - 1

    def _drop(self, load: QueuedLoad) -> bool:
        if load.state is not LoadState.QUEUED:
            return False
        del self._waiting[load.reason][load]
        load.state = LoadState.CANCELLED
        self.num_cancelled += 1
        return True
