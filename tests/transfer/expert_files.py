"""A file of random bytes with experts in it, a store over it, and reads that a test can hold, break and watch."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from runtime.transfer.layout import ExpertParameter, Part, Source, align, lay_out
from runtime.transfer.slots import SlotArena
from runtime.transfer.store import ExpertStore

EXPERTS_PER_LAYER = 4


def plain_store(file: Path, num_experts: int, num_bytes: int, first_byte: int = 8) -> ExpertStore:
    """`num_experts` experts of one uint8 tensor "w" each, one after the other from `first_byte` of a new file."""
    rng = np.random.default_rng(num_experts * num_bytes)
    file.write_bytes(rng.bytes(first_byte + num_experts * num_bytes))
    recipes, places, slot_bytes = {}, {}, 0
    parameter = ExpertParameter("w", (num_bytes,), torch.uint8)
    for expert in range(num_experts):
        source = Source("w", "w", 0, first_byte + expert * num_bytes, num_bytes, (num_bytes,), torch.uint8)
        recipes[expert], places[expert], end = lay_out([Part(parameter, (source,), True, lambda tensors: tensors[0])])
        slot_bytes = max(slot_bytes, align(end, 4096))
    return ExpertStore((file,), ("experts",), EXPERTS_PER_LAYER, num_bytes, slot_bytes, recipes, places)


def slot_bytes_of(store: ExpertStore, arena: SlotArena, slot: int, expert: int) -> bytes:
    """What `slot` holds where `expert`'s tensor would be."""
    (place,) = store.tensors(expert)
    return arena.view(slot, place).numpy().tobytes()


def file_bytes_of(store: ExpertStore, expert: int) -> bytes:
    """What the file holds of `expert`."""
    start = sum(segment.offset for segment in store.recipe(expert).segments)
    return store.files[0].read_bytes()[start : start + store.expert_bytes]


class GatedReads:
    """`os.preadv` that waits for a permit before each read, notes which expert it was for, and fails where told to."""

    def __init__(self, store: ExpertStore, num_experts: int) -> None:
        starts = [store.recipe(expert).segments[0].offset for expert in range(num_experts)]
        self._first_pages = [start // 4096 * 4096 for start in starts]
        self._changed = threading.Condition()
        self._is_open, self._permits = False, 0
        self.experts: list[int] = []
        self.faults: dict[int, Callable[[int, list[memoryview], int], int]] = {}

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        expert = self._expert_at(offset)
        with self._changed:
            self.experts.append(expert)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._is_open or self._permits > 0, timeout=30)
            self._permits -= not self._is_open
        return self.faults.get(expert, os.preadv)(descriptor, buffers, offset)

    def await_reads(self, number: int) -> None:
        """Block until `number` reads have begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.experts) >= number, timeout=30)

    def allow(self, number: int) -> None:
        """Let `number` reads pass."""
        with self._changed:
            self._permits += number
            self._changed.notify_all()

    def open(self) -> None:
        """Let every read pass from now on."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def _expert_at(self, offset: int) -> int:
        """The last expert whose first page is not beyond `offset`; experts are a page long at least."""
        return bisect_right(self._first_pages, offset) - 1
