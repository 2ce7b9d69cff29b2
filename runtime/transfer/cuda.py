"""Host memory to GPU: experts copied on streams of their own, ordered against the computation by events alone.

The host waits for nothing here but in `drain`. Two rules keep a slot's content right, whatever the streams do:
a copy into a slot starts after everything that was enqueued on the compute stream when the load was submitted (so after
every kernel that reads what the slot held), and what is computed after `wait_any` starts after the copy has ended.

Demand is copied at once, whole: the link never waits for the host while something is needed. A prefetch is copied piece
by piece and only as long as little is under way, because what is enqueued on a stream cannot be overtaken any more.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from runtime.errors import TransferError
from runtime.transfer.base import Transfer, TransferStats
from runtime.transfer.queue import LoadQueue, LoadState, QueuedLoad
from runtime.vocabulary import Load


class Lane(enum.IntEnum):
    """A stream of the device; the values of the copying ones are those of `LoadReason`."""

    DEMAND = 0
    PREFETCH = 1
    COMPUTE = 2


_LANES = (Lane.DEMAND, Lane.PREFETCH)  # by `LoadReason`

Event = Any
"""Made by `Streams.new_event`; recording it again does not touch what waits for it already."""


class Streams(Protocol):
    """What the transfer asks of a device. Nothing but `synchronize` and `finish` blocks; every method may raise
    RuntimeError.

    Attributes:
        num_bytes: of one expert as it is copied.
    """

    num_bytes: int

    def new_event(self) -> Event:
        """A timed event that has not been recorded: it counts as done."""

    def record(self, event: Event, lane: Lane) -> None:
        """`event` is done once everything that was enqueued on `lane` before has ended."""

    def wait(self, event: Event, lane: Lane) -> None:
        """What is enqueued on `lane` from now on starts after the event as it was recorded last."""

    def copy(self, lane: Lane, expert: int, slot: int, start: int, num_bytes: int) -> None:
        """Copy bytes `start` to `start + num_bytes` of an expert to the same place of a slot."""

    def is_done(self, event: Event) -> bool:
        """Whether the event has happened since it was recorded last."""

    def synchronize(self, event: Event) -> None:
        """Block until it has."""

    def finish(self) -> None:
        """Block until every copy has ended, also one that no event was recorded behind."""

    def elapsed_s(self, begin: Event, end: Event) -> float:
        """Seconds between two events that have happened; negative when `end` was first."""

    def close(self) -> None:
        """Wait for everything and give the memory back. Idempotent."""


@dataclass(eq=False, slots=True)
class _Flight:
    """Pieces of a load that were enqueued in one copy.

    `begin` is None behind another copy on the same lane. `wanted` is recorded where the compute stream waits for it.
    """

    load: QueuedLoad
    num_pieces: int
    num_bytes: int
    number: int
    begin: Event | None
    end: Event
    wanted: Event | None = None


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _alone(method: Callable[Concatenate[CudaTransfer, _P], _R]) -> Callable[Concatenate[CudaTransfer, _P], _R]:
    """One thread at a time: counters are asked for by others than the engine's, and asking takes note of what ended."""

    @wraps(method)
    def call(transfer: CudaTransfer, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with transfer._lock:
            return method(transfer, *args, **kwargs)

    return call


class CudaTransfer(Transfer):
    """Copies experts from host memory into slots of a GPU.

    An expert is *ready* when what is enqueued on the compute stream from now on finds it in its slot: its copy has
    ended, or `wait_any` has made the compute stream wait for it; should that copy fail, the next call of `submit` or
    `wait_any` raises. `stats().stall_s` is the time in which the compute
    stream waited, `busy_s` that in which a copy was under way; both by events, told once these have happened.

    Args:
        streams: the device. num_slots: that it has.
        describe: names an expert for messages.
        piece_bytes: a prefetch can be overtaken after so many bytes; each piece costs the host a copy and its events.
        window_bytes: while so much is under way no prefetch is enqueued. Enough to keep the link busy from one call of
            this object to the next.
    """

    def __init__(
        self,
        streams: Streams,
        num_slots: int,
        describe: Callable[[int], str] = "expert {}".format,
        piece_bytes: int = 2 << 20,
        window_bytes: int = 32 << 20,
    ) -> None:
        if piece_bytes < 1 or window_bytes < 1:
            raise ValueError(f"pieces of {piece_bytes} bytes, {window_bytes} under way: both must be above 0")
        self._streams, self._num_slots, self._describe = streams, num_slots, describe
        self._num_pieces = -(-streams.num_bytes // piece_bytes)
        self._piece_bytes, self._window_bytes = piece_bytes, window_bytes
        self._queue = LoadQueue()
        self._flights: tuple[deque[_Flight], deque[_Flight]] = (deque(), deque())
        self._under_way: dict[QueuedLoad, list[_Flight]] = {}  # loads that have begun and not ended: copies not done
        self._awaited: set[QueuedLoad] = set()  # of these, those that the compute stream waits for
        self._events: list[Event] = []
        self._gate = streams.new_event()
        self._is_gated = [True, True]  # per copying lane: it waits for the gate already
        self._last_end: Event | None = None
        self._num_flights = self._bytes_under_way = 0
        self._stats, self._is_closed = TransferStats(), False
        self._no_gate = ""  # why it could not be recorded last
        self._late_error = ""  # of a load that was said to be ready
        self._lock = threading.RLock()
        weakref.finalize(self, streams.close).atexit = False

    @property
    def now_s(self) -> float:
        """See `Transfer.now_s`."""
        return time.perf_counter()

    def submit(self, loads: Sequence[Load]) -> None:
        """See `Transfer.submit`. Where nothing is submitted and nothing is under way, the device is asked nothing."""
        if loads or self._under_way or self._late_error or self._is_closed or self._queue.has_waiting:
            self._submit(loads)

    @_alone
    def _submit(self, loads: Sequence[Load]) -> None:
        if self._is_closed:
            raise ValueError("the transfer is closed")
        self._harvest()
        self._raise_late()
        if not loads:
            self._pump()
            return
        for load in loads:
            if not 0 <= load.slot < self._num_slots:
                raise IndexError(f"slot {load.slot} of {self._num_slots}")
        self._queue.put(loads, lambda _: self._num_pieces)
        # Kernels that read what the slots held are enqueued by now. Later than needed for loads submitted before.
        self._no_gate = ""
        try:
            self._streams.record(self._gate, Lane.COMPUTE)
        except RuntimeError as error:
            self._no_gate = str(error)
        self._is_gated = [False, False]
        self._pump()

    @_alone
    def promote(self, expert: int) -> None:
        """See `Transfer.promote`. What is left to copy of a load under way is promoted, too."""
        self._queue.promote(expert)

    @_alone
    def cancel(self, expert: int) -> bool:
        """See `Transfer.cancel`."""
        return self._queue.cancel(expert)

    @_alone
    def is_ready(self, expert: int) -> bool:
        """See `Transfer.is_ready`."""
        load = self._queue.find(expert)
        if load is None or load.has_ended:
            return load is not None and load.state is LoadState.READY
        self._harvest()
        self._pump()
        return load.state is LoadState.READY or load in self._awaited

    @_alone
    def has_failed(self, expert: int) -> bool:
        """See `Transfer.has_failed`."""
        load = self._queue.find(expert)
        if load is not None and not load.has_ended:
            self._harvest()
        return load is not None and load.has_failed

    @_alone
    def is_filling(self, slot: int) -> bool:
        """See `Transfer.is_filling`."""
        if self._queue.is_filling(slot):
            self._harvest()
        return self._queue.is_filling(slot)

    @_alone
    def find(self, expert: int) -> QueuedLoad | None:
        """The last load of `expert`; once it `has_ended`, nothing reads the host's bytes for it any more."""
        return self._queue.find(expert)

    @_alone
    def land(self, load: QueuedLoad) -> None:
        """Block until a load has ended, well or not."""
        if not load.has_ended:
            self._enqueue_rest(load)
            self._settle(load)

    @_alone
    def wait_any(self, experts: Collection[int]) -> list[int]:
        """See `Transfer.wait_any`. Never blocks: where none has arrived, the compute stream will wait for the first.

        Raises ValueError when none of `experts` is being loaded.
        """
        self._harvest()
        self._raise_late()
        ready = self._ready(experts)
        if not ready:
            loads = [load for load in map(self._queue.find, experts) if load is not None and not load.has_ended]
            for load in loads:
                self._enqueue_rest(load)
                if load.error:
                    self._settle(load)
            if any(load.error for load in loads):
                self._ready(experts)  # raises
            ready = [self._await(min(loads, key=lambda load: self._under_way[load][-1].number))]
        self._pump()
        return ready

    @_alone
    def drain(self) -> None:
        """See `Transfer.drain`."""
        self._queue.cancel_queued()
        for load in list(self._under_way):
            self._enqueue_rest(load)
        for flights in self._flights:
            while flights:
                self._synchronize(flights[0])
                self._harvest()

    @_alone
    def recover(self) -> None:
        """See `Transfer.recover`."""
        self.drain()
        self._bytes_under_way = 0
        if lost := list(self._queue.under_way):  # the interrupt came between a copy and the note of it
            self._finish_copies()
            for load in lost:
                self._under_way.pop(load, None)
                self._awaited.discard(load)
                self._queue.finish(load, "interrupted", load.num_taken - load.num_done)

    @_alone
    def stats(self) -> TransferStats:
        """See `Transfer.stats`."""
        self._harvest()
        s, queue = self._stats, self._queue
        return TransferStats(
            s.num_loads, s.num_bytes, queue.num_cancelled, s.busy_s, s.stall_s, num_failed_loads=queue.num_failed
        )

    @_alone
    def reset_stats(self) -> None:
        """See `Transfer.reset_stats`."""
        self._harvest()
        self._stats, self._queue.num_cancelled, self._queue.num_failed = TransferStats(), 0, 0

    @_alone
    def close(self) -> None:
        """See `Transfer.close`."""
        if not self._is_closed:
            try:
                self.drain()
            finally:
                self._is_closed = True
                self._streams.close()

    def _ready(self, experts: Collection[int]) -> list[int]:
        return self._queue.ready(experts, self._describe, self._awaited)

    def _await(self, load: QueuedLoad) -> int:
        """Make the compute stream wait for a load whose copies are all enqueued."""
        flights = self._under_way[load]
        try:
            wanted = self._event()
            self._streams.record(wanted, Lane.COMPUTE)
            flights[-1].wanted = wanted
            for flight in flights:
                self._streams.wait(flight.end, Lane.COMPUTE)
        except RuntimeError as error:
            raise TransferError(self._what_failed(load, _line(error))) from error
        self._awaited.add(load)
        return load.expert

    def _raise_late(self) -> None:
        error, self._late_error = self._late_error, ""
        if error:
            raise TransferError(f"{error}; what was computed with it may be wrong")

    def _what_failed(self, load: QueuedLoad, why: str) -> str:
        return f"{self._describe(load.expert)} (number {load.expert}): {why}"

    def _settle(self, load: QueuedLoad) -> None:
        """Wait for the pieces of a load of which another one was refused: it has failed once they have ended."""
        for flight in list(self._under_way.get(load, ())):
            self._synchronize(flight)
        self._harvest()

    def _synchronize(self, flight: _Flight) -> None:
        try:
            self._streams.synchronize(flight.end)
        except RuntimeError as error:
            for flights in self._flights:
                with contextlib.suppress(ValueError):
                    flights.remove(flight)
            self._finish_copies()
            self._land(flight, str(error))

    def _pump(self) -> None:
        """Enqueue all demand, and of the prefetches what there is room for."""
        for load in self._queue.demanded:
            self._enqueue_rest(load)
        while self._bytes_under_way < self._window_bytes and (taken := self._queue.take()) is not None:
            load, piece = taken
            self._enqueue(load, range(piece, piece + 1), ())

    def _enqueue_rest(self, load: QueuedLoad) -> None:
        """Enqueue what is left of a load, behind what is still on its way to the slot."""
        earlier = load.after
        flights: Sequence[_Flight] = ()
        if earlier is not None and not earlier.has_ended:
            self._enqueue_rest(earlier)
            flights = self._under_way.get(earlier, ())
        if rest := self._queue.take_rest(load):
            self._enqueue(load, rest, flights)

    def _enqueue(self, load: QueuedLoad, pieces: range, after: Sequence[_Flight]) -> None:
        lane, streams = _LANES[load.reason], self._streams
        start = pieces.start * self._piece_bytes
        num_bytes = min(pieces.stop * self._piece_bytes, streams.num_bytes) - start
        self._num_flights += 1
        begin, end = None if self._flights[lane] else self._event(), self._event()
        flight = _Flight(load, len(pieces), num_bytes, self._num_flights, begin, end)
        own = self._under_way.setdefault(load, [])
        try:
            if self._no_gate:
                raise RuntimeError(self._no_gate)
            if not self._is_gated[lane]:
                streams.wait(self._gate, lane)
                self._is_gated[lane] = True
            for other in after:
                streams.wait(other.end, lane)
            if begin is not None:
                streams.record(begin, lane)
            streams.copy(lane, load.expert, load.slot, start, num_bytes)
            streams.record(end, lane)
        except RuntimeError as error:
            self._finish_copies()  # this one may be under way, whole or in part
            self._finish(load, len(pieces), str(error))
            return
        own.append(flight)
        self._flights[lane].append(flight)
        self._bytes_under_way += num_bytes
        self._stats.num_bytes += num_bytes

    def _finish_copies(self) -> None:
        with contextlib.suppress(RuntimeError):  # a device that was lost, and copies no more
            self._streams.finish()

    def _harvest(self) -> None:
        """Take note of what has happened on the device."""
        for flights in self._flights:
            while flights:
                try:
                    if not self._streams.is_done(flights[0].end):
                        break
                except RuntimeError as error:
                    self._finish_copies()
                    self._land(flights.popleft(), str(error))
                else:
                    self._land(flights.popleft())

    def _land(self, flight: _Flight, error: str = "") -> None:
        self._bytes_under_way -= flight.num_bytes
        self._under_way[flight.load].remove(flight)
        if not error:
            try:
                self._clock(flight)
            except RuntimeError as lost:  # since it was said to be done
                error = str(lost)
        self._finish(flight.load, flight.num_pieces, error)

    def _finish(self, load: QueuedLoad, num_pieces: int, error: str) -> None:
        if not self._queue.finish(load, _line(error), num_pieces):
            return
        self._stats.num_loads += load.state is LoadState.READY
        del self._under_way[load]
        if load in self._awaited:
            self._awaited.remove(load)
            if load.error:
                self._late_error = self._what_failed(load, load.error)

    def _clock(self, flight: _Flight) -> None:
        """Add the time of a copy, less what one that ended before it covers, and that in which it was waited for."""
        streams, last = self._streams, self._last_end
        since_last_s = None if last is None else streams.elapsed_s(last, flight.end)
        spans_s = [] if since_last_s is None else [since_last_s]
        if flight.begin is not None:
            spans_s.append(streams.elapsed_s(flight.begin, flight.end))
            self._events.append(flight.begin)
        self._stats.busy_s += max(0.0, min(spans_s, default=0.0))
        if flight.wanted is not None:
            if streams.is_done(flight.wanted):  # else the computation comes to it only now
                self._stats.stall_s += max(0.0, streams.elapsed_s(flight.wanted, flight.end))
            self._events.append(flight.wanted)
        if since_last_s is not None and since_last_s <= 0.0:
            self._events.append(flight.end)
            return
        self._last_end = flight.end  # before the other one is free: an interrupt must not leave it in use as well
        if last is not None:
            self._events.append(last)

    def _event(self) -> Event:
        return self._events.pop() if self._events else self._streams.new_event()


def _line(error: RuntimeError | str) -> str:
    """What torch says of an error first; advice on debugging follows."""
    return str(error).partition("\n")[0]
