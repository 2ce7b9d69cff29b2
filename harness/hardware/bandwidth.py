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
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from harness.measure.stats import median
from runtime.vocabulary import Load, LoadReason

PAGE_BYTES = mmap.PAGESIZE
SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
THREADS = (1, 2, 4)


@dataclass(frozen=True)
class Point:
    """Reads of one size: how long the median one took, and what all threads got together."""

    num_bytes: int
    num_reads: int
    read_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Series:
    """The curve of one number of threads and one way of reading.

    The asymptote is that of all threads together; the fit is None where the points do not rise.
    """

    threads: int
    direct: bool
    points: tuple[Point, ...]
    latency_s: float | None
    asymptote_bytes_per_s: float | None


@dataclass(frozen=True)
class Curve:
    """All series of a probe; `engine_bytes_per_s` is through the engine's own transfer, at `expert_bytes`."""

    expert_bytes: int
    series: tuple[Series, ...]
    engine_bytes_per_s: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure_curve(
    files: Sequence[Path], expert_bytes: int, engine_bytes_per_s: float, *, budget_s: float = 6.0, seed: int = 0
) -> Curve:
    """Measure every series in about `budget_s` seconds.

    Args:
        files: read from, never written; sizes that none of them has are left out, O_DIRECT where it is not to be had.

    Raises:
        OSError: a file cannot be opened or read.
    """
    largest = max(file.stat().st_size for file in files)
    sizes = sorted({*SIZES, _up(expert_bytes)})
    sizes = [size for size in sizes if size <= largest] or [largest // PAGE_BYTES * PAGE_BYTES]
    ways = (True, False) if all(takes_direct(file) for file in files) else (False,)
    point_s = budget_s / (len(sizes) * len(ways) * len(THREADS))
    draw = random.Random(seed)
    series = []
    for direct in ways:
        for threads in THREADS:
            points = tuple(_measure(files, size, threads, direct, point_s, draw.random()) for size in sizes)
            latency_s, slope_bytes_per_s = fit([(point.num_bytes, point.read_s) for point in points])
            asymptote = None if slope_bytes_per_s is None else threads * slope_bytes_per_s
            series.append(Series(threads, direct, points, latency_s, asymptote))
    return Curve(expert_bytes, tuple(series), engine_bytes_per_s)


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


def engine_bandwidth(model: str, *, io_threads: int, budget_s: float = 0.7, seed: int = 0) -> float:
    """Expert bytes per second that the engine's own transfer brings into slots, random experts of the model.

    Raises:
        ExpertFlowError: the checkpoint cannot be served or read.
    """
    from runtime.model import checkpoint_files, meta_model
    from runtime.transfer.disk import DiskTransfer
    from runtime.transfer.slots import SlotArena
    from runtime.transfer.store import ExpertStore

    loaded = meta_model(model)
    alike = [layer for layer in loaded.layers if layer.parameters == loaded.layers[0].parameters]
    store = ExpertStore.open(loaded.model, checkpoint_files(model), alike)
    experts = [layer * store.num_experts + i for layer, one in enumerate(alike) for i in range(one.num_experts)]
    transfer = DiskTransfer(store, SlotArena(min(4, len(experts)), store.slot_bytes), io_threads=io_threads)
    try:
        return store.expert_bytes * _experts_per_s(transfer, experts, budget_s, random.Random(seed))
    finally:
        transfer.close()


def _experts_per_s(transfer: Any, experts: Sequence[int], budget_s: float, draw: random.Random) -> float:
    num_loads, window = 0, min(4, len(experts))
    start = time.perf_counter()
    while num_loads < 2 * window or time.perf_counter() - start < budget_s:
        chosen = draw.sample(experts, window)
        transfer.submit([Load(expert, slot, LoadReason.DEMAND) for slot, expert in enumerate(chosen)])
        for expert in chosen:
            transfer.wait_any([expert])
        num_loads += window
    return num_loads / (time.perf_counter() - start)


def _measure(files: Sequence[Path], size: int, threads: int, direct: bool, budget_s: float, seed: float) -> Point:
    large = [file for file in files if file.stat().st_size >= size]
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        times = pool.map(lambda n: _read_for(large, size, direct, budget_s, seed + n), range(threads))
        seconds = [read_s for one in times for read_s in one]
    return Point(size, len(seconds), median(seconds), size * len(seconds) / (time.perf_counter() - start))


def _read_for(files: Sequence[Path], size: int, direct: bool, budget_s: float, seed: float) -> list[float]:
    """Seconds of each read, for `budget_s` seconds; at least one."""
    draw, buffer = random.Random(seed), mmap.mmap(-1, size)
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    descriptors = [os.open(file, flags) for file in files]
    seconds: list[float] = []
    end = time.perf_counter() + budget_s
    try:
        while not seconds or time.perf_counter() < end:
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
