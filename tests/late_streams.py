"""Streams of a GPU's engine on a machine without one: a copy happens when the computation waits for it, not before."""

from __future__ import annotations

import pytest
import torch

from runtime import build, build_tiers
from runtime.transfer.cuda import Lane
from runtime.transfer.cuda_streams import HostSource
from runtime.transfer.device_slots import DeviceSlots
from runtime.transfer.host_slab import Span


class LateStreams:
    """Copies run when the compute stream waits for them; a kernel that did not wait reads what was there before."""

    def __init__(self, source: HostSource, slots: DeviceSlots, num_streams: int) -> None:
        self.num_bytes, self.notes = source.num_bytes, list[str]()
        self._spans, self._slots = source.spans, slots
        self._source = torch.frombuffer(source.arena.memory, dtype=torch.uint8)
        self._pending: list[tuple[int, tuple[Span, ...]]] = []
        slots.memory.fill_(255)  # bfloat16 NaN

    def new_event(self) -> list[int]:
        return [0]

    def record(self, event: list[int], lane: Lane) -> None:
        event[0] = len(self._pending)

    def wait(self, event: list[int], lane: Lane) -> None:
        if lane is Lane.COMPUTE:
            self.synchronize(event)

    def copy(self, lane: Lane, expert: int, slot: int, start: int, num_bytes: int) -> None:
        self._pending.append((slot, tuple(self._spans(expert, start, num_bytes))))

    def is_done(self, event: list[int]) -> bool:
        return all(one is None for one in self._pending[: event[0]])

    def synchronize(self, event: list[int]) -> None:
        for number, one in enumerate(self._pending[: event[0]]):
            if one is not None:
                slot, spans = one
                for source, target, num_bytes in spans:
                    start = slot * self._slots.slot_bytes + target
                    self._slots.memory[start : start + num_bytes] = self._source[source : source + num_bytes]
                self._pending[number] = None  # type: ignore[call-overload]

    def finish(self) -> None:
        self.synchronize([len(self._pending)])

    def elapsed_s(self, begin: list[int], end: list[int]) -> float:
        return 0.0

    def close(self) -> None: ...


def compute_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `runtime.load` builds from now on is a GPU's engine, on the CPU and with such streams."""
    monkeypatch.setattr(build_tiers, "CudaStreams", LateStreams)
    monkeypatch.setattr(build, "is_gpu", lambda device: True)
