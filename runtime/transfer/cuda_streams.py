"""The streams, events and copies of an NVIDIA GPU, through torch; `cuda.py` decides what is done on them."""

from __future__ import annotations

import contextlib
import mmap
import resource
from collections.abc import Iterable
from typing import Protocol

import torch

from runtime import machine
from runtime.cuda_driver import CudaDriver
from runtime.transfer.cuda import Lane
from runtime.transfer.device_slots import DeviceSlots
from runtime.transfer.host_slab import Span
from runtime.transfer.slots import SlotArena

_HIGH, _LOW = -1, 0  # priorities of streams


class HostSource(Protocol):
    """Where copies read from: `HostSlab` (every expert), `HostRows` (some).

    Attributes:
        num_bytes: of one expert in its slot. arena: the mapping. pinned_bytes: of it, from its start, that are to be
            pinned; the rest is copied through the driver's own memory.
    """

    num_bytes: int
    arena: SlotArena
    pinned_bytes: int

    def spans(self, expert: int, start: int, num_bytes: int) -> Iterable[Span]:
        """Where bytes `start` to `start + num_bytes` of an expert's slot lie in the mapping."""


class CudaStreams:
    """See `runtime.transfer.cuda.Streams`. The compute stream is torch's current one at each call.

    The mapping is registered with the driver as it lies: torch's own pinned memory comes in powers of two. Where the
    driver refuses, as for more than Windows gives to WSL2, the half is tried, then as much again, and so on; what is
    left pageable is copied more slowly, and the host waits for it.

    Args:
        num_streams: 1: demand and prefetch share one; 2: each has its own.

    Attributes:
        notes: what was refused.
    """

    def __init__(self, source: HostSource, slots: DeviceSlots, num_streams: int = 2) -> None:
        self.num_bytes = source.num_bytes
        self._source, self._device = source, slots.memory.device
        self._slot_bytes = slots.slot_bytes
        self._memory = slots.memory  # kept while copies go there
        self._source_address, self._target_address = source.arena.address(0), slots.memory.data_ptr()
        self._driver = CudaDriver(self._device)
        with torch.cuda.device(self._device):
            demand = torch.cuda.Stream(self._device, priority=_HIGH)
            prefetch = torch.cuda.Stream(self._device, priority=_LOW) if num_streams > 1 else demand
            self._streams = (demand, prefetch)
        self._pinned: list[int] = []  # addresses of ranges, each of whole rows
        self.notes = self._pin()
        self._handles = tuple(stream.cuda_stream for stream in self._streams)

    def new_event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def record(self, event: torch.cuda.Event, lane: Lane) -> None:
        event.record(self._stream(lane))

    def wait(self, event: torch.cuda.Event, lane: Lane) -> None:
        self._stream(lane).wait_event(event)

    def copy(self, lane: Lane, expert: int, slot: int, start: int, num_bytes: int) -> None:
        target, stream = self._target_address + slot * self._slot_bytes, self._handles[lane]
        for span in self._source.spans(expert, start, num_bytes):
            self._driver.upload(target + span.target, self._source_address + span.source, span.num_bytes, stream)

    def is_done(self, event: torch.cuda.Event) -> bool:
        with self._driver.current():
            return bool(event.query())

    def synchronize(self, event: torch.cuda.Event) -> None:
        with self._driver.current():
            event.synchronize()

    def finish(self) -> None:
        for stream in self._streams:
            stream.synchronize()

    def elapsed_s(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(begin.elapsed_time(end)) / 1e3

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # a GPU that was lost
            self.finish()
        while self._pinned:
            with contextlib.suppress(RuntimeError):
                self._driver.unpin(self._pinned.pop())

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return self._driver.stream if lane is Lane.COMPUTE else self._streams[lane]

    def _pin(self) -> list[str]:
        """Pin what is to be pinned, as far as the driver lets that be; a note where that is not all."""
        wanted_bytes, row_bytes = self._source.pinned_bytes, self._source.arena.slot_bytes
        if wanted_bytes:
            self._source.arena.keep_from_children()
        end, num_bytes, refusal = 0, wanted_bytes, ""
        while num_bytes:
            try:
                self._driver.pin(self._source_address + end, num_bytes)
                self._pinned.append(self._source_address + end)
                end += num_bytes
            except RuntimeError as error:
                refusal = str(error)
                num_bytes = num_bytes // row_bytes // 2 * row_bytes  # no copy reads of two ranges
            num_bytes = min(num_bytes, wanted_bytes - end)
        if not refusal:
            return []
        return [
            f"only {machine.format_bytes(end)} of {machine.format_bytes(wanted_bytes)} of host memory could be pinned "
            f"({refusal}): experts in the rest are copied more slowly; free memory, or set tiers.host_bytes to less, "
            "which leaves the rest of the experts on disk"
        ]


def pins_beyond_limit(device: torch.device) -> bool:
    """Whether the driver pins more than RLIMIT_MEMLOCK allows: tried with one page, while not even that is allowed.

    A limit of gigabytes would take as much memory, and seconds, to be exceeded.
    """
    mapping, driver = SlotArena(1, mmap.PAGESIZE), CudaDriver(device)
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        driver.wait()  # whatever CUDA locks for itself is locked by then
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard))
        driver.pin(mapping.address(0), mmap.PAGESIZE)
    except (OSError, ValueError, RuntimeError):
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    driver.unpin(mapping.address(0))
    return True
