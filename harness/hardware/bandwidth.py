"""Disk → RAM bandwidth as a curve over read sizes, on the model's own files, and through the engine's transfer.

Reads go to random offsets. Buffered reads are preceded by dropping the file from the page cache. A series (one number
of threads, one way of reading) is fitted by t = a + bytes / B, Theil-Sen over its points.
"""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

from harness.hardware.compute import computing
from harness.measure.stats import median
from runtime import machine

PAGE_BYTES = mmap.PAGESIZE
SIZES = tuple(4 << 10 << 2 * power for power in range(10))
"""4 KiB … 1 GiB."""
THREADS = (1, 2, 4)
_clock = time.perf_counter
_MEMORY_SHARE = 1 / 8
"""Of the memory that is available, what buffers may take."""


@dataclass(frozen=True)
class Point:
    """Reads of one size: how long the median one took, and what all threads got together."""

    num_bytes: int
    num_reads: int
    read_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Series:
    """The curve of one number of threads and one way of reading, `under_load` while another thread computes.

    The asymptote is that of all threads together; the fit is None where the points do not rise.
    """

    threads: int
    direct: bool
    under_load: bool
    points: tuple[Point, ...]
    latency_s: float | None
    asymptote_bytes_per_s: float | None


@dataclass(frozen=True)
class Curve:
    """All series of a probe.

    Attributes:
        engine_bytes_per_s: through the engine's own transfer, at `expert_bytes`.
        counted_share: of all bytes that were read, those that the kernel counted as read from a disk (it may read
            ahead: above 1); None where it does not count.
    """

    expert_bytes: int
    series: tuple[Series, ...]
    engine_bytes_per_s: float
    counted_share: float | None

    @property
    def best_bytes_per_s(self) -> float:
        """The highest rate of any point that was measured without load."""
        return max(point.bytes_per_s for one in self.series if not one.under_load for point in one.points)

    def bytes_per_s(self, threads: int) -> float:
        """At about the size of an expert, of so many threads or the nearest number, the faster way of reading."""
        idle = [one for one in self.series if not one.under_load]
        nearest = min((one.threads for one in idle), key=lambda number: abs(number - threads))

        def at_expert(series: Series) -> float:
            return min(series.points, key=lambda point: abs(point.num_bytes - self.expert_bytes)).bytes_per_s

        return max(at_expert(one) for one in idle if one.threads == nearest)


def measure_curve(
    files: Sequence[Path], expert_bytes: int, engine_bytes_per_s: float, *, budget_s: float = 6.0, seed: int = 0
) -> Curve:
    """Measure every series in about `budget_s` seconds: O_DIRECT and buffered with 1, 2 and 4 threads, then the fastest
    of them at expert size once more while another thread computes.

    Sizes that no file has, that memory has no room for or that there is no time for are left out; the expert's is not.

    Args:
        files: read from, never written. O_DIRECT is left out where one of them does not take it.

    Raises:
        OSError: a file cannot be opened or read.
    """
    ways = (True, False) if all(takes_direct(file) for file in files) else (False,)
    series_s = budget_s / (len(ways) * len(THREADS) + 1)
    reader = _Reader(files, _up(expert_bytes), random.Random(seed))
    before = machine.bytes_read_from_disk()
    series = [reader.series(threads, direct, series_s) for direct in ways for threads in THREADS]
    best = max(series, key=lambda one: reader.at_expert(one).bytes_per_s)
    with computing():
        series.append(reader.series(best.threads, best.direct, series_s, under_load=True))
    after = machine.bytes_read_from_disk()
    counted = None if before is None or after is None else (after - before) / reader.num_bytes
    return Curve(expert_bytes, tuple(series), engine_bytes_per_s, counted)


