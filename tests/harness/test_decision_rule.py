"""What the check promises of its verdicts, kept by hundreds of made-up runs of five metrics with the noise of runners.

Fixed seeds: nothing here depends on chance. `python -m harness.checks.monte_carlo` prints the whole table.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from harness.checks.decision import ALPHA, ALPHA_MARGIN, MARGIN, PASS_CONFIDENCE, noise_floor
from harness.checks.monte_carlo import RULES, Noise, Rates, coverage, main, rates

CHECK = RULES[0]
NUM_RUNS = 300
PROCESSES = [0.005, 0.0075, 0.01]
"""How much processes of the same program differ."""


def _by_name(start: str, slowdown: float, num_runs: int = NUM_RUNS) -> Rates:
    (rule,) = (rule for rule in RULES if rule.name == start)
    return rates(rule, Noise(), slowdown, num_runs)


@pytest.mark.parametrize("between", PROCESSES)
def test_unchanged_code_is_rarely_called_slower(between: float) -> None:
    found = rates(CHECK, Noise(between_processes=between), 0.0, NUM_RUNS)
    assert found.false_alarm <= 0.01
    assert found.all_pass >= 0.6  # and is not left undecided either


@pytest.mark.parametrize("between", PROCESSES)
def test_a_twentieth_is_found(between: float) -> None:
    found = rates(CHECK, Noise(between_processes=between), 0.05, NUM_RUNS)
    assert found.found >= 0.95 and found.false_alarm <= 0.01 and found.all_pass == 0


def test_a_tenth_is_found_where_samples_scatter_more_than_twice_as_much() -> None:
    assert rates(CHECK, Noise(within=0.04), 0.1, NUM_RUNS).found >= 0.95


def test_more_is_found_of_more() -> None:
    shares = [rates(CHECK, Noise(), slowdown, NUM_RUNS).found for slowdown in (0.02, 0.03, 0.05, 0.1)]
    assert shares == sorted(shares) and shares[0] <= 0.05 and shares[-1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("noise", [Noise(), Noise(between_processes=0.05, within=0.2, spike_share=0.3)])
def test_the_promise_holds_for_any_noise(noise: Noise) -> None:
    """The margin hides the noise of a quiet runner, not that of a hopeless one: there the first condition keeps it,
    just. Three standard deviations of so many runs are allowed for."""
    num_runs = 4000
    assert rates(CHECK, noise, 0.0, num_runs).false_alarm <= ALPHA + 3 * math.sqrt(ALPHA / num_runs)


@pytest.mark.slow
def test_a_slowdown_of_just_the_margin_is_neither_stopped_nor_passed_more_often_than_claimed() -> None:
    found = rates(CHECK, Noise(), MARGIN, 4000)
    assert found.found <= ALPHA_MARGIN and found.all_pass <= 1 - PASS_CONFIDENCE + 0.01


@pytest.mark.slow
def test_the_twentieth_and_the_unchanged_in_many_runs() -> None:
    for between in PROCESSES:
        noise = Noise(between_processes=between)
        assert rates(CHECK, noise, 0.05, 2000, seed=1).found >= 0.95
        assert rates(CHECK, noise, 0.0, 2000, seed=1).false_alarm <= 0.001


def test_the_floor_tells_a_noisy_runner_from_an_ordinary_one() -> None:
    def share_above(noise: Noise) -> float:
        random = np.random.default_rng(0)
        floors = noise_floor({str(number): noise.samples(random, 0.0) for number in range(NUM_RUNS)})
        return sum(floor > MARGIN / 2 for floor in floors.values()) / NUM_RUNS

    assert share_above(Noise()) <= 0.04 and share_above(Noise(within=0.04)) >= 0.96


def test_why_a_stored_baseline_is_no_gate() -> None:
    """The machine of another job is another one."""
    assert _by_name("stored baseline: median above +10 %", 0.0).false_alarm > 0.15
    assert _by_name("stored baseline: median above +10 %", 0.05).found < 0.5


def test_why_base_and_head_take_turns() -> None:
    assert _by_name("base, then head: interval above 0", 0.0).false_alarm > 0.3


def test_why_there_are_several_starts() -> None:
    """One process is a little slower than another as long as it lives, and more of its samples only say so surely."""
    assert _by_name("pairs, one start: interval above 0", 0.0).false_alarm > 0.3
    assert _by_name("pairs, one start: interval above the margin", 0.0).false_alarm > 0.01


def test_why_nobody_looks_before_the_end() -> None:
    once = _by_name("pairs: interval above 0", 0.0).false_alarm
    assert _by_name("pairs: interval above 0 at any of 5 looks", 0.0).false_alarm > 1.5 * once


def test_why_the_interval_is_not_a_bootstrap_of_pairs() -> None:
    noise = Noise(between_processes=0.01)
    assert coverage("bootstrap over pairs", noise, 4, 200) < 0.75
    assert coverage("t over starts", noise, 4, 1000) >= 0.88 and coverage("t over starts", noise, 12, 1000) >= 0.88


def test_the_command_writes_both_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--runs", "1", "--out", str(tmp_path)]) == 0
    header, *rows = (tmp_path / "decision-rule.csv").read_text().splitlines()
    assert header.startswith("rule,between_processes") and len(rows) == 5 * (len(RULES) + 3)
    assert "t over starts" in (tmp_path / "interval-coverage.csv").read_text()
    assert "this check" in capsys.readouterr().out
    assert main(["--runs", "0"]) == 2
