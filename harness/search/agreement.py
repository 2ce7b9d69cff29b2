"""How well foretold latencies agree with measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import kendalltau

from harness.measure.stats import median
from harness.search.outcome import Record, Tried
from harness.search.space import Params, params_key

MIN_PAIRS = 8
"""Below which Kendall's tau says nothing."""


@dataclass(frozen=True)
class Agreement:
    """`pairs` are (simulated, measured) latencies in ms, one per configuration.

    `rank_correlation` is Kendall's tau, `median_error` the median of |simulated / measured - 1|.
    """

    pairs: tuple[tuple[float, float], ...]
    rank_correlation: float
    median_error: float

    def __str__(self) -> str:
        return (
            f"Kendall's tau {self.rank_correlation:.2f}, median error {self.median_error:.0%}, "
            f"{len(self.pairs)} configurations"
        )


def agreement(simulated: Sequence[tuple[Params, float]], tried: Sequence[Tried]) -> Agreement | None:
    """Of the configurations that were both simulated and measured; None where they are too few or all alike.

    Args:
        simulated: latency in ms that was expected of a configuration; the last one of each counts.
    """
    expected = {params_key(params): latency_ms for params, latency_ms in simulated}
    measured = {params_key(one.params): one.latency_ms_p50 for one in tried}
    pairs = tuple((expected[params], latency_ms) for params, latency_ms in measured.items() if params in expected)
    if (tau := rank_correlation(pairs)) is None:
        return None
    return Agreement(pairs, tau, median([abs(one / other - 1) for one, other in pairs]))


def rank_correlation(pairs: Sequence[tuple[float, float]], *, least: int = MIN_PAIRS) -> float | None:
    """Kendall's tau; None where there are fewer than `least` pairs, or all of one side are equal."""
    if len(pairs) < least:
        return None
    tau = float(kendalltau(*zip(*pairs, strict=True)).statistic)
    return None if tau != tau else tau


def foretold(records: Sequence[Record]) -> list[tuple[Params, float]]:
    """Each configuration and the latency that was expected of it, in ms, before it ran for the first time."""
    first: dict[str, tuple[Params, float]] = {}
    for record in records:
        if record.outcome.foretold_ms is not None and not record.reused:
            first.setdefault(params_key(record.params), (record.params, record.outcome.foretold_ms))
    return list(first.values())
