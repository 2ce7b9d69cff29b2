"""Streams of a GPU's engine on a machine without one: a copy happens when the computation waits for it, not before."""

from __future__ import annotations

import torch

from runtime.transfer.cuda import Lane
from runtime.transfer.device_slots import DeviceSlots
from runtime.transfer.host_slab import HostSlab


class LateStreams:
    """Copies run when the compute stream waits for them; a kernel that did not wait reads what was there before."""

    def __init__(self, slab: HostSlab, slots: DeviceSlots, num_streams: int) -> None:
        self.num_bytes = slab.num_bytes
        self._slab, self._slots = slab, slots
        self._source = torch.frombuffer(slab.arena.memory, dtype=torch.uint8)
        self._pending: list[tuple[int, int, int, int]] = []
        slots.memory.fill_(255)  # bfloat16 NaN

    def new_event(self) -> list[int]:
        return [0]

    def record(self, event: list[int], lane: Lane) -> None:
        event[0] = len(self._pending)

    def wait(self, event: list[int], lane: Lane) -> None:
        if lane is Lane.COMPUTE:
            self.synchronize(event)

    def copy(self, lane: Lane, expert: int, slot: int, start: int, num_bytes: int) -> None:
        self._pending.append((expert, slot, start, num_bytes))

    def is_done(self, event: list[int]) -> bool:
        return all(one is None for one in self._pending[: event[0]])

    def synchronize(self, event: list[int]) -> None:
        for number, one in enumerate(self._pending[: event[0]]):
            if one is not None:
                expert, slot, start, num_bytes = one
                source, target = self._slab.start(expert) + start, slot * self._slots.slot_bytes + start
                copied = self._source[source : source + num_bytes]
                self._slots.memory[target : target + num_bytes] = copied
                self._pending[number] = None  # type: ignore[call-overload]

    def elapsed_s(self, begin: list[int], end: list[int]) -> float:
        return 0.0

    def close(self) -> None: ...
