"""How far ahead the engine prefetches: a predictor on trial, and a distance that follows the machine."""

from __future__ import annotations

from itertools import accumulate, repeat

import pytest

from runtime.cache.governor import BLOCK, PAIRS, WARM_UP, Governor, Reading
from runtime.vocabulary import Phase

TRIAL = WARM_UP + 2 * PAIRS * BLOCK


def _at(now_s: float, **counts: float) -> Reading:
    zero = {"num_needed": 0, "num_wasted": 0, "num_loads": 0, "busy_s": 0.0, "stall_s": 0.0, "num_layer_steps": 0}
    return Reading(now_s, **{**zero, **counts})  # type: ignore[arg-type]


def _run(governor: Governor, with_s: float, without_s: float, passes: int) -> list[int]:
    """Decode passes that take `with_s` with prefetch and `without_s` without; the depth of each."""
    depths, now_s = [], 0.0
    for _ in range(passes):
        depths.append(governor.depth(Phase.DECODE, 1, _at(now_s)))
        now_s += with_s if depths[-1] else without_s
    return depths


def test_a_predictor_that_costs_more_than_it_saves_is_switched_off_and_says_so() -> None:
    governor = Governor(2, on_trial=True)
    depths = _run(governor, with_s=0.011, without_s=0.010, passes=TRIAL + 50)
    assert set(depths[:WARM_UP]) == {2}
    assert depths.count(2) - WARM_UP == pytest.approx(PAIRS * BLOCK, abs=2)
    assert set(depths[TRIAL + 2 :]) == {0}
    assert governor.verdict is not None and "11.00 ms" in governor.verdict and "10.00" in governor.verdict


@pytest.mark.parametrize(("with_s", "without_s"), [(0.010, 0.011), (0.01, 0.01)])
def test_a_predictor_that_pays_or_costs_nothing_stays(with_s: float, without_s: float) -> None:
    governor = Governor(2, on_trial=True)
    assert set(_run(governor, with_s, without_s, TRIAL + 50)[TRIAL + 2 :]) == {2}
    assert governor.verdict is None


def test_without_a_trial_the_depth_is_what_was_asked_for() -> None:
    assert set(_run(Governor(3), 0.02, 0.01, TRIAL)) == {3}
    assert set(_run(Governor(0, on_trial=True), 0.02, 0.01, TRIAL)) == {0}


def test_prompts_and_the_wait_between_requests_are_not_measured() -> None:
    governor, now_s = Governor(1, on_trial=True), 0.0
    for turn in range(3 * TRIAL):
        phase = Phase.PREFILL if turn % 3 == 0 else Phase.DECODE
        depth = governor.depth(phase, 1, _at(now_s))
        # Prompts are slow without prefetch; only decode steps that follow one another count, and those are faster.
        now_s += 0.010 - 0.001 * (depth == 0) if turn % 3 == 1 else 5.0 * (depth == 0) + 1.0
    assert governor.verdict is not None


def _adapt(load_s: float, layer_s: float, needed_per_layer: float, *, stalls: bool, wasted: float = 0.0) -> int:
    governor, layers = Governor(8, adaptive=True), 24
    depth = 8
    for turn in accumulate(repeat(1, 4 * BLOCK)):
        reading = _at(
            turn * layers * layer_s * (1.5 if stalls else 1.0),
            num_needed=turn * layers * needed_per_layer,
            num_wasted=turn * layers * needed_per_layer * wasted,
            num_loads=turn * layers * needed_per_layer,
            busy_s=turn * layers * needed_per_layer * load_s,
            stall_s=turn * layers * layer_s * (0.5 if stalls else 0.0),
            num_layer_steps=turn * layers,
        )
        depth = governor.depth(Phase.DECODE, 1, reading)
    return depth


def test_the_distance_is_what_the_loads_of_a_layer_take_over_what_a_layer_takes() -> None:
    assert _adapt(load_s=0.0009, layer_s=0.001, needed_per_layer=2, stalls=False) == 2
    assert _adapt(load_s=0.0019, layer_s=0.001, needed_per_layer=2, stalls=False) == 4
    assert _adapt(load_s=0.0019, layer_s=0.001, needed_per_layer=2, stalls=True) == 5
    assert _adapt(load_s=0.0019, layer_s=0.001, needed_per_layer=2, stalls=False, wasted=0.6) == 3
    assert _adapt(load_s=0.1, layer_s=0.001, needed_per_layer=4, stalls=True) == 8  # what was asked for at most
    assert _adapt(load_s=1e-6, layer_s=0.001, needed_per_layer=1, stalls=False) == 1
