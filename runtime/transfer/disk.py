"""Disk to host memory: I/O threads that read experts into the slots of an arena."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from runtime.errors import TransferError
from runtime.transfer.base import Transfer, TransferStats
from runtime.transfer.queue import LoadQueue, LoadState
from runtime.transfer.reader import FileReader, Read, ReadFailure, Region, bounce_region, cut
from runtime.transfer.slots import SlotArena
from runtime.transfer.store import Conversion, ExpertStore, Segment
from runtime.vocabulary import Load

_Piece = Segment | Conversion


class _BusyClock:
    """Counts bytes, and the time in which at least one read is under way. Called by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_open, self._since_s = 0, 0.0
        self._busy_s, self._num_bytes = 0.0, 0

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

    def totals(self) -> tuple[float, int]:
        """Busy seconds, reads under way included, and bytes."""
        with self._lock:
            open_s = time.perf_counter() - self._since_s if self._num_open else 0.0
            return self._busy_s + open_s, self._num_bytes

    def reset(self) -> None:
        with self._lock:
            self._busy_s, self._num_bytes, self._since_s = 0.0, 0, time.perf_counter()


class _Reads(NamedTuple):
    """What a thread needs to perform a piece."""

    store: ExpertStore
    arena: SlotArena
    files: FileReader
    piece_bytes: int

    def pieces(self, expert: int) -> tuple[_Piece, ...]:
        recipe = self.store.recipe(expert)
        cuts = [piece for segment in recipe.segments for piece in cut(segment, self.piece_bytes)]
        return (*cuts, *recipe.conversions)

    def perform(self, piece: _Piece, slot: int, bounce: Region) -> None:
        if isinstance(piece, Conversion):
            tensors = [self._read_whole(source, bounce) for source in piece.sources]
            view = self.arena.view(slot, piece.place)
            view.copy_(piece.convert(tensors).view(view.shape))
        else:
            self.files.read(piece, Region(self.arena.buffer(slot), self.arena.address(slot)), bounce)
