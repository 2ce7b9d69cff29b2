"""Calls of an NVIDIA driver by ctypes, where torch's own take the host several times as long and run in every layer."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch

from runtime.errors import DeviceError

_NO_CONTEXT_IS_CURRENT = 201  # CUDA_ERROR_INVALID_CONTEXT


class CudaDriver:
    """Copies to and from one GPU. Every call but `pin` and `wait` returns at once; all may raise RuntimeError.

    Any thread may call, also one that has not used CUDA so far.

    Args:
        device: with its index.

    Raises:
        DeviceError: this is no NVIDIA driver's GPU.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DeviceError(f"{device}: NVIDIA's driver cannot be called ({error}); compute on the CPU") from error
        self._library, self._device = library, device
        self._upload = _call(library.cuMemcpyHtoDAsync_v2, _DEVICE_POINTER, _POINTER, ctypes.c_size_t, _POINTER)
        self._download = _call(library.cuMemcpyDtoHAsync_v2, _POINTER, _DEVICE_POINTER, ctypes.c_size_t, _POINTER)
        self._synchronize = _call(library.cuStreamSynchronize, _POINTER)
        self._register = _call(library.cuMemHostRegister_v2, _POINTER, ctypes.c_size_t, ctypes.c_uint)
        self._unregister = _call(library.cuMemHostUnregister, _POINTER)
        self._stream, self._handle = torch.cuda.default_stream(device), -1
        self._is_only = torch.cuda.device_count() == 1

    @property
    def stream(self) -> torch.cuda.Stream:
        """The calling thread's current one; one thread at a time asks.

        Asking torch for its handle is many times faster than for the stream.
        """
        if (handle := self._current_handle()) != self._handle:
            self._stream, self._handle = torch.cuda.current_stream(self._device), handle
        return self._stream

    def upload(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Copy from host memory to the device, in turn with what is enqueued on the stream of that handle.

        Where the memory is not pinned the host waits until it has been read.
        """
        self._run("a copy to the GPU", self._upload, target, source, num_bytes, stream)

    def download(self, target: int, source: int, num_bytes: int) -> None:
        """Copy from the device to pinned host memory, in turn with what is enqueued on the current stream."""
        self._run("a copy from the GPU", self._download, target, source, num_bytes, self._current_handle())

    def wait(self) -> None:
        """Block until everything that is enqueued on the current stream has ended."""
        self._run("waiting for the GPU", self._synchronize, self._current_handle())

    def pin(self, address: int, num_bytes: int) -> None:
        """Lock pages of the host's memory, until `unpin`: both numbers are multiples of the page size.

        By the driver and not by torch, where a refusal is kept for whatever launches a kernel next.
        """
        self._run("pinning memory", self._register, address, num_bytes, 0)

    def unpin(self, address: int) -> None:
        """Let go of the pages that were locked from `address` on."""
        self._run("unpinning memory", self._unregister, address)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Page-locked host memory, uint8 [num_bytes]."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def _current_handle(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self._device.index)

    def _run(self, what: str, call: Any, *arguments: int) -> None:
        with self.current():
            error = call(*arguments)
            if error == _NO_CONTEXT_IS_CURRENT:  # and nothing was done
                error = self._make_current() or call(*arguments)
        if error:
            raise RuntimeError(f"CUDA error {error}{self._meaning(error)} in {what}")

    def current(self) -> contextlib.AbstractContextManager[object]:
        """Within it the GPU is the thread's current device, which the driver takes, and for which CUDA takes memory at
        a thread's first call; with one GPU it can be no other."""
        is_current = self._is_only or torch.cuda.current_device() == self._device.index
        return _NOTHING if is_current else torch.cuda.device(self._device)

    def _make_current(self) -> int:
        """Give a thread that has not used CUDA so far the context that torch uses; the driver's error."""
        device, context = ctypes.c_int(), _POINTER()
        error: int = self._library.cuDeviceGet(ctypes.byref(device), self._device.index)
        error = error or self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        return error or self._library.cuCtxSetCurrent(context)

    def _meaning(self, error: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(error, ctypes.byref(text))
        return f" ({text.value.decode()})" if text.value else ""


_NOTHING = contextlib.nullcontext()
_POINTER = ctypes.c_void_p
_DEVICE_POINTER = ctypes.c_uint64


def _call(function: Any, *types: Any) -> Any:
    function.argtypes = types
    return function
