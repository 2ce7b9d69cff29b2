"""A disk and a GPU that a test holds, with rows of host memory between them that must not change under a copy."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from fake_streams import FakeStreams

from runtime.errors import TransferError
from runtime.transfer.base import TransferStats
from runtime.transfer.cuda import Lane
from runtime.transfer.host_rows import HostRows
from runtime.transfer.layout import ExpertParameter, Part, Source, align, lay_out
from runtime.transfer.queue import LoadQueue, LoadState, QueuedLoad
from runtime.transfer.store import ExpertStore
from runtime.vocabulary import Load

SIZES = (300, 5000)
"""Bytes of an expert's two tensors; in a slot of a GPU there is a gap between them."""


def split_store(file: Path, num_layers: int, per_layer: int) -> ExpertStore:
    """Experts of two tensors each, whose bytes lie in two parts of a new file."""
    num_experts = num_layers * per_layer
    file.write_bytes(np.random.default_rng(num_experts).bytes(64 + num_experts * sum(SIZES)))
    recipes, places, slot_bytes = {}, {}, 0
    for expert in range(num_experts):
        parts, start = [], 64
        for name, size in zip("ab", SIZES, strict=True):
            source = Source(name, name, 0, start + expert * size, size, (size,), torch.uint8)
            parts.append(Part(ExpertParameter(name, (size,), torch.uint8), (source,), True, lambda tensors: tensors[0]))
            start += num_experts * size
        recipes[expert], places[expert], end = lay_out(parts)
        slot_bytes = max(slot_bytes, align(end, 4096))
    prefixes = tuple(f"layer{number}" for number in range(num_layers))
    return ExpertStore((file,), prefixes, per_layer, sum(SIZES), slot_bytes, recipes, places)


class RowStreams(FakeStreams):
    """Copies that read rows of host memory when they run, not when they are enqueued.

    Attributes:
        reading: rows that copies are still to read, or half have.
    """

    def __init__(self, rows: HostRows, num_slots: int, seed: int = 0) -> None:
        store = rows.store
        super().__init__(len(store.experts), num_slots, rows.num_bytes, seed)
        self._rows, self._memory = rows, np.frombuffer(rows.arena.memory, np.uint8)
        self.reading: Counter[int] = Counter()
        data = store.files[0].read_bytes()
        self.experts.fill(255)
        for expert in store.experts:
            for place, source in zip(rows.tensors(expert), self._sources(store, expert), strict=True):
                self.experts[expert, place.slot_offset :][: len(source)] = np.frombuffer(data, np.uint8)[source]

    def copy(self, lane: Lane, expert: int, slot: int, start: int, num_bytes: int) -> None:
        if self.is_lost or expert in self.refused:
            raise RuntimeError(f"CUDA error: no copy of {expert}\nand a second line")
        spans, row = list(self._rows.spans(expert, start, num_bytes)), self._rows.residency.slot_of(expert)
        self.reading[row] += 1
        middle = len(spans) // 2

        def begin() -> bool:
            self.copied.append(expert)
            self._move(slot, spans[:middle])
            return True

        def finish() -> bool:
            self._move(slot, spans[middle:])
            self.reading[row] -= 1
            return True

        self.queues[lane] += (begin, finish)

    def _move(self, slot: int, spans: Sequence[tuple[int, int, int]]) -> None:
        for source, target, num_bytes in spans:
            self.slots[slot, target : target + num_bytes] = self._memory[source : source + num_bytes]

    @staticmethod
    def _sources(store: ExpertStore, expert: int) -> list[range]:
        """Bytes of the file, by tensor in the order of the layer's parameters."""
        found = []
        for place in store.tensors(expert):
            (at,) = [s for s in store.recipe(expert).segments if s.slot_offset == place.slot_offset]
            found.append(range(at.offset, at.offset + at.num_bytes))
        return found


class FakeDisk:
    """Reads that go on by chance in every call, in two halves each. See `DiskTransfer`.

    Args:
        may_write: told the row of every write.

    Attributes:
        failing: experts whose reads fail. hanging: those whose reads return in `come_back` only.
        read: experts in the order in which their reads began.
    """

    def __init__(self, rows: HostRows, may_write: Callable[[int], None], seed: int = 0) -> None:
        self._store, self._arena, self._may_write = rows.store, rows.arena, may_write
        self._data, self._random = rows.store.files[0].read_bytes(), random.Random(seed)
        self.queue = LoadQueue()
        self.failing: set[int] = set()
        self.hanging: set[int] = set()
        self.read: list[int] = []
        self._hung: list[tuple[QueuedLoad, int]] = []
        self.num_loads = 0
        self.is_closed = False

    def find(self, expert: int) -> QueuedLoad | None:
        self._go_on()
        return self.queue.find(expert)

    def submit(self, loads: Sequence[Load]) -> None:
        self.queue.put(loads, lambda _: 2)
        self._go_on()

    def promote(self, expert: int) -> None:
        self.queue.promote(expert)

    def cancel(self, expert: int) -> bool:
        return self.queue.cancel(expert)

    def is_filling(self, row: int) -> bool:
        return self.queue.is_filling(row)

    def wait_any(self, experts: Collection[int]) -> list[int]:
        while not (ready := self.queue.ready(experts, "expert {}".format)):
            if not self.step():
                self.queue.give_up("no read has ended")
                self.queue.ready(experts, "expert {}".format)
                raise TransferError("reads before it have not returned")
        return ready

    def come_back(self) -> None:
        """Reads that hung return after all, and write."""
        while self._hung:
            self._end(*self._hung.pop())

    def step(self) -> bool:
        """Read half an expert; False where nothing can be begun."""
        taken = self.queue.take()
        if taken is None:
            return False
        load, piece = taken
        if not piece:
            self.read.append(load.expert)
        if load.expert in self.hanging:
            self._hung.append((load, piece))
        else:
            self._end(load, piece)
        return True

    def _end(self, load: QueuedLoad, piece: int) -> None:
        self._may_write(load.slot)
        segments = self._store.recipe(load.expert).segments
        for at in segments[: len(segments) // 2] if not piece else segments[len(segments) // 2 :]:
            target = self._arena.buffer(load.slot)[at.slot_offset : at.slot_offset + at.num_bytes]
            target[:] = self._data[at.offset : at.offset + at.num_bytes]
        if self.queue.finish(load, "I/O error" if load.expert in self.failing else ""):
            self.num_loads += load.state is LoadState.READY

    def _go_on(self) -> None:
        for _ in range(self._random.randint(0, 2)):
            self.step()

    def stats(self) -> TransferStats:
        return TransferStats(self.num_loads)

    def reset_stats(self) -> None:
        self.num_loads = 0

    def close(self) -> None:
        self.is_closed = True
