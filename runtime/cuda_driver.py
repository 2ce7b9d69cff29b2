"""Calls of an NVIDIA driver by ctypes, where torch's own take the host several times as long and run in every layer."""

from __future__ import annotations

import contextlib
import ctypes

import torch


class CudaDriver:
    """Copies to and from one GPU. Every call but `wait` returns at once; all may raise RuntimeError."""

    def __init__(self, device: torch.device) -> None:
        library, self._device = ctypes.CDLL("libcuda.so.1"), device
        self._upload, self._download = library.cuMemcpyHtoDAsync_v2, library.cuMemcpyDtoHAsync_v2
        self._upload.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        self._download.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
        self._synchronize = library.cuStreamSynchronize
        self._synchronize.argtypes = (ctypes.c_void_p,)
        self._stream, self._handle = torch.cuda.default_stream(device), -1
        self._is_only = torch.cuda.device_count() == 1

    @property
    def stream(self) -> torch.cuda.Stream:
        """The calling thread's current one. Asking torch for its handle is many times faster than for the stream."""
        if (handle := self._current_handle()) != self._handle:
            self._stream, self._handle = torch.cuda.current_stream(self._device), handle
        return self._stream

    def upload(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Copy from pinned host memory to the device, in turn with what is enqueued on the stream of that handle."""
        with self._context():
            _check(self._upload(target, source, num_bytes, stream), num_bytes)

    def download(self, target: int, source: int, num_bytes: int) -> None:
        """Copy from the device to pinned host memory, in turn with what is enqueued on the current stream."""
        with self._context():
            _check(self._download(target, source, num_bytes, self._current_handle()), num_bytes)

    def wait(self) -> None:
        """Block until everything that is enqueued on the current stream has ended."""
        with self._context():
            _check(self._synchronize(self._current_handle()))

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Page-locked host memory, uint8 [num_bytes]."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def _current_handle(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self._device.index)

    def _context(self) -> contextlib.AbstractContextManager[object]:
        """The driver takes the thread's current device; with one GPU it can be no other."""
        is_current = self._is_only or torch.cuda.current_device() == self._device.index
        return _NO_CONTEXT if is_current else torch.cuda.device(self._device)


_NO_CONTEXT = contextlib.nullcontext()


def _check(error: int, num_bytes: int = 0) -> None:
    if error:
        what = f"{num_bytes} bytes could not be copied" if num_bytes else "what was enqueued has failed"
        raise RuntimeError(f"CUDA error {error}: {what}")
