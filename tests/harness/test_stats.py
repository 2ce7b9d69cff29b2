"""Statistics with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from harness.measure.stats import (
    exact_confidence,
    exact_ratio,
    grouped_ratio,
    holm,
    median,
    median_half_width,
    paired_difference,
    paired_ratio,
    robust_deviation,
    summarize,
)


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


def test_a_ratio_of_one_pair_claims_no_interval() -> None:
    assert str(paired_ratio([3.0], [2.0])) == "1.50, one pair"
    assert str(paired_ratio([3.0, 3.0], [2.0, 2.0])) == "1.50 [1.50, 1.50]"


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


@pytest.mark.parametrize(
    ("num_pairs", "confidence", "ends"),
    [
        (1, 0.0, (1, 1)),
        (5, 0.9375, (1, 5)),  # the range: more cannot be had
        (6, 0.96875, (1, 6)),
        (8, 0.9921875, (1, 8)),
        (9, 0.9609375, (2, 8)),
        (12, 1 - 2 * (1 + 12 + 66) / 4096, (3, 10)),
        (20, 1 - 2 * 21700 / 2**20, (6, 15)),
    ],
)
def test_the_exact_interval_lies_between_the_order_statistics_of_the_textbook(
    num_pairs: int, confidence: float, ends: tuple[int, int]
) -> None:
    ratio = exact_ratio([float(n) for n in range(num_pairs, 0, -1)], [1.0] * num_pairs)
    assert (ratio.low, ratio.high) == pytest.approx(ends) and ratio.num_pairs == num_pairs
    assert exact_confidence(num_pairs) == pytest.approx(confidence)


def test_the_exact_interval_covers_the_truth_whatever_the_noise() -> None:
    rng, covered = np.random.default_rng(3), 0
    for _ in range(1000):
        noise = rng.standard_cauchy(9)  # no mean, no variance
        ratio = exact_ratio(np.exp(np.log(1.5) + np.clip(noise, -50, 50)).tolist(), [1.0] * 9)
        covered += ratio.low <= 1.5 <= ratio.high
    # 96.1 % of 1000, with three standard deviations of 0.6 %.
    assert abs(covered - 1000 * exact_confidence(9)) <= 19


def test_less_confidence_is_a_narrower_exact_interval() -> None:
    top = [float(n) for n in range(1, 13)]
    wide, narrow = exact_ratio(top, [1.0] * 12), exact_ratio(top, [1.0] * 12, confidence=0.8)
    assert wide.low < narrow.low < narrow.estimate == wide.estimate < narrow.high < wide.high
    assert 0.8 <= exact_confidence(12, 0.8) < 0.95


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0])])
def test_what_makes_no_pairs_is_refused(top: list[float], bottom: list[float]) -> None:
    for ratio in (paired_ratio, exact_ratio):
        with pytest.raises(ValueError):
            ratio(top, bottom)


def test_groups_count_not_their_pairs() -> None:
    # Medians of the groups: 1, e and e^2, so a mean of 1 and a standard error of 1 / sqrt(3) on the logarithms.
    groups = [7, 3, 5, 7, 3, 5, 7, 3, 5]
    logs = [0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 9.0, -9.0, 2.0]
    found = grouped_ratio(np.exp(logs).tolist(), [1.0] * 9, groups)
    assert (found.num_groups, found.num_pairs) == (3, 9)
    assert (found.log_estimate, found.log_error) == pytest.approx((1.0, 1 / np.sqrt(3)))
    # Student's t with 2 degrees of freedom: 2.919986 at 95 %.
    assert np.log(found.bound(0.95)) == pytest.approx(1 + 2.919986 / np.sqrt(3))
    assert np.log(found.bound(0.05)) == pytest.approx(1 - 2.919986 / np.sqrt(3))
    assert found.bound(0.5) == pytest.approx(found.estimate) == pytest.approx(np.e)
    assert found.p_at_most(found.bound(0.05)) == pytest.approx(0.05)
    assert found.p_at_most(np.e) == pytest.approx(0.5)


def test_the_half_width_of_a_median_is_about_that_of_its_bootstrap_and_steadier() -> None:
    widths, bootstrapped = [], []
    for seed in range(100):
        top = np.exp(np.random.default_rng(seed).normal(0, 0.02, 60)).tolist()
        ratio = paired_ratio(top, [1.0] * 60, confidence=0.9)
        widths.append(median_half_width(top, [1.0] * 60, confidence=0.9, num_pairs=60))
        bootstrapped.append((ratio.high / ratio.low) ** 0.5 - 1)
    # 1.645 standard errors of a median, each 1.2533 * 2 % / sqrt(60).
    assert np.mean(widths) == pytest.approx(0.0053, rel=0.05) == pytest.approx(np.mean(bootstrapped), rel=0.1)
    assert np.std(widths) < 0.7 * np.std(bootstrapped)


def test_spikes_hardly_move_the_robust_deviation() -> None:
    values = np.random.default_rng(0).normal(0, 1, 1000)
    assert robust_deviation(values) == pytest.approx(1, rel=0.1)
    values[:60] += 50
    assert robust_deviation(values) == pytest.approx(1, rel=0.2) and values.std() > 5


def test_groups_that_agree_leave_no_doubt() -> None:
    found = grouped_ratio([2.0] * 4, [1.0] * 4, [0, 0, 1, 1])
    assert found.bound(0.01) == found.bound(0.99) == pytest.approx(2.0)
    assert found.p_at_most(1.9) == 0 and found.p_at_most(2.1) == 1


@pytest.mark.parametrize(
    ("top", "groups", "said"),
    [([1.0, 2.0], [0, 0], "one group"), ([1.0, 2.0], [0], "2 pairs and 1"), ([0.0, 2.0], [0, 1], "positive")],
)
def test_what_makes_no_groups_is_refused(top: list[float], groups: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        grouped_ratio(top, [1.0, 1.0], groups)


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .5, times 4 3 2 1, never falling.
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9]) and holm([0.7, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_differences_are_paired_and_may_be_nothing() -> None:
    difference = paired_difference([0.9, 0.5, 0.0], [0.4, 0.0, 0.0])
    assert difference.estimate == pytest.approx(0.5) and difference.num_pairs == 3
    assert 0.0 <= difference.low <= difference.estimate <= difference.high == pytest.approx(0.5)
    with pytest.raises(ValueError, match="0 and 1 samples"):
        paired_difference([], [1.0])
