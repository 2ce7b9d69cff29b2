"""Finds accesses to the same memory that nothing orders, however the run that it watches happened to go.

As race detectors do (FastTrack, Flanagan and Freund, PLDI 2009), it gives every stream and every host thread a vector
clock: for each of them, how many of its accesses are known to be over. What is enqueued on a stream comes after all
that the host's thread knows; recording an event keeps what the stream knows, and a stream or a thread that waits for
it, or is told that it has happened, knows that too. So does a thread that reads the state of a load which another one
has set, is started, or is joined. Nothing else orders: neither time nor Python's own lock.

An access is a range of addresses, read or written: by a kernel (the tensors that it is given and makes) and by a copy
of the driver on their stream, by the host where it reads files into rows and moves bytes to and from pinned memory. Two
accesses that overlap, one of which writes, must be ordered, or else are a race, unless both are the host's own: of
those, only reading a file is checked, against what the host computes from, too. A copy from pageable memory reads that
before its call returns, and orders nothing. Memory that is given back or pinned anew has no past. What torch's
allocator does with memory is not watched.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import pytest
import torch

import runtime
from runtime.host_experts import HostExperts
from runtime.transfer.disk import _ExpertReader
from runtime.transfer.layout import Conversion
from runtime.transfer.queue import LoadQueue, QueuedLoad

ROOT = str(Path(runtime.__file__).parent.parent) + "/"
OURS, FAKES = (f"{ROOT}runtime/", f"{ROOT}tests/"), (f"{ROOT}tests/fake_cuda.py", __file__)
PAGE_BYTES = 1024
NUM_FRAMES = 6
memmove = ctypes.memmove  # that nobody watches

Clock = dict[object, int]
Place = tuple[tuple[CodeType, int], ...]


class Access(NamedTuple):
    """Of bytes `start` to `end`: number `stamp` of those of a stream or a thread. `is_loose`: checked against all."""

    start: int
    end: int
    writes: bool
    is_loose: bool
    actor: object
    stamp: int
    what: str
    place: Place

    def __str__(self) -> str:
        lines = (f"{code.co_filename.removeprefix(ROOT)}:{line} {code.co_name}" for code, line in self.place)
        return f"{self.what} {'writes' if self.writes else 'reads'} (" + " < ".join(lines) + ")"


class HappensBefore:
    """Attributes: races: pairs of accesses that nothing orders, one line for each pair of places in our code."""

    def __init__(self) -> None:
        self._races: dict[tuple[Place, Place], str] = {}
        self._clocks: dict[object, Clock] = {}  # of streams
        self._loads: dict[QueuedLoad, Clock] = {}  # what the threads that changed their states knew
        self._pages: dict[int, list[Access]] = {}
        self._local, self._lock = threading.local(), threading.RLock()
        self._unmapped: deque[tuple[int, int]] = deque()

    @property
    def races(self) -> list[str]:
        return list(self._races.values())

    def clear(self) -> None:
        """They were expected."""
        self._races.clear()

    # Order

    def _host(self) -> Clock:
        known: Clock | None = getattr(self._local, "clock", None)
        if known is None:
            known = self._local.clock = {}
            self._local.actor = object()
        return known

    def _of(self, stream: object) -> Clock:
        return self._clocks.setdefault(stream, {})

    def enqueue(self, stream: object) -> None:
        """The calling thread gives something to a stream."""
        with self._lock:
            _join(self._of(stream), self._host())

    def known(self, stream: object) -> Clock:
        """What has ended when all that a stream was given so far has."""
        with self._lock:
            return dict(self._of(stream))

    def stream_waits(self, stream: object, clock: Clock) -> None:
        """For that, before what it is given next."""
        with self._lock:
            _join(self._of(stream), clock)

    def host_waits(self, clock: Clock) -> None:
        """The calling thread has waited for that, or heard that it has happened."""
        with self._lock:
            _join(self._host(), clock)

    def _note_state(self, load: QueuedLoad) -> None:
        with self._lock:
            _join(self._loads.setdefault(load, {}), self._host())

    def _see_state(self, load: QueuedLoad) -> None:
        if (clock := self._loads.get(load)) is not None:
            self.host_waits(clock)

    # Accesses

    def on_stream(self, stream: object, start: int, num_bytes: int, *, writes: bool, what: str) -> None:
        """Something that the stream was given last reads or writes."""
        with self._lock:
            self._check(stream, self._of(stream), start, num_bytes, writes, what, is_loose=True)

    def on_host(self, start: int, num_bytes: int, *, writes: bool, what: str, is_loose: bool = False) -> None:
        """The calling thread reads or writes, now; `is_loose`: not only streams must be ordered with it."""
        with self._lock:
            clock = self._host()
            self._check(self._local.actor, clock, start, num_bytes, writes, what, is_loose=is_loose)

    def forget(self, start: int, num_bytes: int) -> None:
        """What was done to that memory: it is another's now."""
        with self._lock:
            for number in range(start // PAGE_BYTES, -(-(start + num_bytes) // PAGE_BYTES)):
                if (page := self._pages.get(number)) is not None:
                    page[:] = [one for one in page if one.end <= start or start + num_bytes <= one.start]

    def _check(
        self, actor: object, clock: Clock, start: int, num_bytes: int, writes: bool, what: str, *, is_loose: bool
    ) -> None:
        while self._unmapped:
            self.forget(*self._unmapped.popleft())
        stamp = clock[actor] = clock.get(actor, 0) + 1
        place, end = _place(), start + num_bytes
        for number in range(start // PAGE_BYTES, -(-end // PAGE_BYTES)):
            first, last = max(start, number * PAGE_BYTES), min(end, (number + 1) * PAGE_BYTES)
            new = Access(first, last, writes, is_loose, actor, stamp, what, place)
            page = self._pages.setdefault(number, [])
            kept = [one for one in page if one.end <= first or last <= one.start or self._outlasts(one, new, clock)]
            self._pages[number] = [*kept, new]

    def _outlasts(self, old: Access, new: Access, clock: Clock) -> bool:
        """Whether `old`, which overlaps `new`, is to be kept: not where whatever comes after `new` comes after it."""
        if clock.get(old.actor, 0) < old.stamp:
            if (new.writes or old.writes) and (new.is_loose or old.is_loose):
                self._races.setdefault((old.place, new.place), f"{new} while {old}, which is not ordered before it")
            return True
        is_inside = new.start <= old.start and old.end <= new.end
        return not is_inside or old.writes > new.writes or old.is_loose > new.is_loose

    # What the host does

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, what the runtime does on the host counts."""
        patch = pytest.MonkeyPatch()
        patch.setattr(ctypes, "memmove", self._memmove)
        patch.setattr(mmap, "mmap", self._mapping(mmap.mmap))
        patch.setattr(QueuedLoad, "state", _watched_state(QueuedLoad.state, self))
        patch.setattr(LoadQueue, "finish", self._finishing(LoadQueue.finish))
        patch.setattr(_ExpertReader, "perform", self._reading(_ExpertReader.perform))
        patch.setattr(HostExperts, "rows_of", self._computing(HostExperts.rows_of))
        patch.setattr(threading.Thread, "start", self._starting(threading.Thread.start))
        patch.setattr(threading.Thread, "join", self._joining(threading.Thread.join))
        try:
            yield
        finally:
            patch.undo()

    def _memmove(self, target: Any, source: Any, num_bytes: int) -> Any:
        is_told = not getattr(self._local, "converts", False)  # else where it ends is told, and its way is malloc's
        for address, writes in ((target, True), (source, False)):
            if isinstance(address, int) and num_bytes and is_told:
                self.on_host(address, num_bytes, writes=writes, what="memmove")
        return memmove(target, source, num_bytes)

    def _mapping(self, mapped: Callable[..., mmap.mmap]) -> Callable[..., mmap.mmap]:
        def mapped_until_it_goes(*args: Any, **kwargs: Any) -> mmap.mmap:
            found = mapped(*args, **kwargs)
            with suppress(TypeError):  # read-only
                start = ctypes.addressof(ctypes.c_char.from_buffer(found))
                weakref.finalize(found, self._unmapped.append, (start, len(found))).atexit = False
            return found

        return mapped_until_it_goes

    def _finishing(self, finish: Callable[..., bool]) -> Callable[..., bool]:
        def after_the_other_pieces(queue: LoadQueue, load: QueuedLoad, *args: Any) -> bool:
            self._see_state(load)
            self._note_state(load)
            return finish(queue, load, *args)

        return after_the_other_pieces

    def _reading(self, perform: Callable[..., None]) -> Callable[..., None]:
        def read(reader: Any, expert: int, piece: int, slot: int, bounce: Any) -> None:
            what = reader._pieces[expert][piece]
            if isinstance(what, Conversion):
                view = reader._arena.view(slot, what.place)
                start, num_bytes = view.data_ptr(), view.nbytes
            else:
                start, num_bytes = reader._arena.address(slot) + what.slot_offset, what.num_bytes
            self.on_host(start, num_bytes, writes=True, what="reading a file", is_loose=True)
            self._local.converts = isinstance(what, Conversion)
            try:
                perform(reader, expert, piece, slot, bounce)
            finally:  # what others do meanwhile is not ordered with it either
                self._local.converts = False
                self.on_host(start, num_bytes, writes=True, what="reading a file", is_loose=True)

        return read

    def _computing(self, rows_of: Callable[..., Any]) -> Callable[..., Any]:
        def compute(experts: HostExperts, arrivals: Any) -> Any:
            weights = [weight for arrival in arrivals for weight in arrival.weights.values()]
            for weight in weights:
                self.on_host(weight.data_ptr(), weight.nbytes, writes=False, what="the host's kernel")
            found = rows_of(experts, arrivals)
            for weight in weights:
                self.on_host(weight.data_ptr(), weight.nbytes, writes=False, what="the host's kernel")
            return found

        return compute

    def _starting(self, start: Callable[..., None]) -> Callable[..., None]:
        def start_knowing(thread: threading.Thread) -> None:
            before, run = dict(self._host()), thread.run

            def run_knowing() -> None:
                self.host_waits(before)
                try:
                    run()
                finally:
                    thread._known = self._host()  # type: ignore[attr-defined]

            thread.run = run_knowing  # type: ignore[method-assign]
            start(thread)

        return start_knowing

    def _joining(self, join: Callable[..., None]) -> Callable[..., None]:
        def join_knowing(thread: threading.Thread, timeout: float | None = None) -> None:
            join(thread, timeout)
            if not thread.is_alive():
                self.host_waits(getattr(thread, "_known", {}))

        return join_knowing


def _watched_state(slot: Any, order: HappensBefore) -> property:
    def read(load: QueuedLoad) -> Any:
        order._see_state(load)
        return slot.__get__(load)

    def write(load: QueuedLoad, state: Any) -> None:
        order._note_state(load)
        slot.__set__(load, state)

    return property(read, write)


def _join(clock: Clock, other: Clock) -> None:
    for actor, stamp in other.items():
        if clock.get(actor, 0) < stamp:
            clock[actor] = stamp


def _place() -> Place:
    """Where in our code the caller is, innermost first."""
    frame, found = sys._getframe(3), list[tuple[CodeType, int]]()
    while frame is not None and len(found) < NUM_FRAMES:
        file = frame.f_code.co_filename
        if file.startswith(OURS) and file not in FAKES:
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of a tensor's first element, and the bytes up to the end of its last."""
    if not tensor.numel():
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()
