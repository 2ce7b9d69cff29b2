"""Disk to host memory: I/O threads that read experts into the slots of an arena."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Collection, Sequence

import torch

from runtime.errors import TransferError
from runtime.transfer.base import Transfer, TransferStats
from runtime.transfer.io_crew import HANG_S, BusyClock, IoCrew
from runtime.transfer.layout import Conversion, Segment, Source
from runtime.transfer.queue import LoadState, QueuedLoad
from runtime.transfer.reader import FileReader, Read, Region, cut
from runtime.transfer.slots import PAGE_BYTES, SlotArena
from runtime.transfer.store import ExpertStore
from runtime.vocabulary import Load

_Piece = Segment | Conversion


class _ExpertReader:
    """Performs the pieces of an expert's recipe."""

    def __init__(self, store: ExpertStore, arena: SlotArena, files: FileReader, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes
        self._store, self._arena, self._files = store, arena, files
        self._pieces: dict[int, tuple[_Piece, ...]] = {}

    def pieces(self, expert: int) -> tuple[_Piece, ...]:
        """What to perform for `expert`, cut so that threads can share it. Called by the engine's thread only."""
        known = self._pieces.get(expert)
        if known is None:
            recipe = self._store.recipe(expert)
            cuts = [piece for segment in recipe.segments for piece in cut(segment, self.piece_bytes)]
            known = self._pieces[expert] = (*cuts, *recipe.conversions)
        return known

    def perform(self, expert: int, piece: int, slot: int, bounce: Region) -> None:
        """Bring one piece into the slot. Raises ReadFailure, or what a conversion raises."""
        what = self._pieces[expert][piece]
        if isinstance(what, Conversion):
            converted = what.convert([self._read_whole(source, bounce) for source in what.sources])
            view = self._arena.view(slot, what.place)
            view.copy_(converted.view(view.shape))
        else:
            self._files.read(what, Region(self._arena.buffer(slot), self._arena.address(slot)), bounce)

    def close(self) -> None:
        """Close the files; nobody is reading."""
        self._files.close()

    def _read_whole(self, source: Source, bounce: Region) -> torch.Tensor:
        data = torch.empty(source.num_bytes, dtype=torch.uint8)
        target = Region(memoryview(data.numpy().data), data.data_ptr())
        for piece in cut(Segment(source.file, source.offset, source.num_bytes, 0), self.piece_bytes):
            self._files.read(piece, target, bounce)
        return data.view(source.dtype).view(source.shape)


class DiskTransfer(Transfer):
    """Reads experts from their checkpoint files into the slots of an arena.

    A load is cut into pieces, which the threads share; a demand load overtakes a prefetch at its next piece. A read
    that fails is tried again a few times. One that hangs takes its thread with it until it returns, and its slot, which
    `is_filling` as long.

    Args:
        store: where experts lie. arena: where they go; its slots are at least `store.slot_bytes` long.
        io_threads: threads that read, 1 or more.
        piece_bytes: size of one read, up to 1.5 times that; a multiple of 4096. 2-3 MiB keep two threads busy.
        direct: None O_DIRECT where the file system takes it, else buffered reads without read-ahead that drop their
            pages from the cache; True and False force one of them.
        read: how bytes are read, with the signature of `os.preadv`. sleep: waits before another try.
        hang_s: without a read that ends for so long, what is under way is given up.

    Raises:
        CheckpointError: a file cannot be opened (as asked). ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        store: ExpertStore,
        arena: SlotArena,
        io_threads: int = 2,
        piece_bytes: int = 2 << 20,
        direct: bool | None = None,
        read: Read = os.preadv,
        sleep: Callable[[float], None] = time.sleep,
        hang_s: float = HANG_S,
    ) -> None:
        if io_threads < 1 or piece_bytes < PAGE_BYTES or piece_bytes % PAGE_BYTES:
            raise ValueError(f"{io_threads} threads with pieces of {piece_bytes} bytes: 1 or more, multiples of 4096")
        if arena.slot_bytes < store.slot_bytes:
            raise ValueError(f"slots of {arena.slot_bytes} bytes do not hold experts of {store.slot_bytes}")
        clock = BusyClock()
        files = FileReader(store.files, direct, clock, read, sleep)
        self._store, self._num_slots = store, arena.num_slots
        self._reader = _ExpertReader(store, arena, files, piece_bytes)
        self._crew = IoCrew(self._reader, clock, io_threads, hang_s)
        self._stall_s = 0.0
        self.is_direct = files.is_direct
        weakref.finalize(self, self._crew.abandon).atexit = False

    @property
    def now_s(self) -> float:
        """See `Transfer.now_s`."""
        return time.perf_counter()

    def submit(self, loads: Sequence[Load]) -> None:
        """See `Transfer.submit`."""
        crew = self._crew
        num_pieces = 0
        for load in loads:
            num_pieces += len(self._reader.pieces(load.expert))
            if not 0 <= load.slot < self._num_slots:
                raise IndexError(f"slot {load.slot} of {self._num_slots}")
        with crew.lock:
            if crew.is_closing:
                raise ValueError("the transfer is closed")
            crew.queue.put(loads, lambda expert: len(self._reader.pieces(expert)))
            crew.work.notify(num_pieces)

    def promote(self, expert: int) -> None:
        """See `Transfer.promote`. What is left to read of a load under way is promoted, too."""
        with self._crew.lock:
            self._crew.queue.promote(expert)

    def cancel(self, expert: int) -> bool:
        """See `Transfer.cancel`."""
        with self._crew.lock:
            return self._crew.queue.cancel(expert)

    def is_ready(self, expert: int) -> bool:
        """See `Transfer.is_ready`."""
        load = self._crew.queue.find(expert)
        return load is not None and load.state is LoadState.READY

    def has_failed(self, expert: int) -> bool:
        """See `Transfer.has_failed`."""
        load = self._crew.queue.find(expert)
        return load is not None and load.has_failed

    def is_filling(self, slot: int) -> bool:
        """See `Transfer.is_filling`."""
        with self._crew.lock:
            return self._crew.queue.is_filling(slot)

    def find(self, expert: int) -> QueuedLoad | None:
        """The last load of `expert`, which tells what becomes of it."""
        return self._crew.queue.find(expert)

    def wait_any(self, experts: Collection[int]) -> list[int]:
        """See `Transfer.wait_any`. Raises ValueError when none of `experts` is being loaded: it would wait for ever."""
        with self._crew.lock:
            if ready := self._ready(experts):
                return ready
            began_s = time.perf_counter()
            try:
                return self._await(experts)
            finally:
                self._stall_s += time.perf_counter() - began_s

    def _await(self, experts: Collection[int]) -> list[int]:
        while self._crew.await_end():
            if ready := self._ready(experts):
                return ready
        self._ready(experts)  # says so where one of them was given up; else they wait for others
        names = ", ".join(map(self._describe, experts))
        raise TransferError(f"{names}: reads before it have not returned for {self._crew.hang_s:g} s; check the disk")

    def drain(self) -> None:
        """See `Transfer.drain`."""
        with self._crew.lock:
            self._crew.drain()

    def stats(self) -> TransferStats:
        """See `Transfer.stats`."""
        crew = self._crew
        with crew.lock:
            busy_s, num_bytes = crew.clock.totals()
            return TransferStats(
                crew.num_loads,
                num_bytes,
                crew.queue.num_cancelled,
                busy_s,
                self._stall_s,
                crew.clock.num_retries,
                crew.queue.num_failed,
            )

    def reset_stats(self) -> None:
        """See `Transfer.reset_stats`."""
        with self._crew.lock:
            self._crew.num_loads = self._crew.queue.num_cancelled = self._crew.queue.num_failed = 0
            self._crew.clock.reset()
            self._stall_s = 0.0

    def close(self) -> None:
        """See `Transfer.close`."""
        self._crew.close()

    def _ready(self, experts: Collection[int]) -> list[int]:
        return self._crew.queue.ready(experts, self._store.describe)

    def _describe(self, expert: int) -> str:
        return f"{self._store.describe(expert)} (number {expert})"
