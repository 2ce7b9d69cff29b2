"""Statistics of repeated measurements: pure, deterministic, shared by the tuner, the bench and the CI gate.

The comparison is the median log-ratio of interleaved pairs: drift hits both members of a pair, and a few disturbed
pairs do not move a median. A figure that is shown has a percentile bootstrap interval. That one is a little too narrow
for few pairs, so that what is claimed or decided goes by the interval between two order statistics, which holds for any
noise, or, where pairs come in groups that share some of it, by the medians of the groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

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
        if self.num_pairs == 1:
            return f"{self.estimate:.2f}, one pair"  # whose interval would be no wider than a point
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


@dataclass(frozen=True)
class GroupedRatio:
    """How many times one quantity is another, from the median log-ratios of groups of pairs, by Student's t.

    Attributes:
        log_estimate: mean of the groups' medians. log_error: its standard error.
    """

    log_estimate: float
    log_error: float
    num_groups: int
    num_pairs: int

    @property
    def estimate(self) -> float:
        """Geometric mean of the groups' median ratios."""
        return math.exp(self.log_estimate)

    def bound(self, confidence: float) -> float:
        """What the true ratio is below, with that confidence; for 1 - confidence, what it is above with confidence."""
        return math.exp(self.log_estimate + float(stdtrit(self.num_groups - 1, confidence)) * self.log_error)

    def p_at_most(self, ratio: float) -> float:
        """How likely so high an estimate, or a higher one, would be if the true ratio were at most `ratio`."""
        above = self.log_estimate - math.log(ratio)
        if not self.log_error:
            return 0.0 if above > 0 else 1.0
        return float(stdtr(self.num_groups - 1, -above / self.log_error))


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


def robust_deviation(values: npt.NDArray[np.float64]) -> float:
    """Standard deviation by the median absolute deviation, as it is for normal noise; spikes hardly move it."""
    return float(np.median(np.abs(values - np.median(values)))) / NormalDist().inv_cdf(0.75)


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


def median_half_width(
    numerators: Sequence[float], denominators: Sequence[float], *, confidence: float, num_pairs: int
) -> float:
    """Half the width, as a share, that the interval of the median ratio of `num_pairs` pairs like these has, if they
    are independent.

    From their scatter alone, as for normal noise. It varies far less from sample to sample than the width of any
    interval that is made from the few values in the middle, so that a limit can be set to it.

    Raises:
        ValueError: no pairs, unequal lengths, or a value that is not positive.
    """
    error = math.sqrt(math.pi / 2 / num_pairs) * robust_deviation(_log_ratios(numerators, denominators))
    return math.expm1(NormalDist().inv_cdf((1 + confidence) / 2) * error)


def grouped_ratio(numerators: Sequence[float], denominators: Sequence[float], groups: Sequence[int]) -> GroupedRatio:
    """Of pairs in groups, such as those that the same two processes ran: a process may be faster or slower than others
    of the same program as long as it lives, which its pairs, however many, cannot show.

    So the groups are what is repeated (Kalibera and Jones, "Rigorous benchmarking in reasonable time", 2013). That
    their medians are not quite normal matters little (harness/checks/monte_carlo.py measures it).

    Args:
        numerators, denominators: positive, one pair per index, measured close in time.
        groups: of each pair; any numbers.

    Raises:
        ValueError: fewer than two groups, unequal lengths, or a value that is not positive.
    """
    logs, names = _log_ratios(numerators, denominators), np.asarray(groups)
    if names.size != logs.size:
        raise ValueError(f"{logs.size} pairs and {names.size} groups")
    order = np.argsort(names, kind="stable")
    starts = np.flatnonzero(np.diff(names[order])) + 1
    if not starts.size:
        raise ValueError("one group alone does not show how far groups differ")
    medians = np.array([np.median(group) for group in np.split(logs[order], starts)])
    error = float(medians.std(ddof=1)) / math.sqrt(medians.size)
    return GroupedRatio(float(medians.mean()), error, medians.size, logs.size)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for being so many, in the same order (Holm, 1979): the chance that any of those below some level is so
    by accident is at most that level, however they depend on each other."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


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
