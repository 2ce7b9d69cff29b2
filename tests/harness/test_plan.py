"""Sizes, times and pairs: arithmetic on a first short run."""

from __future__ import annotations

import pytest

from harness.search.outcome import Measurement
from harness.search.plan import (
    PILOT,
    choose_sizes,
    confirm_s,
    largest_sizes,
    num_finalists,
    num_pairs,
    parse_duration,
    timeout_s,
)
from runtime.errors import UsageError


def _pilot(tpot_ms: float) -> Measurement:
    return Measurement(tpot_ms, 2 * tpot_ms, tpot_ms, 1.0, "", 1, 1, 1.0, 1.0, PILOT.output_tokens)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("6m", 360), ("1.5h", 5400), (" 2 min", 120)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-3s", "0m", "5d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="90s, 6m or 1h"):
        parse_duration(text)


def test_a_fast_model_takes_the_largest_sizes_and_a_slow_one_the_smallest() -> None:
    fast, seconds = choose_sizes(_pilot(10), 8, 300)
    assert fast == largest_sizes(8) and seconds == pytest.approx(1 + 16 * (20 + 32 * 10) / 1e3)
    slow, _ = choose_sizes(_pilot(10_000), 8, 300)
    assert slow.num_requests == 16 and slow.context < fast.context


@pytest.mark.parametrize(("pair_s", "pairs"), [(1000, 6), (20, 9), (1, 12)])
def test_pairs_fill_their_share_of_the_time(pair_s: float, pairs: int) -> None:
    assert num_pairs(pair_s, 300) == pairs


def test_finalists_are_as_many_as_there_is_time_to_choose_among() -> None:
    assert [num_finalists(turn_s, 300) for turn_s in (100, 8, 1)] == [1, 4, 5]
    assert confirm_s(1, 300) == 2 * 12 + 6 * 4
    assert confirm_s(100, 300) == 100 * 2 * 6


def test_a_trial_is_not_given_up_early() -> None:
    assert timeout_s(1) == 120 and timeout_s(100) == 500
