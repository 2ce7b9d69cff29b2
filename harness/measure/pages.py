"""The page cache of files: drop it, and see what is still there."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_MAP_FAILED = ctypes.c_void_p(-1).value


def drop_pages(files: Iterable[Path]) -> None:
    """Drop the clean page cache of `files`. Pages that some process has mapped stay."""
    for path in files:
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_fraction(files: Iterable[Path]) -> float:
    """Share of the pages of all `files` together that are in the page cache, by mincore(2)."""
    counts = [_resident_pages(path) for path in files]
    total = sum(pages for _, pages in counts)
    return sum(resident for resident, _ in counts) / total if total else 0.0


def _resident_pages(path: Path) -> tuple[int, int]:
    size = path.stat().st_size
    if not size:
        return 0, 0
    num_pages = -(-size // mmap.PAGESIZE)
    flags = np.zeros(num_pages, np.uint8)
    with path.open("rb") as file:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        try:
            if _libc.mincore(address, size, flags.ctypes.data):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        finally:
            _libc.munmap(address, size)
    return int((flags & 1).sum()), num_pages