def fit(points: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Latency a in seconds and asymptote B in bytes per second of t = a + bytes / B (Theil-Sen), or twice None.

    Args:
        points: (bytes, seconds) of at least one read size each; fewer than two sizes cannot be fitted.
    """
    slopes = [(t2 - t1) / (b2 - b1) for (b1, t1), (b2, t2) in combinations(points, 2) if b1 != b2]
    if not slopes or (slope := median(slopes)) <= 0:
        return None, None
    return max(0.0, median([t - slope * b for b, t in points])), 1 / slope


def takes_direct(file: Path) -> bool:
    """True when the file system of `file` takes O_DIRECT."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except (OSError, AttributeError):
        return False
    try:
        return os.preadv(descriptor, [mmap.mmap(-1, PAGE_BYTES)], 0) > 0
    except OSError:
        return False
    finally:
        os.close(descriptor)


class _Reader:
    """Reads of several sizes from random places of `files`; `num_bytes` counts what was read."""

    def __init__(self, files: Sequence[Path], expert_bytes: int, draw: random.Random) -> None:
        self._files, self._draw, self.num_bytes = files, draw, 0
        largest = max(file.stat().st_size for file in files)
        self._expert_bytes = min(expert_bytes, largest // PAGE_BYTES * PAGE_BYTES)
        self._sizes = sorted(size for size in {*SIZES, self._expert_bytes} if size <= largest)

    def at_expert(self, series: Series) -> Point:
        """The point of a series at the size of an expert."""
        return next(point for point in series.points if point.num_bytes == self._expert_bytes)

    def series(self, threads: int, direct: bool, budget_s: float, *, under_load: bool = False) -> Series:
        """Measure one series; each size gets an equal share of the time that is left."""
        end, points = _clock() + budget_s, list[Point]()
        room_bytes = _MEMORY_SHARE * machine.available_memory_bytes()
        for number, size in enumerate(self._sizes):
            left_s = end - _clock()
            expected_s = points[-1].read_s * size / points[-1].num_bytes if points else 0.0
            if size == self._expert_bytes or (expected_s <= left_s and size * threads <= room_bytes):
                points.append(self._point(size, threads, direct, left_s / (len(self._sizes) - number)))
        latency_s, slope_bytes_per_s = fit([(point.num_bytes, point.read_s) for point in points])
        asymptote = None if slope_bytes_per_s is None else threads * slope_bytes_per_s
        return Series(threads, direct, under_load, tuple(points), latency_s, asymptote)

    def _point(self, size: int, threads: int, direct: bool, budget_s: float) -> Point:
        files = [file for file in self._files if file.stat().st_size >= size]
        seeds = [self._draw.random() for _ in range(threads)]
        buffers = [_touched(size) for _ in seeds]
        start = _clock()
        with ThreadPoolExecutor(threads) as pool:
            read = partial(_read_for, files, direct, start + budget_s)
            times = pool.map(read, buffers, seeds)
            seconds = [read_s for one in times for read_s in one]
        self.num_bytes += size * len(seconds)
        return Point(size, len(seconds), median(seconds), size * len(seconds) / (_clock() - start))


def _touched(num_bytes: int) -> mmap.mmap:
    """Memory that is there already: the first touch of a page costs as much as reading it from a fast disk."""
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0))


def _read_for(files: Sequence[Path], direct: bool, end_s: float, buffer: mmap.mmap, seed: float) -> list[float]:
    """Seconds of each read, until `end_s`; at least one."""
    draw, size = random.Random(seed), len(buffer)
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    descriptors = [os.open(file, flags) for file in files]
    seconds: list[float] = []
    try:
        while not seconds or _clock() < end_s:
            descriptor = draw.choice(descriptors)
            room = os.fstat(descriptor).st_size - size
            seconds.append(_read(descriptor, buffer, draw.randint(0, room // PAGE_BYTES) * PAGE_BYTES, direct))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return seconds


def _read(descriptor: int, buffer: mmap.mmap, offset: int, direct: bool) -> float:
    if not direct:
        # The whole file: a page that lies half in the range, as large folios do, would stay.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    if os.preadv(descriptor, [buffer], offset) != len(buffer):
        raise OSError(f"short read of {len(buffer)} bytes from byte {offset}")
    return time.perf_counter() - start


def _up(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
