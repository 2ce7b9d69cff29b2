"""The streams, events and copies of an NVIDIA GPU, through torch; `cuda.py` decides what is done on them."""

from __future__ import annotations

import contextlib

import torch

from runtime import machine
from runtime.cuda_driver import CudaDriver
from runtime.errors import BudgetError
from runtime.transfer.cuda import Lane
from runtime.transfer.device_slots import DeviceSlots
from runtime.transfer.host_slab import HostSlab

_HIGH, _LOW = -1, 0  # priorities of streams


class CudaStreams:
    """See `runtime.transfer.cuda.Streams`. The compute stream is torch's current one at each call.

    The slab is registered with the driver as it lies: torch's own pinned memory comes in powers of two.

    Args:
        num_streams: 1: demand and prefetch share one; 2: each has its own.

    Raises:
        BudgetError: the driver does not pin that much memory.
    """

    def __init__(self, slab: HostSlab, slots: DeviceSlots, num_streams: int = 2) -> None:
        self.num_bytes = slab.num_bytes
        self._slab, self._device = slab, slots.memory.device
        self._slot_bytes = slots.slot_bytes
        self._memory = slots.memory  # kept while copies go there
        self._source_address, self._target_address = slab.arena.address(0), slots.memory.data_ptr()
        self._is_registered = False
        self._driver = CudaDriver(self._device)
        with torch.cuda.device(self._device):
            demand = torch.cuda.Stream(self._device, priority=_HIGH)
            prefetch = torch.cuda.Stream(self._device, priority=_LOW) if num_streams > 1 else demand
            self._streams = (demand, prefetch)
            self._register()
        self._handles = tuple(stream.cuda_stream for stream in self._streams)

    def new_event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def record(self, event: torch.cuda.Event, lane: Lane) -> None:
        event.record(self._stream(lane))

    def wait(self, event: torch.cuda.Event, lane: Lane) -> None:
        self._stream(lane).wait_event(event)

    def copy(self, lane: Lane, expert: int, slot: int, start: int, num_bytes: int) -> None:
        source = self._source_address + self._slab.start(expert) + start
        target = self._target_address + slot * self._slot_bytes + start
        self._driver.upload(target, source, num_bytes, self._handles[lane])

    def is_done(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())

    def synchronize(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def elapsed_s(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(begin.elapsed_time(end)) / 1e3

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # a GPU that was lost
            for stream in self._streams:
                stream.synchronize()
        if self._is_registered:
            self._is_registered = False
            torch.cuda.cudart().cudaHostUnregister(self._source_address)

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return self._driver.stream if lane is Lane.COMPUTE else self._streams[lane]

    def _register(self) -> None:
        runtime = torch.cuda.cudart()
        try:
            torch.cuda.check_error(runtime.cudaHostRegister(self._source_address, self._slab.total_bytes, 0))
        except RuntimeError as error:
            raise BudgetError(
                f"{machine.format_bytes(self._slab.total_bytes)} of host memory for the experts cannot be pinned "
                f"({str(error).partition(chr(10))[0]}); raise RLIMIT_MEMLOCK, free memory, or compute on the CPU"
            ) from error
        self._is_registered = True
