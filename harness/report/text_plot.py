"""The Pareto plot for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.search.outcome import Limits, Tried, feasible, front

_WIDTH, _HEIGHT = 60, 15
_MARGIN = 8


def text_pareto(
    tried: Sequence[Tried], limits: Limits, default: Tried | None, chosen: Tried | None, *, memory: str = "memory"
) -> str:
    """Latency (logarithmic) against peak memory in characters; empty with fewer than two configurations."""
    if len(tried) < 2:
        return ""
    limit = None if limits.max_memory_bytes is None else limits.max_memory_bytes / 1e6
    peaks = [one.peak_memory_bytes / 1e6 for one in tried] + ([] if limit is None else [limit])
    latencies = [one.latency_ms_p50 for one in tried]
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]

    def row(peak_mb: float) -> int:
        return _HEIGHT - 1 - _step(peak_mb, min(peaks), max(peaks), _HEIGHT)

    if limit is not None:
        grid[row(limit)] = ["-"] * _WIDTH
    within = feasible(tried, limits)
    layers = [("x", [one for one in tried if not limits.allow(one)]), (".", within), ("o", front(within))]
    layers += [(mark, [] if one is None else [one]) for mark, one in (("D", default), ("*", chosen))]
    for mark, ones in layers:
        for one in ones:
            column = _step(math.log(one.latency_ms_p50), math.log(min(latencies)), math.log(max(latencies)), _WIDTH)
            grid[row(one.peak_memory_bytes / 1e6)][column] = mark
    axis = {0: max(peaks), _HEIGHT // 2: (min(peaks) + max(peaks)) / 2, _HEIGHT - 1: min(peaks)}
    lines = [
        (f"{axis[i]:{_MARGIN - 1}.0f} " if i in axis else " " * _MARGIN) + "|" + "".join(cells).rstrip()
        for i, cells in enumerate(grid)
    ]
    first, middle, last = (
        f"{ms:.4g}" for ms in (min(latencies), math.sqrt(min(latencies) * max(latencies)), max(latencies))
    )
    numbers = f"{first}{middle:^{_WIDTH - len(first) - len(last)}}{last}"
    marks = {
        "o": "Pareto front",
        ".": "tried",
        "x": "exceeds a limit",
        "D": "default",
        "*": "chosen",
        "-": "memory limit",
    }
    drawn = {cell for cells in grid for cell in cells}
    legend = "  ".join(f"{mark} {name}" for mark, name in marks.items() if mark in drawn)
    foot = [
        " " * _MARGIN + "+" + "-" * _WIDTH,
        " " * (_MARGIN + 1) + numbers + " ms",
        " " * (_MARGIN + 1) + f"{'latency per output token, p50 (log scale)':^{_WIDTH}}".rstrip(),
        legend,
    ]
    return "\n".join([f"{'MB':>{_MARGIN - 1}}  peak {memory}", *lines, *foot])


def _step(value: float, low: float, high: float, steps: int) -> int:
    return round((value - low) / (high - low) * (steps - 1)) if high > low else 0
