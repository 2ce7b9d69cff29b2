"""The arena of expert slots in the memory of a GPU."""

from __future__ import annotations

import math

import torch

from runtime.errors import BudgetError
from runtime.transfer.slots import TensorPlace


class DeviceSlots:
    """`num_slots` slots of `slot_bytes` bytes each, one allocation on `device`; nothing is written into it here.

    Attributes:
        memory: all of it, uint8 [num_slots * slot_bytes].

    Raises:
        BudgetError: fewer than one slot, or the device has no room.
    """

    is_on_host = False

    def __init__(self, num_slots: int, slot_bytes: int, device: torch.device) -> None:
        if num_slots < 1:
            raise BudgetError(f"{num_slots} slots of {slot_bytes} bytes: at least one is needed; allow more memory")
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        self._views: dict[tuple[int, TensorPlace], torch.Tensor] = {}
        try:
            self.memory = torch.empty(num_slots * slot_bytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:  # torch's out of memory is one
            raise BudgetError(
                f"{num_slots} slots of {slot_bytes} bytes, {num_slots * slot_bytes} bytes in all, do not fit on "
                f"{device} ({str(error).partition('.')[0]}); take fewer slots"
            ) from error

    def view(self, slot: int, place: TensorPlace) -> torch.Tensor:
        """The tensor at `place` of `slot`, no copy: it changes when the slot is loaded anew. Keeps the memory alive."""
        known = self._views.get((slot, place))
        if known is None:
            known = self._views[slot, place] = self._view(slot, place)
        return known

    def move(self, source: int, target: int) -> None:
        """Copy all bytes of slot `source` to slot `target`; no load is under way to either.

        Waits for the device before and after it: the stream that passes compute on may be another thread's.
        """
        self._synchronize()
        slots = self.memory.view(self.num_slots, self.slot_bytes)
        slots[target].copy_(slots[source])
        self._synchronize()

    def release_tail(self, num_slots: int) -> int:
        """0: the memory is one allocation, and stays reserved whole."""
        if not 1 <= num_slots <= self.num_slots:
            raise BudgetError(f"the arena has {self.num_slots} slots: {num_slots} of them cannot be kept")
        return 0

    def _synchronize(self) -> None:
        if self.memory.is_cuda:
            torch.cuda.synchronize(self.memory.device)

    def _view(self, slot: int, place: TensorPlace) -> torch.Tensor:
        num_bytes = math.prod(place.shape) * place.dtype.itemsize
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of {self.num_slots}")
        if place.slot_offset + num_bytes > self.slot_bytes:
            raise ValueError(f"{place} does not fit into a slot of {self.slot_bytes} bytes")
        start = slot * self.slot_bytes + place.slot_offset
        return self.memory[start : start + num_bytes].view(place.dtype).view(place.shape)
