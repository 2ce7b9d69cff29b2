"""The threads that perform loads, and the clock that tells how busy they were."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from typing import Protocol

from runtime.transfer.queue import LoadQueue, QueuedLoad
from runtime.transfer.reader import ReadFailure, Region, bounce_region

HANG_S = 60.0
"""Without a read that ends for so long, the disk hangs: the loads under way are given up."""


class PieceReader(Protocol):
    """Performs one piece of a load."""

    @property
    def piece_bytes(self) -> int:
        """Size of a piece, as `bounce_region` wants it."""

    def perform(self, expert: int, piece: int, slot: int, bounce: Region) -> None:
        """Bring piece number `piece` of `expert` into `slot`. Raises ReadFailure, or what a conversion raises."""

    def close(self) -> None:
        """Close the files; nobody is reading."""


class BusyClock:
    """Counts bytes, and the time in which at least one read is under way. Called by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_open, self._since_s = 0, 0.0
        self._busy_s, self._num_bytes = 0.0, 0
        self.num_retries = 0

    def begin(self, num_bytes: int) -> None:
        with self._lock:
            if self._num_open == 0:
                self._since_s = time.perf_counter()
            self._num_open += 1
            self._num_bytes += num_bytes

    def end(self) -> None:
        with self._lock:
            self._num_open -= 1
            if self._num_open == 0:
                self._busy_s += time.perf_counter() - self._since_s

    def retry(self) -> None:
        with self._lock:
            self.num_retries += 1

    def totals(self) -> tuple[float, int]:
        """Busy seconds, reads under way included, and bytes."""
        with self._lock:
            open_s = time.perf_counter() - self._since_s if self._num_open else 0.0
            return self._busy_s + open_s, self._num_bytes

    def reset(self) -> None:
        with self._lock:
            self._busy_s, self._num_bytes, self._since_s = 0.0, 0, time.perf_counter()
            self.num_retries = 0


class IoCrew:
    """The I/O threads and what they share with the engine's thread. They refer to it, never to the transfer."""

    def __init__(self, reader: PieceReader, clock: BusyClock, num_threads: int, hang_s: float) -> None:
        self.reader, self.clock, self.hang_s = reader, clock, hang_s
        self.queue = LoadQueue()
        self.num_loads, self.is_closing = 0, False
        self._num_pieces = 0  # that ended
        self.lock = threading.Lock()
        self.work, self.ended = threading.Condition(self.lock), threading.Condition(self.lock)
        bounces = [bounce_region(reader.piece_bytes) for _ in range(num_threads)]
        self._threads = [threading.Thread(target=self._run, args=(b,), name="expert-io", daemon=True) for b in bounces]
        _crews.add(self)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Drop what is queued, let what is under way end, stop the threads, close the files. Idempotent.

        A thread whose read hangs is left alone with its file: it ends when the read returns.
        """
        if not self.is_closing:
            with self.lock:
                self.is_closing = True
                self.work.notify_all()
                self.drain()
                if self.queue.num_given_up:
                    return
            for thread in self._threads:
                thread.join()
            self.reader.close()

    def drain(self) -> None:
        """Cancel what is queued and wait until nothing is under way, or give it up. The caller holds the lock."""
        self.queue.cancel_queued()
        while self.queue.under_way:
            self.await_end()

    def await_end(self) -> bool:
        """Wait until a load may have ended; False when nothing moves, and all under way was given up. The caller holds
        the lock."""
        num_pieces = self._num_pieces
        if self.ended.wait(self.hang_s) or self._num_pieces != num_pieces:
            return True
        self.queue.give_up(f"no read has ended for {self.hang_s:g} s; check the disk")
        return False

    def abandon(self) -> None:
        """Tell the threads to stop and wait for nothing: the garbage collector may call this inside any of them."""
        self.is_closing = True
        if self.lock.acquire(blocking=False):
            self.work.notify_all()
            self.lock.release()

    def _run(self, bounce: Region) -> None:
        while (taken := self._next()) is not None:
            load, piece = taken
            error = self._perform(load, piece, bounce)
            with self.lock:
                self._num_pieces += 1
                if self.queue.finish(load, error):
                    self.num_loads += not load.error
                    self.ended.notify_all()
                    if self.queue.has_waiting:
                        self.work.notify_all()  # a load may have waited for this slot

    def _next(self) -> tuple[QueuedLoad, int] | None:
        with self.lock:
            while True:
                if self.is_closing:
                    self.queue.cancel_queued()
                if (taken := self.queue.take()) is not None:
                    return taken
                if self.is_closing:
                    self.work.notify_all()
                    return None
                self.work.wait()

    def _perform(self, load: QueuedLoad, piece: int, bounce: Region) -> str:
        """What went wrong, or nothing: a thread outlives every error, and the load's waiter hears of it."""
        try:
            self.reader.perform(load.expert, piece, load.slot, bounce)
        except ReadFailure as failure:
            return str(failure)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        return ""


_crews: weakref.WeakSet[IoCrew] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Join the threads while the interpreter still runs; later, closing does nothing."""
    for crew in list(_crews):
        crew.close()
