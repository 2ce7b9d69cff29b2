"""Weights that transformers leaves in mapped checkpoint files get memory of their own.

A mapped file that is cut while the model runs, by a download that starts anew or by a disk that fails, ends the process
(SIGBUS); one that is overwritten changes results; and memory that is short makes the system read such weights again and
again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

_ALIGNMENT = 64  # results of kernels may depend on where in it a tensor begins
_CHUNK_BYTES = 16 << 20


def copy_out(tensors: Iterable[torch.Tensor], files: Sequence[Path]) -> None:
    """Move those of `tensors` that lie in mappings of `files`, in place and piece by piece: no more than a piece is in
    memory twice. Those that are the same memory stay so."""
    ranges = _mappings(files)
    moved: dict[tuple[object, ...], torch.Tensor] = {}
    for tensor in tensors:
        at = tensor.data_ptr()
        if any(start <= at < end for start, end in ranges):
            key = (at, tensor.dtype, tensor.shape, tensor.stride())
            if key not in moved:
                moved[key] = _copy(tensor.detach())
            tensor.data = moved[key]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    at, num_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    if not tensor.is_contiguous() or at % tensor.element_size():
        return tensor.clone()
    whole = torch.empty(num_bytes + _ALIGNMENT, dtype=torch.uint8)
    first = (at - whole.data_ptr()) % _ALIGNMENT
    copy, source = whole[first : first + num_bytes], tensor.view(-1).view(torch.uint8)
    for begin in range(0, num_bytes, _CHUNK_BYTES):
        end = min(begin + _CHUNK_BYTES, num_bytes)
        copy[begin:end] = source[begin:end]
        _forget(at + begin, at + end)
    return copy.view(tensor.dtype).view(tensor.shape)


def _forget(start: int, end: int) -> None:
    """Give back the whole pages of a mapped file between two addresses; they can be read again, from the file."""
    first, past = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if past > first:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(past - first), mmap.MADV_DONTNEED)


def _mappings(files: Sequence[Path]) -> list[tuple[int, int]]:
    """The address ranges at which this process has mapped `files`; none where the system does not tell."""
    names = {os.path.realpath(file) for file in files}
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    columns = [line.split(maxsplit=5) for line in lines]
    spans = [one[0].split("-") for one in columns if len(one) == 6 and one[5] in names]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


_LIBC = ctypes.CDLL(None)
