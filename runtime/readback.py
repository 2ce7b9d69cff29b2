"""Between the host and the device that computes: everything that the host wants to know of a layer comes in one read.

The device works on long after its calls have returned; reading waits until it has come so far. A wait for each tensor
is a gap in the device's work for each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt
import torch

from runtime.cuda_driver import CudaDriver


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
            RuntimeError: something that was enqueued on the device before has failed.
        """
        sources = [tensor.detach().contiguous() for tensor in tensors]
        sizes = [source.nbytes for source in sources]
        if sum(sizes) > self._scratch.nbytes:
            self._scratch = self._driver.pinned(1 << (sum(sizes) - 1).bit_length())
            self._address = self._scratch.data_ptr()
        self._fetch(sources, sizes)
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


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """`array` on the device; the host does not wait for the copy."""
    there = torch.from_numpy(array)
    return there if device.type == "cpu" else there.pin_memory().to(device, non_blocking=True)
