"""The verdicts of the paired check, one by one; how often they are right is the matter of test_decision_rule.py."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest

from harness.checks.decision import (
    MIN_PAIRS,
    NUM_PAIRS,
    NUM_RESTARTS,
    Samples,
    decide,
    judge_runner,
    noise_floor,
)
from harness.checks.report import Finding, Verdict

GROUPS = [pair * NUM_RESTARTS // NUM_PAIRS for pair in range(NUM_PAIRS)]


def _samples(ratio: float, scatter: float = 0.01, between: float = 0.0, seed: int = 0) -> Samples:
    """`between`: scatter of the starts."""
    random = np.random.default_rng(seed)
    base = np.exp(random.normal(0, 0.2, NUM_PAIRS))  # drift or not: pairs share it
    log = random.normal(0, scatter, NUM_PAIRS) + random.normal(0, between, NUM_RESTARTS)[GROUPS]
    return Samples(base.tolist(), (base * ratio * np.exp(log)).tolist(), GROUPS)


def _one(samples: Samples, **options: float) -> Finding:
    (found,) = decide({"tpot": samples}, **options)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("ratio", "verdict", "said"),
    [
        (1.06, Verdict.REGRESSION, "slower by more than 2 % (p "),
        (1.021, Verdict.INCONCLUSIVE, "cannot say whether it is slower by 2 % (p "),
        (1.0, Verdict.PASS, "not slower by 2 %: "),
        (0.8, Verdict.PASS, "not slower by 2 %: "),
    ],
)
def test_verdicts(ratio: float, verdict: Verdict, said: str) -> None:
    found = _one(_samples(ratio))
    assert found.verdict is verdict and found.reason.startswith(said)
    assert f"(90% interval, {NUM_PAIRS} pairs in {NUM_RESTARTS} starts), margin 2 %, floor not measured" in found.reason
    figures = json.loads(json.dumps(found.figures))
    assert figures["low"] < figures["ratio"] < figures["high"] and abs(figures["ratio"] - ratio) < 0.005


def test_the_margin_is_what_it_is_told() -> None:
    samples = _samples(1.06)
    assert _one(samples, margin=0.1).verdict is Verdict.PASS
    assert "not slower by 10 %" in _one(samples, margin=0.1).reason
    for margin in (0.0, -0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="margin"):
            _one(samples, margin=margin)


def test_pairs_of_one_start_say_less_than_as_many_of_several() -> None:
    """That starts differ is not hidden by what their pairs agree on."""
    alike, different = _samples(1.05, 0.001), _samples(1.05, 0.001, between=0.06)
    assert _one(alike).verdict is Verdict.REGRESSION
    assert _one(different).verdict is Verdict.INCONCLUSIVE
    shuffled = Samples(different.base, different.head, [pair % NUM_RESTARTS for pair in range(NUM_PAIRS)])
    assert _one(shuffled).figures["high"] < _one(different).figures["high"]


def test_a_few_disturbed_pairs_change_nothing() -> None:
    samples = _samples(1.0)
    head = list(samples.head)
    for start in range(NUM_RESTARTS):
        head[5 * start] *= 3
    assert _one(Samples(samples.base, head, GROUPS)).verdict is Verdict.PASS


def test_of_more_metrics_each_has_to_be_surer() -> None:
    """The same samples: alone a regression, among many that do not differ an accident that had to come."""
    samples = next(
        samples
        for seed in range(99)
        if 0.02 < _one(samples := _samples(1.025, seed=seed)).figures["p_above_margin"] < 0.04
    )
    assert _one(samples).verdict is Verdict.REGRESSION
    others = {f"m{seed}": _samples(1.0, seed=seed) for seed in range(4)}
    found = {one.name: one for one in decide({**others, "tpot": samples})}
    assert found["tpot"].verdict is Verdict.INCONCLUSIVE and "for 5 metrics" in found["tpot"].reason
    assert [found[name].verdict for name in others] == [Verdict.PASS] * 4
    assert list(found) == [*others, "tpot"]


def test_no_metrics_no_findings() -> None:
    assert decide({}) == () and judge_runner({}) == () and noise_floor({}) == {}


def test_samples_without_any_noise() -> None:
    constant = [1.0] * NUM_PAIRS
    assert _one(Samples(constant, constant, GROUPS)).verdict is Verdict.PASS
    assert _one(Samples(constant, [1.1] * NUM_PAIRS, GROUPS)).verdict is Verdict.REGRESSION
    assert _one(Samples(constant, [1.0199] * NUM_PAIRS, GROUPS)).verdict is Verdict.PASS


def test_too_few_pairs_decide_nothing_however_clear_they_look() -> None:
    few = MIN_PAIRS - 1
    found = _one(Samples([1.0] * few, [2.0] * few, list(range(few))))
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.reason == "too few: 9 valid pairs of 9, in 9 starts; at least 10 in 4 starts are needed"
    assert _one(Samples([1.0] * 60, [2.0] * 60, [0, 1, 2] * 20)).verdict is Verdict.INCONCLUSIVE


def test_what_was_not_measured_is_left_out_and_nothing_at_all_is_invalid() -> None:
    samples = _samples(1.06)
    bad = [math.nan, math.inf, 0.0, -1.0]
    found = _one(Samples([*bad, *samples.base[4:]], samples.head, GROUPS))
    assert found.verdict is Verdict.REGRESSION and found.figures["num_pairs"] == NUM_PAIRS - 4
    assert _one(Samples([1.0] * 40, [math.nan] * 40, [0] * 40)).verdict is Verdict.INVALID
    assert _one(Samples([], [], [])).verdict is Verdict.INVALID


@pytest.mark.parametrize(("base", "head", "group"), [([1.0], [], [0]), ([1.0], [1.0], [0, 1]), ([], [1.0], [0])])
def test_what_makes_no_pairs_is_refused(base: list[float], head: list[float], group: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="do not make pairs"):
        Samples(base, head, group)


def test_on_a_noisy_runner_nothing_passes_and_a_clear_regression_stays_one() -> None:
    floors = noise_floor({"tpot": _samples(1.0, 0.06)})
    assert floors["tpot"] > 0.01
    found = _one(_samples(1.0), noise_floor=floors)  # type: ignore[arg-type]
    assert found.verdict is Verdict.INCONCLUSIVE and found.reason.startswith("runner too noisy for a margin of 2 %: ")
    assert f"floor {100 * floors['tpot']:.3g} %" in found.reason
    assert _one(_samples(1.06), noise_floor=floors).verdict is Verdict.REGRESSION  # type: ignore[arg-type]
    assert noise_floor({"tpot": _samples(1.0, 0.06)}, num_pairs=4 * NUM_PAIRS)["tpot"] < 0.6 * floors["tpot"]
    quiet = noise_floor({"tpot": _samples(1.0)})
    assert _one(_samples(1.0), noise_floor=quiet).verdict is Verdict.PASS  # type: ignore[arg-type]
    assert _one(_samples(1.0), noise_floor={}).verdict is Verdict.INCONCLUSIVE  # type: ignore[arg-type]


def test_a_runner_is_judged_by_base_against_itself() -> None:
    pairs = {
        "quiet": _samples(1.0),
        "noisy": _samples(1.0, 0.06),
        "tilted": _samples(0.98),
        "few": Samples([1], [1], [0]),
    }
    found = {one.name: one for one in judge_runner(pairs)}
    assert found["quiet"].verdict is Verdict.PASS
    assert found["noisy"].verdict is Verdict.INCONCLUSIVE and "--margin" in found["noisy"].reason
    assert found["tilted"].verdict is Verdict.INVALID and "base differs from itself" in found["tilted"].reason
    assert found["few"].verdict is Verdict.INCONCLUSIVE and noise_floor(pairs)["few"] == math.inf
    assert found["noisy"].figures["noise_floor"] == noise_floor(pairs)["noisy"]
    json.dumps([dict(one.figures) for one in found.values()], allow_nan=False)
