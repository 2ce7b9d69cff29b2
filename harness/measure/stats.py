"""Statistics of repeated measurements: pure numpy, deterministic, shared by the tuner, the bench and the CI gate.

The comparison is the median log-ratio of interleaved pairs with a percentile bootstrap interval: drift hits both
members of a pair, and a few disturbed pairs do not move a median.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Summary:
    """Order statistics of a sample."""

    count: int
    min: float
    median: float
    max: float
    iqr: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """How many times one quantity is another: the estimate and its confidence interval."""

    estimate: float
    low: float
    high: float
    num_pairs: int

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Difference:
    """By how much one quantity is above another: the estimate and its confidence interval."""

    estimate: float
    low: float
    high: float
    num_pairs: int

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def median(samples: Sequence[float]) -> float:
    """Median; ValueError for an empty sample."""
    return summarize(samples).median


def summarize(samples: Sequence[float]) -> Summary:
    """Order statistics of `samples`; quartiles are interpolated linearly.

    Raises:
        ValueError: an empty sample.
    """
    if not len(samples):
        raise ValueError("an empty sample has no statistics")
    low, first, middle, third, high = np.quantile(np.asarray(samples, np.float64), [0, 0.25, 0.5, 0.75, 1]).tolist()
    return Summary(len(samples), low, middle, high, third - first)


def paired_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Ratio:
    """Median of `numerators[i] / denominators[i]` with a percentile bootstrap interval over the pairs.

    Works on logarithms, so that swapping the two gives exactly the inverse. The interval stays within the pairs' range.

    Args:
        numerators, denominators: positive, one pair per index, measured close in time.

    Raises:
        ValueError: no pairs, unequal lengths, or a value that is not positive.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if top.size != bottom.size or not top.size:
        raise ValueError(f"{top.size} and {bottom.size} samples do not make pairs")
    if not (top > 0).all() or not (bottom > 0).all():
        raise ValueError("ratios need positive samples")
    logs = np.log(top) - np.log(bottom)
    low, high = _interval(logs, confidence, seed)
    return Ratio(math.exp(float(np.median(logs))), math.exp(low), math.exp(high), int(logs.size))


def paired_difference(
    minuends: Sequence[float], subtrahends: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Median of `minuends[i] - subtrahends[i]` with a percentile bootstrap interval over the pairs.

    Raises:
        ValueError: no pairs, or unequal lengths.
    """
    top, bottom = np.asarray(minuends, np.float64), np.asarray(subtrahends, np.float64)
    if top.size != bottom.size or not top.size:
        raise ValueError(f"{top.size} and {bottom.size} samples do not make pairs")
    low, high = _interval(top - bottom, confidence, seed)
    return Difference(float(np.median(top - bottom)), low, high, int(top.size))


def _interval(values: npt.NDArray[np.float64], confidence: float, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the median."""
    drawn = np.random.default_rng(seed).integers(0, values.size, (NUM_RESAMPLES, values.size))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.median(values[drawn], axis=1), [tail, 1 - tail]).tolist()
    return low, high
