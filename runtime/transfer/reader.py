"""Reads byte ranges of files into memory: past the page cache where the file system allows it (O_DIRECT).

O_DIRECT wants file offset, length and memory on multiples of the page, so a range is read as its aligned superset.
Where memory and file agree modulo the page, whole pages go straight to their place and only the two ends through the
bounce buffer; else all of it goes through the bounce buffer. Each is one read.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from runtime.errors import CheckpointError
from runtime.transfer.layout import Segment
from runtime.transfer.slots import PAGE_BYTES

_O_DIRECT: int = getattr(os, "O_DIRECT", 0)

BACKOFF_S = (0.01, 0.05)
"""How long to wait before a read that failed or came out short is tried again; after the last one it has failed."""

Read = Callable[[int, list[memoryview], int], int]
"""The signature of `os.preadv`: descriptor, buffers, file offset → bytes read."""


class Region(NamedTuple):
    """Memory that is read into: its bytes and the address of the first."""

    buffer: memoryview
    address: int


class ReadClock(Protocol):
    """Told about every read."""

    def begin(self, num_bytes: int) -> None:
        """A read of `num_bytes` starts now."""

    def end(self) -> None:
        """It has ended, well or not."""

    def retry(self) -> None:
        """It was not well and is tried again."""


class ReadFailure(Exception):
    """A read failed or came out short for good; the message says what, where, how much and how often."""


def bounce_region(piece_bytes: int) -> Region:
    """A page-aligned buffer for one thread, large enough for any piece of `cut(…, piece_bytes)`."""
    mapping = mmap.mmap(-1, (2 * piece_bytes // PAGE_BYTES + 3) * PAGE_BYTES)
    return Region(memoryview(mapping), ctypes.addressof(ctypes.c_char.from_buffer(mapping)))


def cut(segment: Segment, piece_bytes: int) -> list[Segment]:
    """Cut a segment at pages of the file into equal pieces of about `piece_bytes` (up to 1.5 times that)."""
    file, offset, num_bytes, slot_offset = segment
    first, end = offset // PAGE_BYTES * PAGE_BYTES, offset + num_bytes
    num_pieces = max(1, round((end - first) / piece_bytes))
    step = -(-(end - first) // (num_pieces * PAGE_BYTES)) * PAGE_BYTES
    cuts = [offset, *range(first + step, end, step), end]
    return [Segment(file, a, b - a, slot_offset + a - offset) for a, b in pairwise(cuts)]


class FileReader:
    """The open files of a store; each is opened once and shared by all threads.

    Args:
        direct: True O_DIRECT, False buffered (no read-ahead; pages are dropped from the cache after the read), None
            O_DIRECT for each file whose file system takes it.
        read: how bytes are read; `os.preadv` but for tests. sleep: how to wait before another try.

    Raises:
        CheckpointError: a file cannot be opened, or O_DIRECT was asked for and is not to be had.
    """

    def __init__(
        self,
        files: Sequence[Path],
        direct: bool | None,
        clock: ReadClock,
        read: Read = os.preadv,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._descriptors: list[int] = []
        self._is_direct: list[bool] = []
        self.files = tuple(files)
        self._clock, self._read, self._sleep = clock, read, sleep
        try:
            for file in files:
                descriptor, is_direct = _open(file, direct)
                self._descriptors.append(descriptor)
                self._is_direct.append(is_direct)
        except BaseException:
            self.close()
            raise

    @property
    def is_direct(self) -> bool:
        """True when every file is read with O_DIRECT."""
        return all(self._is_direct)

    def read(self, segment: Segment, target: Region, bounce: Region) -> None:
        """Read `segment` into `target` at its `slot_offset`; at most 2 pieces' worth of bytes.

        Raises:
            ReadFailure: see there.
        """
        if not self._is_direct[segment.file]:
            self._read_buffered(segment, target)
        elif (target.address + segment.slot_offset - segment.offset) % PAGE_BYTES or segment.num_bytes < 2 * PAGE_BYTES:
            self._read_bounced(segment, target, bounce)
        else:
            self._read_straight(segment, target, bounce)

    def close(self) -> None:
        """Close the files. Idempotent; nobody may be reading."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __del__(self) -> None:
        self.close()

    def _read_buffered(self, segment: Segment, target: Region) -> None:
        file, offset, num_bytes, at = segment
        self._checked_read(segment, [target.buffer[at : at + num_bytes]], offset)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptors[file], offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def _read_bounced(self, segment: Segment, target: Region, bounce: Region) -> None:
        _, offset, num_bytes, at = segment
        head_bytes = offset % PAGE_BYTES
        span_bytes = -(-(head_bytes + num_bytes) // PAGE_BYTES) * PAGE_BYTES
        self._checked_read(segment, [bounce.buffer[:span_bytes]], offset - head_bytes)
        ctypes.memmove(target.address + at, bounce.address + head_bytes, num_bytes)

    def _read_straight(self, segment: Segment, target: Region, bounce: Region) -> None:
        _, offset, num_bytes, at = segment
        head_bytes, tail_bytes = -offset % PAGE_BYTES, (offset + num_bytes) % PAGE_BYTES
        buffers = [target.buffer[at + head_bytes : at + num_bytes - tail_bytes]]
        if head_bytes:
            buffers.insert(0, bounce.buffer[:PAGE_BYTES])
        if tail_bytes:
            buffers.append(bounce.buffer[PAGE_BYTES : 2 * PAGE_BYTES])
        self._checked_read(segment, buffers, offset // PAGE_BYTES * PAGE_BYTES)
        start = target.address + at
        if head_bytes:
            ctypes.memmove(start, bounce.address + PAGE_BYTES - head_bytes, head_bytes)
        if tail_bytes:
            ctypes.memmove(start + num_bytes - tail_bytes, bounce.address + PAGE_BYTES, tail_bytes)

    def _checked_read(self, segment: Segment, buffers: list[memoryview], start: int) -> None:
        """Read `buffers` from byte `start`; they may reach beyond the end of the file, `segment` may not."""
        what = self._try_read(segment, buffers, start)
        for pause_s in BACKOFF_S:
            if what is None or self._is_cut(segment):
                break
            self._clock.retry()
            self._sleep(pause_s)
            what = self._try_read(segment, buffers, start)
        if what is None:
            return
        where = f"{self.files[segment.file]}: {segment.num_bytes} bytes from byte {segment.offset}"
        if self._is_cut(segment):
            raise ReadFailure(f"{where} wanted, {what}: the file is shorter than it was; download it again")
        raise ReadFailure(f"{where} could not be read in {len(BACKOFF_S) + 1} attempts ({what}); check the disk")

    def _try_read(self, segment: Segment, buffers: list[memoryview], start: int) -> str | None:
        """What went wrong, if anything did."""
        self._clock.begin(sum(buffer.nbytes for buffer in buffers))
        try:
            got_bytes = self._read(self._descriptors[segment.file], buffers, start)
        except OSError as error:
            return str(error.strerror or error)
        finally:
            self._clock.end()
        is_whole = start + got_bytes >= segment.offset + segment.num_bytes
        return None if is_whole else f"got {max(0, got_bytes - (segment.offset - start))}"

    def _is_cut(self, segment: Segment) -> bool:
        """True when the file does not hold all of `segment` any more: to try again is of no use."""
        try:
            return os.fstat(self._descriptors[segment.file]).st_size < segment.offset + segment.num_bytes
        except OSError:
            return False


def _open(file: Path, direct: bool | None) -> tuple[int, bool]:
    try:
        if direct is not False and (descriptor := _open_direct(file)) is not None:
            return descriptor, True
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened ({error.strerror}); check the path and its rights") from error
    if direct:
        os.close(descriptor)
        raise CheckpointError(
            f"{file}: its file system does not take O_DIRECT; leave `direct` unset for buffered reads"
        )
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor, False


def _open_direct(file: Path) -> int | None:
    """A descriptor of which a page could be read with O_DIRECT, None when the file system does not take it."""
    if not _O_DIRECT:
        return None
    descriptor: int | None = None
    probe: Any = mmap.mmap(-1, PAGE_BYTES)
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT)
        os.preadv(descriptor, [probe], 0)
        return descriptor
    except OSError as error:
        if descriptor is not None:
            os.close(descriptor)
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return None
