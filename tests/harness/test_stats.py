"""Statistics with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from harness.measure.stats import median, paired_difference, paired_ratio, summarize


def test_summary_of_a_known_sample() -> None:
    summary = summarize([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (summary.count, summary.min, summary.median, summary.max, summary.iqr) == (5, 1.0, 3.0, 5.0, 2.0)


def test_median_of_an_even_sample_is_between_the_middle_two() -> None:
    assert median([1.0, 9.0, 2.0, 4.0]) == 3.0


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        summarize([])


def test_a_constant_ratio_has_no_interval() -> None:
    ratio = paired_ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert (ratio.estimate, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_the_middle_ratio_counts_not_the_ratio_of_the_middles() -> None:
    # Pairs 2, 2, 1/8: drift that hits both members leaves the estimate at 2; the medians' ratio would be 4/3.
    assert paired_ratio([2.0, 200.0, 4.0], [1.0, 100.0, 32.0]).estimate == pytest.approx(2.0)


def test_swapping_the_members_inverts_estimate_and_interval() -> None:
    rng = np.random.default_rng(1)
    top, bottom = rng.uniform(1, 2, 11).tolist(), rng.uniform(1, 2, 11).tolist()
    there, back = paired_ratio(top, bottom), paired_ratio(bottom, top)
    assert (back.estimate, back.low, back.high) == pytest.approx((1 / there.estimate, 1 / there.high, 1 / there.low))


def test_the_interval_is_the_same_every_time_and_within_the_pairs() -> None:
    top, bottom = [1.0, 1.2, 0.9, 1.1, 1.3], [1.0, 1.0, 1.0, 1.0, 1.0]
    first, second = paired_ratio(top, bottom), paired_ratio(top, bottom)
    assert first == second
    assert 0.9 - 1e-12 <= first.low <= first.estimate <= first.high <= 1.3 + 1e-12


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(7), 0
    for _ in range(100):
        noise = rng.normal(0, 0.05, 20)
        ratio = paired_ratio(np.exp(np.log(1.5) + noise).tolist(), [1.0] * 20)
        covered += ratio.low <= 1.5 <= ratio.high
    assert 88 <= covered <= 100


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0])])
def test_what_makes_no_pairs_is_refused(top: list[float], bottom: list[float]) -> None:
    with pytest.raises(ValueError):
        paired_ratio(top, bottom)


def test_differences_are_paired_and_may_be_nothing() -> None:
    difference = paired_difference([0.9, 0.5, 0.0], [0.4, 0.0, 0.0])
    assert difference.estimate == pytest.approx(0.5) and difference.num_pairs == 3
    assert 0.0 <= difference.low <= difference.estimate <= difference.high == pytest.approx(0.5)
    with pytest.raises(ValueError, match="0 and 1 samples"):
        paired_difference([], [1.0])
