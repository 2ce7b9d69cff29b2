"""The bound: the formula by hand, Belady against exhaustive search, the ladder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.hardware.bound import DecodeWork, Ladder, oracle_misses
from harness.measure.stats import Ratio, paired_ratio


def _work(**changes: float) -> DecodeWork:
    known = {"dense_bytes": 100, "expert_bytes": 10, "num_layers": 4, "top_k": 2}
    return DecodeWork(**{**known, "memory_bytes_per_s": 90.0, "link_bytes_per_s": 20.0, **changes})


def test_each_term_can_be_the_bound() -> None:
    work = _work()
    assert work.seconds_per_token(0) == pytest.approx((100 + 4 * 2 * 10) / 90)
    assert work.seconds_per_token(8) == pytest.approx(8 * 10 / 20)
    computed = _work(computed_in_place=1, host_compute_bytes_per_s=4.0)
    assert computed.seconds_per_token(0) == pytest.approx(4 * 1 * 10 / 4.0)  # the first term fell to 140 / 90
    assert _work(host_bytes=600, host_bytes_per_s=100.0).seconds_per_token(0) == pytest.approx(6.0)


def test_belady_evicts_what_is_needed_last() -> None:
    # Two slots, one expert a step; 0 and 1 are free. 2 replaces 0 (needed last), 0 comes back once: two loads.
    assert oracle_misses([[0], [1], [2], [1], [2], [0]], 2) == 2


def test_contents_at_the_start_are_free() -> None:
    assert oracle_misses([[0, 1], [2], [0, 1], [2]], 3) == 0


def test_experts_of_the_running_step_are_kept() -> None:
    # 0 and 1 are used in the step that brings 2; the oracle must not evict 2 or 0 for 1 while 9 is there.
    assert oracle_misses([[9], [0, 1], [0, 1], [0, 1]], 2) == 1


def test_a_step_larger_than_the_slots_is_served_in_waves() -> None:
    assert oracle_misses([[0, 1, 2]], 1) == 2
    assert oracle_misses([[0, 1], [0, 1]], 1) == 2  # 1 stays and is used first


def test_nothing_demanded_is_nothing_missed() -> None:
    assert oracle_misses([], 4) == 0


def _fewest_loads(demands: Sequence[Sequence[int]], num_slots: int) -> int:
    """Exhaustive search, for steps that fit the slots: the fewest loads over all starts and evictions."""
    experts = sorted({expert for step in demands for expert in step})
    num_slots = min(num_slots, len(experts))
    cost = {frozenset(contents): 0 for contents in combinations(experts, num_slots)}
    for step in demands:
        after: dict[frozenset[int], int] = {}
        for contents, loads in cost.items():
            missing = set(step) - contents
            for evicted in combinations(sorted(contents - set(step)), len(missing)):
                reached = (contents - set(evicted)) | missing
                after[reached] = min(after.get(reached, 10**9), loads + len(missing))
        cost = after
    return min(cost.values())


@settings(max_examples=150, deadline=None)
@given(
    demands=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=2, unique=True), min_size=1, max_size=10),
    num_slots=st.integers(2, 4),
)
def test_no_schedule_loads_less(demands: list[list[int]], num_slots: int) -> None:
    assert oracle_misses(demands, num_slots) == _fewest_loads(demands, num_slots)


def _ladder(fraction: Ratio, oracle: float | None = 40.0) -> Ladder:
    return Ladder(bound_oracle=oracle, bound_own=30.0, attainable=20.0, measured=17.0, fraction=fraction)


def test_the_ladder_has_four_rungs_and_the_fraction() -> None:
    lines = _ladder(paired_ratio([17.0, 17.0], [20.0, 20.0])).table().splitlines()
    assert [line.split()[-2:] for line in lines[1:5]] == [
        ["40.00", "2.00"],
        ["30.00", "1.50"],
        ["20.00", "1.00"],
        ["17.00", "0.85"],
    ]
    assert lines[5].endswith("0.85 [0.85, 0.85]")


def test_a_rung_that_was_not_measured_says_so() -> None:
    assert "not measured" in _ladder(Ratio(0.8, 0.7, 0.9, 3), oracle=None).table()


@pytest.mark.parametrize(("low", "flagged"), [(0.97, False), (1.02, True)])
def test_a_fraction_above_one_by_more_than_its_interval_is_flagged(low: float, flagged: bool) -> None:
    ladder = _ladder(Ratio(1.05, low, 1.1, 5))
    assert (ladder.flag is not None) is flagged
    assert ("WARNING" in ladder.table()) is flagged
