"""Confirm a finalist: it and the default measured in turns, on text that the search has not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from harness.measure.stats import Ratio, paired_ratio
from harness.search.outcome import Kind, Measurement, Outcome
from harness.search.space import Params

Measure = Callable[[Params], Outcome]


@dataclass(frozen=True)
class Confirmation:
    """Pairs of runs, index by index, and the latency of the finalist over that of the default.

    `ratio` is None when a run failed; `failure` then says which and why.
    """

    finalist: tuple[Measurement, ...]
    default: tuple[Measurement, ...]
    ratio: Ratio | None
    failure: str = ""

    @property
    def is_proven(self) -> bool:
        """True when the whole interval of the ratio is below 1."""
        return self.ratio is not None and self.ratio.high < 1

    @property
    def confidence(self) -> float:
        """Of the interval. That of n pairs is at most their range, which holds the median with 1 - 2^(1 - n)."""
        return min(0.95, 1 - 2.0 ** (1 - len(self.default)))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "is_proven": self.is_proven, "confidence": self.confidence}


def confirm(
    measure: Measure, finalist: Params, default: Params, num_pairs: int, on_run: Callable[[str, Outcome], None]
) -> Confirmation:
    """Run `num_pairs` pairs in the order ABBA (A the default), so that drift hits both alike; stop at a failure.

    Args:
        on_run: told about every run, by the name of its configuration.
    """
    runs: dict[str, list[Measurement]] = {"default": [], "finalist": []}
    configurations = {"default": default, "finalist": finalist}
    for name in _abba(num_pairs):
        outcome = measure(configurations[name])
        on_run(name, outcome)
        if outcome.kind is not Kind.OK:
            failure = f"the {name} ended with {outcome.kind} on the text kept for confirming: {outcome.message}"
            return Confirmation(tuple(runs["finalist"]), tuple(runs["default"]), None, failure)
        runs[name].append(outcome.measurement)
    latencies = [[run.latency_ms_p50 for run in runs[name]] for name in ("finalist", "default")]
    return Confirmation(tuple(runs["finalist"]), tuple(runs["default"]), paired_ratio(*latencies))


def _abba(num_pairs: int) -> Iterator[str]:
    for pair in range(num_pairs):
        yield from ("default", "finalist") if pair % 2 == 0 else ("finalist", "default")
