"""The arena of expert slots in host memory."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from typing import NamedTuple

import torch

from runtime.errors import BudgetError

PAGE_BYTES = 4096
"""What O_DIRECT wants reads and their places aligned to. The kernel's own pages may be larger, as 64 KiB on Arm."""


class TensorPlace(NamedTuple):
    """Where one tensor of an expert lies in the expert's slot: `slot_offset` bytes from its start, contiguous."""

    name: str
    slot_offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class SlotArena:
    """`num_slots` slots of `slot_bytes` bytes each: one private, page-aligned, zero-filled anonymous mapping, `memory`.

    Memory is charged when a slot is first written. The mapping lives as long as the arena, a buffer or a view of it.

    Raises:
        BudgetError: fewer than one slot, or the system refuses the mapping.
    """

    is_on_host = True

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        if num_slots < 1:
            raise BudgetError(f"{num_slots} slots of {slot_bytes} bytes: at least one is needed; allow more memory")
        if slot_bytes < 1 or slot_bytes % PAGE_BYTES:
            raise ValueError(f"slot_bytes must be a positive multiple of {PAGE_BYTES}, not {slot_bytes}")
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        try:
            self._mapping = mmap.mmap(-1, num_slots * slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise BudgetError(
                f"{num_slots} slots of {slot_bytes} bytes, {num_slots * slot_bytes} bytes in all, cannot be mapped "
                f"({error}); take fewer slots"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # O_DIRECT pins every page that it reads into: huge ones make that four times cheaper (results/LOG.md).
            with contextlib.suppress(OSError):  # a kernel built without them
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.memory = memoryview(self._mapping)
        self._whole: dict[torch.dtype, torch.Tensor] = {}
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def address(self, slot: int) -> int:
        """The address of the first byte of `slot`; a multiple of `PAGE_BYTES`."""
        return self._address + self._start(slot)

    def buffer(self, slot: int) -> memoryview:
        """The bytes of `slot`, writable, no copy."""
        start = self._start(slot)
        return self.memory[start : start + self.slot_bytes]

    def view(self, slot: int, place: TensorPlace) -> torch.Tensor:
        """The tensor at `place` of `slot`, no copy: it changes when the slot is loaded anew. Keeps the memory alive."""
        num_bytes = math.prod(place.shape) * place.dtype.itemsize
        if place.slot_offset + num_bytes > self.slot_bytes:
            raise ValueError(f"{place} does not fit into a slot of {self.slot_bytes} bytes")
        whole = self._whole.get(place.dtype)
        if whole is None:
            whole = self._whole[place.dtype] = torch.frombuffer(self._mapping, dtype=place.dtype)
        offset, rest = divmod(self._start(slot) + place.slot_offset, place.dtype.itemsize)
        assert rest == 0, f"{place} is not aligned to its elements"
        strides = [math.prod(place.shape[i + 1 :]) for i in range(len(place.shape))]
        return whole.as_strided(place.shape, strides, offset)

    def move(self, source: int, target: int) -> None:
        """Copy all bytes of slot `source` to slot `target`; nobody may be using either."""
        ctypes.memmove(self.address(target), self.address(source), self.slot_bytes)

    def release_tail(self, num_slots: int) -> int:
        """Give the memory of all slots from `num_slots` on back to the system; their content is lost, reads give zeros.

        The addresses stay valid: a slot that is written again is charged again. Nobody may be using those slots.

        Returns:
            bytes of those slots that the system has back now, or never charged: whole pages of the kernel.
        """
        if not 1 <= num_slots <= self.num_slots:
            raise BudgetError(f"the arena has {self.num_slots} slots: {num_slots} of them cannot be kept")
        start = -(-num_slots * self.slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        num_bytes = max(0, self.num_slots * self.slot_bytes - start)
        if num_bytes:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, num_bytes)
        return num_bytes

    def keep_from_children(self) -> None:
        """Leave the memory out of processes that are forked from now on: they die if they touch it.

        For memory that a device reads. A fork would copy all that is pinned, at once; older kernels would give the
        parent new pages for what it writes, and the device would go on reading the old ones.
        """
        if hasattr(mmap, "MADV_DONTFORK"):
            self._mapping.madvise(mmap.MADV_DONTFORK)

    def _start(self, slot: int) -> int:
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of {self.num_slots}")
        return slot * self.slot_bytes
