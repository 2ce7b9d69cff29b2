"""Disk to host memory to GPU: rows of host memory hold some of the experts, and slots are filled from these.

A load of an expert that is in host memory goes straight to the copies. Else a row is decided on, by the host's own
residency, read from disk, and then copied from. A row is leased from the decision until every copy out of it has
really ended, not just been waited for on the device; what finds no row waits for one. There is no thread here: what the
disk has brought is handed to the copies in whichever call comes next.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from runtime.errors import TransferError
from runtime.transfer.base import Transfer, TransferStats
from runtime.transfer.cuda import CudaTransfer
from runtime.transfer.disk import DiskTransfer
from runtime.transfer.host_rows import HostRows
from runtime.transfer.queue import LoadQueue, LoadState, QueuedLoad
from runtime.vocabulary import Load, LoadReason


@dataclass(eq=False, slots=True)
class _Climb:
    """A load on its way, in up to four stages: it waits for a row, for the read that fills the row (where one does, it
    is in `TieredTransfer._reads`), for its turn among the copies into its slot, and for its own copy to end.

    Attributes:
        is_new: no row was looked for so far: the host's policy has not heard of it.
        has_row: it leases the row of its expert, which holds that expert unless it is being read.
        copy: out of that row; None: not handed over to the copies.
    """

    load: QueuedLoad
    is_new: bool = True
    has_row: bool = False
    copy: QueuedLoad | None = None

    @property
    def expert(self) -> int:
        return self.load.expert


class TieredTransfer(Transfer):
    """Loads from disk, by way of `rows`, into the slots of a GPU.

    `stats().num_loads`, `num_bytes` and `busy_s` are those of the copies; what the disk brought is counted beside them.
    `stall_s` is the time that the compute stream waited for copies, and that the host blocked until one could begin.

    Args:
        rows: host memory. disk: reads into its arena. copies: from there into `num_slots` slots.
        describe: names an expert for messages.
    """

    def __init__(
        self,
        rows: HostRows,
        disk: DiskTransfer,
        copies: CudaTransfer,
        num_slots: int,
        describe: Callable[[int], str] = "expert {}".format,
    ) -> None:
        self._disk, self._copies, self._num_slots, self._describe = disk, copies, num_slots, describe
        self._residency, self._num_experts = rows.residency, rows.num_experts
        self._queue = LoadQueue()  # every load has one piece, taken when its read or its copy has begun
        self._climbs: dict[QueuedLoad, _Climb] = {}  # loads that have not ended, in the order of their submission
        self._reads: dict[int, QueuedLoad] = {}  # of experts whose rows are being filled
        self._late: TransferError | None = None  # of a load that was said to be ready
        self._stall_s, self._is_closed = 0.0, False

    @property
    def now_s(self) -> float:
        """See `Transfer.now_s`."""
        return time.perf_counter()

    def fill(self, experts: Sequence[int]) -> None:
        """Read the first of `experts` into the rows that are free; called before anything else.

        Raises:
            TransferError: one cannot be read.
        """
        residency = self._residency
        for layer in range(residency.num_layers):
            own = [expert for expert in experts if expert // self._num_experts == layer][: residency.num_free]
            if own:
                plan = residency.plan(layer, own, [1] * len(own), 1, first=False)
                self._disk.submit(plan.loads)
        waiting = residency.resident()
        while waiting:
            arrived = self._disk.wait_any(waiting)
            residency.complete(arrived)
            residency.release(arrived)
            waiting = [expert for expert in waiting if expert not in arrived]
        self._disk.reset_stats()

    def submit(self, loads: Sequence[Load]) -> None:
        """See `Transfer.submit`."""
        if self._is_closed:
            raise ValueError("the transfer is closed")
        self._advance()
        self._raise_late()
        for load in loads:
            if not 0 <= load.slot < self._num_slots:
                raise IndexError(f"slot {load.slot} of {self._num_slots}")
        for load in loads:
            earlier = self._queue.in_slot(load.slot)
            if earlier in self._climbs:
                self._take_back(self._climbs[earlier])
        formers = [self._climb_of(load.expert) for load in loads]
        self._queue.put(loads, lambda _: 1)
        self._forget_cancelled()
        for load, former in zip(loads, formers, strict=True):
            queued = self._queue.find(load.expert)
            assert queued is not None
            self._climbs[queued] = climb = _Climb(queued)
            if former is not None and former.load in self._climbs and former.copy is None:
                self._inherit(climb, former)
        self._find_rows()
        self._hand_over()

    def promote(self, expert: int) -> None:
        """See `Transfer.promote`."""
        climb = self._climb_of(expert)
        if climb is not None:
            self._queue.promote(expert)
            climb.load.reason = LoadReason.DEMAND  # if it has begun: for its copy
            self._disk.promote(expert)
            self._copies.promote(expert)

    def cancel(self, expert: int) -> bool:
        """See `Transfer.cancel`."""
        climb = self._climb_of(expert)
        if climb is None or not self._take_back(climb):
            return False
        is_cancelled = self._queue.cancel(expert)
        self._forget_cancelled()
        return is_cancelled

    def is_ready(self, expert: int) -> bool:
        """See `Transfer.is_ready`."""
        self._advance()
        climb, load = self._climb_of(expert), self._queue.find(expert)
        if climb is None:
            return load is not None and load.state is LoadState.READY
        return climb.copy is not None and self._copies.is_ready(expert)

    def has_failed(self, expert: int) -> bool:
        """See `Transfer.has_failed`."""
        self._advance()
        load = self._queue.find(expert)
        return load is not None and load.has_failed

    def is_filling(self, slot: int) -> bool:
        """See `Transfer.is_filling`. A read that was given up writes into a row, and into no slot."""
        self._advance()
        own = [climb for climb in self._climbs.values() if climb.load.slot == slot]
        reads = [self._reads.get(climb.expert) for climb in own if climb.has_row]
        return any(map(_has_begun, (*(climb.load for climb in own), *(climb.copy for climb in own), *reads)))

    def wait_any(self, experts: Collection[int]) -> list[int]:
        """See `Transfer.wait_any`. Blocks only where none of `experts` is in host memory, until one is.

        Raises ValueError when none of `experts` is being loaded.
        """
        self._advance()
        while True:
            self._raise_late()
            near = set(self._queue.ready(experts, self._describe))  # raises where one has failed
            climbs = [climb for climb in map(self._climb_of, experts) if climb is not None]
            near.update(climb.expert for climb in climbs if climb.copy is not None)
            if near:
                return self._copies.wait_any([expert for expert in experts if expert in near])
            with self._stalling():
                self._bring_nearer(climbs)

    def drain(self) -> None:
        """See `Transfer.drain`."""
        for climb in list(self._climbs.values()):
            self._take_back(climb)
        self._queue.cancel_queued()
        self._forget_cancelled()
        while True:
            copies = [climb.copy for climb in self._climbs.values() if climb.copy is not None]
            for copy in copies:
                self._copies.land(copy)
            if copies:
                self._advance()
            elif self._reads:
                with contextlib.suppress(TransferError):  # given up: what was under way has failed
                    self._bring_nearer(list(self._climbs.values()))
            else:
                return

    def recover(self) -> None:
        """See `Transfer.recover`. Nothing is held in the rows any more."""
        self._copies.recover()
        self._forget_cancelled()
        for expert, read in list(self._reads.items()):
            if read.state is LoadState.CANCELLED:
                del self._reads[expert]
        self.drain()
        for climb in list(self._climbs.values()):
            self._end(climb, "interrupted")
        self._residency.void_leases()
        for expert in self._residency.resident():
            if self._residency.is_loading(expert):  # for nobody
                self._disk.cancel(expert)
                self._lose_row(expert)

    def stats(self) -> TransferStats:
        """See `Transfer.stats`."""
        found, disk = self._copies.stats(), self._disk.stats()
        found.num_cancelled, found.num_failed_loads = self._queue.num_cancelled, self._queue.num_failed
        found.stall_s += self._stall_s
        found.num_retries = disk.num_retries
        found.num_disk_loads, found.num_disk_bytes, found.disk_busy_s = disk.num_loads, disk.num_bytes, disk.busy_s
        return found

    def reset_stats(self) -> None:
        """See `Transfer.reset_stats`."""
        self._copies.reset_stats()
        self._disk.reset_stats()
        self._queue.num_cancelled = self._queue.num_failed = 0
        self._stall_s = 0.0

    def close(self) -> None:
        """See `Transfer.close`."""
        if not self._is_closed:
            self.drain()
            self._is_closed = True
            self._copies.close()
            self._disk.close()

    def _climb_of(self, expert: int) -> _Climb | None:
        load = self._queue.find(expert)
        return None if load is None else self._climbs.get(load)

    def _inherit(self, climb: _Climb, former: _Climb) -> None:
        """Go on with what a load of the same expert into another slot has begun, which nobody wants there any more."""
        climb.is_new, climb.has_row = former.is_new, former.has_row
        self._end(former, "")
        self._queue.num_cancelled += 1
        if climb.load.reason is LoadReason.DEMAND:
            self._disk.promote(climb.expert)

    def _advance(self) -> None:
        """Take note of what has ended, and start what that has made room for."""
        if self._is_closed:
            return
        self._to_copies(())
        self._readmit_rows()
        if self._climbs:
            self._end_copies()
            self._end_reads()
            self._find_rows()
            self._hand_over()

    def _end_copies(self) -> None:
        for climb in list(self._climbs.values()):
            if climb.copy is not None and climb.copy.has_ended:
                self._end(climb, climb.copy.error)
                self._residency.release([climb.expert])

    def _end_reads(self) -> None:
        for expert, read in list(self._reads.items()):
            if read.state is LoadState.READY:
                del self._reads[expert]
                self._residency.complete([expert])
            elif read.has_failed:
                self._lose_row(expert)
                if (climb := self._climb_of(expert)) is not None:
                    self._end(climb, read.error)

    def _end(self, climb: _Climb, error: str) -> None:
        del self._climbs[climb.load]
        self._queue.take_rest(climb.load)
        self._queue.finish(climb.load, error)

    def _lose_row(self, expert: int) -> None:
        """Free the row of an expert that does not arrive; nobody may use it while something may write into it."""
        row = self._residency.slot_of(expert)
        self._reads.pop(expert, None)
        self._residency.drop(expert)
        if self._disk.is_filling(row):
            self._residency.withhold(row)

    def _readmit_rows(self) -> None:
        for row in tuple(self._residency.withheld):
            if not self._disk.is_filling(row):
                self._residency.readmit(row)

    def _find_rows(self) -> None:
        """Lease a row for every load that has none, demand first, as far as there are rows; read what is not there."""
        for reason in LoadReason:
            groups: dict[tuple[int, bool], dict[int, _Climb]] = {}
            for climb in self._climbs.values():
                if not climb.has_row and climb.load.reason is reason:
                    layer = climb.expert // self._num_experts
                    groups.setdefault((layer, climb.is_new), {})[climb.expert] = climb
            for (layer, is_new), group in groups.items():
                rest = self._lease(layer, group, is_new=is_new)
                while rest and reason is LoadReason.DEMAND and self._reclaim():
                    rest = self._lease(layer, rest, is_new=False)

    def _lease(self, layer: int, group: dict[int, _Climb], *, is_new: bool) -> dict[int, _Climb]:
        """Rows for experts of a layer, of which the host's policy hears where they are new; those that got none."""
        plan = self._residency.plan(layer, list(group), [1] * len(group), 1, first=is_new)
        for climb in group.values():
            climb.is_new, climb.has_row = False, climb.expert not in plan.deferred
        reads = [Load(expert, row, group[expert].load.reason) for expert, row, _ in plan.loads]
        if reads:
            self._disk.submit(reads)
        for expert, _, _ in reads:
            read = self._disk.find(expert)
            assert read is not None
            self._reads[expert] = read
        return {expert: group[expert] for expert in plan.deferred}

    def _reclaim(self) -> bool:
        """Take its row from the last prefetch that has not begun; False where there is none."""
        ahead = [one for one in self._climbs.values() if one.load.reason is LoadReason.PREFETCH and one.has_row]
        return any(self._take_back(climb) for climb in reversed(ahead))

    def _take_back(self, climb: _Climb) -> bool:
        """Undo what was done for a load and free its row, if nothing of it has begun; whether that is so."""
        if climb.load.state is not LoadState.QUEUED or not self._undo(climb):
            self._queue.take_rest(climb.load)  # it has begun: whoever drops what is queued is to leave it
            return False
        had_row, climb.has_row, climb.copy = climb.has_row, False, None
        if had_row and climb.expert in self._reads:
            self._lose_row(climb.expert)
        elif had_row:
            self._residency.release([climb.expert])
        return True

    def _undo(self, climb: _Climb) -> bool:
        """Cancel its copy or its read; False where that has begun."""
        if climb.copy is not None:
            return self._copies.find(climb.expert) is climb.copy and self._copies.cancel(climb.expert)
        if climb.has_row and climb.expert in self._reads:
            return self._disk.cancel(climb.expert)
        return True

    def _forget_cancelled(self) -> None:
        for load in [load for load in self._climbs if load.state is LoadState.CANCELLED]:
            del self._climbs[load]

    def _hand_over(self) -> None:
        """Copy from the rows that are filled, demand first, the loads of each slot in their order."""
        ready: list[_Climb] = []
        last: dict[int, _Climb] = {}  # by slot
        for climb in self._climbs.values():
            before = last.get(climb.load.slot)
            last[climb.load.slot] = climb
            is_filled = climb.has_row and climb.copy is None and climb.expert not in self._reads
            # Where the copy before it has begun, the device keeps the order.
            if is_filled and (before is None or _has_begun(before.copy)):
                ready.append(climb)
        for reason in LoadReason:
            if batch := [climb for climb in ready if climb.load.reason is reason]:
                self._to_copies([Load(climb.expert, climb.load.slot, reason) for climb in batch])
                for climb in batch:
                    climb.copy = self._copies.find(climb.expert)

    def _to_copies(self, loads: Sequence[Load]) -> None:
        """Submit `loads`; what that says of earlier ones is kept for who may be told."""
        while True:
            try:
                return self._copies.submit(loads)
            except TransferError as error:
                self._late = error

    def _raise_late(self) -> None:
        error, self._late = self._late, None
        if error is not None:
            raise error

    def _bring_nearer(self, climbs: Sequence[_Climb]) -> None:
        """Block until something has ended that one of `climbs`, of which none can be copied yet, waits for.

        Raises:
            TransferError: nothing moves any more, or nothing is left to wait for.
        """
        first: dict[int, _Climb] = {}  # by slot: the load that has to go first
        for one in self._climbs.values():
            first.setdefault(one.load.slot, one)
        firsts = [first[climb.load.slot] for climb in climbs]
        copies = [one.copy for one in firsts if one.copy is not None]
        reads = [one.expert for one in firsts if one.has_row and one.expert in self._reads]
        if not copies and not reads:  # they wait for a row: any that comes free
            copies = [one.copy for one in self._climbs.values() if one.copy is not None]
            reads = list(self._reads)
        if copies:
            self._copies.land(copies[0])
        elif reads:
            self._await_disk(reads)
        else:
            raise TransferError("no row of host memory is left: reads into them have not returned; check the disk")
        self._advance()

    def _await_disk(self, experts: Sequence[int]) -> None:
        try:
            self._disk.wait_any(experts)
        except TransferError:
            if not any(self._reads[expert].has_failed for expert in experts):
                self._advance()  # others have failed
                raise

    @contextlib.contextmanager
    def _stalling(self) -> Iterator[None]:
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self._stall_s += time.perf_counter() - began_s


def _has_begun(load: QueuedLoad | None) -> bool:
    return load is not None and load.state is not LoadState.QUEUED
