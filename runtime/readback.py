"""Between the host and the device that computes: everything that the host wants to know of a layer comes in one read.

The device works on long after its calls have returned; reading waits until it has come so far. A wait for each tensor
is a gap in the device's work for each. What the host sends waits for nothing.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt
import torch

from runtime.cuda_driver import CudaDriver
from runtime.errors import DeviceError


class Reader(Protocol):
    """Brings tensors of the device to the host.

    Attributes:
        waits: each call stops the host until the device has come to it, so that what is wanted together is to be asked
            for together.
    """

    waits: bool

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same on the host, in their shapes and dtypes. Nothing that is read later changes them."""
        ...


class HostReader:
    """Where the host computes: the very tensors that it is given."""

    waits = False

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Reader`."""
        return list(tensors)


class Driver(Protocol):
    """What reading asks of a device; see `CudaDriver`."""

    def download(self, target: int, source: int, num_bytes: int) -> None: ...

    def wait(self) -> None: ...

    def pinned(self, num_bytes: int) -> torch.Tensor: ...


class CudaReader:
    """One copy per tensor into pinned memory, one wait for all of them; then each goes into memory of its own, because
    the next read needs the pinned one. One thread at a time.

    Attributes:
        num_waits: how often the host has waited for the device here.
    """

    waits = True

    def __init__(self, driver: Driver) -> None:
        self._driver, self.num_waits = driver, 0
        self._scratch = driver.pinned(_FIRST_BYTES)
        self._address = self._scratch.data_ptr()

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Reader`.

        Raises:
            DeviceError: something that was enqueued on the device before has failed.
        """
        sources = [tensor.detach().contiguous() for tensor in tensors]
        sizes = [source.nbytes for source in sources]
        if sum(sizes) > self._scratch.nbytes:
            self._scratch = self._driver.pinned(1 << (sum(sizes) - 1).bit_length())
            self._address = self._scratch.data_ptr()
        try:
            self._fetch(sources, sizes)
        except RuntimeError as error:
            raise DeviceError(f"the GPU has failed ({error}); start this process anew, and see `dmesg`") from error
        start, found = self._address, []
        for source, num_bytes in zip(sources, sizes, strict=True):
            own = torch.empty(source.shape, dtype=source.dtype, device="cpu")
            ctypes.memmove(own.data_ptr(), start, num_bytes)
            found.append(own)
            start += num_bytes
        return found

    def _fetch(self, sources: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        start = self._address
        try:
            for source, num_bytes in zip(sources, sizes, strict=True):
                if num_bytes:
                    self._driver.download(start, source.data_ptr(), num_bytes)
                start += num_bytes
        finally:  # after an interrupt, too: nothing may still write there when the next read begins
            self.num_waits += 1
            self._driver.wait()


_FIRST_BYTES = 1 << 16


def reader_for(device: torch.device) -> Reader:
    """The reader of a device that computes."""
    return CudaReader(CudaDriver(device)) if device.type == "cuda" else HostReader()


def as_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A tensor on the host, no copy; bfloat16, which numpy lacks, as float32."""
    found: npt.NDArray[Any] = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return found


def upload(values: torch.Tensor | npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """`values` of the host on the device, where the host is that: themselves. They may be written again at once."""
    tensor = torch.as_tensor(values)
    return tensor if device.type == "cpu" else _uploader(device)(tensor)


class CudaUploader:
    """Sends tensors of the host to a GPU, through pinned memory in two halves and on the thread's current stream.

    A half is written again once what was copied out of it has arrived, which it nearly always has: the host waits only
    for a device that is a whole half behind. torch's own way takes pinned memory from a pool for each tensor, records
    an event when that is given back, asks for it later, and enqueues a copy that takes the host ten times as long.
    """

    def __init__(self, device: torch.device, half_bytes: int = 1 << 20) -> None:
        self._device, self._half_bytes, self._driver = device, half_bytes, CudaDriver(device)
        self._memory = self._driver.pinned(2 * half_bytes)
        self._events = (torch.cuda.Event(), torch.cuda.Event())  # recorded when a half was left
        self._half, self._end_bytes = 0, 0
        self._stream = self._driver.stream
        self._lock = threading.Lock()

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """`values` on the device, contiguous."""
        num_bytes = values.nbytes
        if num_bytes > self._half_bytes:
            return values.pin_memory().to(self._device, non_blocking=True)
        values, there = values.contiguous(), torch.empty(values.shape, dtype=values.dtype, device=self._device)
        if num_bytes:
            with self._lock:
                source = self._room(num_bytes)
                ctypes.memmove(source, values.data_ptr(), num_bytes)
                self._driver.upload(there.data_ptr(), source, num_bytes, self._stream.cuda_stream)
        return there

    def _room(self, num_bytes: int) -> int:
        """The address of so many bytes that nothing reads any more. All copies out of a half are on one stream."""
        stream = self._driver.stream
        if stream is not self._stream or self._end_bytes + num_bytes > self._half_bytes:
            self._events[self._half].record(self._stream)
            self._events[1 - self._half].synchronize()  # before it is taken: an interrupt here must not leave it unread
            self._half, self._end_bytes, self._stream = 1 - self._half, 0, stream
        start = self._half * self._half_bytes + self._end_bytes
        self._end_bytes += -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return self._memory.data_ptr() + start


_ALIGNMENT_BYTES = 64
_uploaders: dict[torch.device, CudaUploader] = {}


def _uploader(device: torch.device) -> CudaUploader:
    """The same for all threads, also for those that ask first at once: one that was replaced would go, and its memory
    to others, while it is copied from."""
    known = _uploaders.get(device)
    return known if known is not None else _uploaders.setdefault(device, CudaUploader(device))
