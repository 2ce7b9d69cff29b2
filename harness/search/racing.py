"""When a trial that is still running need not be finished."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from harness.measure.stats import median
from harness.search.outcome import Tried

MIN_REQUESTS, MIN_SHARE, MAX_SHARE = 3, 0.25, 0.75
"""Finished requests before which nothing is said, and after which it is quicker to finish."""
OPTIMISM = 0.8
"""What the median latency of the finished requests may still fall to. The first ones find the cache cold, and the
median of three that spread by 10 % is 14 % too high once in forty. Other errors err on the safe side: in a closed loop
the first requests wait for fewer others, and of those outstanding the quick ones finish first."""
SAME_MEMORY = 1.01
"""Peaks of one configuration differ by about this factor from run to run."""


def hopeless(latencies_ms: Sequence[float], num_requests: int, peak_memory_bytes: int, rivals: Iterable[Tried]) -> str:
    """Why a trial cannot become better than a measured configuration in latency or memory; empty while it can.

    Args:
        latencies_ms: of the requests that have finished, of `num_requests`.
        peak_memory_bytes: so far; it can only grow.
        rivals: measured on the same requests.
    """
    if not max(MIN_REQUESTS, MIN_SHARE * num_requests) <= len(latencies_ms) <= MAX_SHARE * num_requests:
        return ""
    at_best_ms = OPTIMISM * median(latencies_ms)
    smaller = [one for one in rivals if one.peak_memory_bytes <= SAME_MEMORY * peak_memory_bytes]
    best = min(smaller, key=lambda one: one.latency_ms_p50, default=None)
    if best is None or at_best_ms <= best.latency_ms_p50:
        return ""
    return (
        f"stopped after {len(latencies_ms)} of {num_requests} requests: a median of {median(latencies_ms):.1f} ms so "
        f"far, where a configuration that needs no more memory has {best.latency_ms_p50:.1f} ms"
    )
