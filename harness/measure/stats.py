"""Statistics of repeated measurements: pure numpy, deterministic, shared by the tuner, the bench and the CI gate.

The comparison is the median log-ratio of interleaved pairs: drift hits both members of a pair, and a few disturbed
pairs do not move a median. A figure that is shown has a percentile bootstrap interval. That one is a little too narrow
for few pairs, so that what is claimed or decided goes by the interval between two order statistics, which holds for any
noise.
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
    logs = _log_ratios(numerators, denominators)
    low, high = _interval(logs, confidence, seed)
    return Ratio(math.exp(float(np.median(logs))), math.exp(low), math.exp(high), int(logs.size))


def exact_ratio(numerators: Sequence[float], denominators: Sequence[float], *, confidence: float = 0.95) -> Ratio:
    """Median of `numerators[i] / denominators[i]` with an interval that holds the true one with `confidence` or more.

    It lies between two of the pairs' ratios, as many from the lowest as from the highest: the true median is outside
    only where too few pairs fall on one side of it, which is a matter of fair coins whatever the noise looks like.
    Fewer than six pairs cannot give 95 %; their interval is their range. `exact_confidence` says how sure it is.

    Args:
        numerators, denominators: positive, one pair per index, measured close in time.

    Raises:
        ValueError: no pairs, unequal lengths, or a value that is not positive.
    """
    logs = np.sort(_log_ratios(numerators, denominators))
    left_out, _ = _tails(logs.size, confidence)
    ends = math.exp(logs[left_out]), math.exp(logs[-1 - left_out])
    return Ratio(math.exp(float(np.median(logs))), *ends, int(logs.size))


def exact_confidence(num_pairs: int, confidence: float = 0.95) -> float:
    """Of the interval that `exact_ratio` gives for so many pairs (at least one): at least `confidence` from six on."""
    return 1 - 2 * _tails(num_pairs, confidence)[1]


def _tails(num_pairs: int, confidence: float) -> tuple[int, float]:
    """How many pairs lie outside the interval on each side, and the chance that the true median is below (or above).

    The median is below the interval where at most that many pairs are, and each is with a chance of one half.
    """
    left_out, chance = 0, 0.5**num_pairs
    while True:
        wider = chance + math.comb(num_pairs, left_out + 1) * 0.5**num_pairs
        if 2 * wider > 1 - confidence:
            return left_out, chance
        left_out, chance = left_out + 1, wider


def _log_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> npt.NDArray[np.float64]:
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if top.size != bottom.size or not top.size:
        raise ValueError(f"{top.size} and {bottom.size} samples do not make pairs")
    if not (top > 0).all() or not (bottom > 0).all():
        raise ValueError("ratios need positive samples")
    ratios: npt.NDArray[np.float64] = np.log(top) - np.log(bottom)
    return ratios


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
