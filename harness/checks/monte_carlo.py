"""What the decision of the paired check is worth, by made-up runs: `python -m harness.checks.monte_carlo [--runs N]`

Writes decision-rule.csv (how often the check and simpler rules raise an alarm) and interval-coverage.csv (how often an
interval of 90 % holds the truth). No clock, no model: seeded draws from the noise of real runners.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.checks.decision import MARGIN, NUM_PAIRS, NUM_RESTARTS, PASS_CONFIDENCE, Samples, decide
from harness.checks.report import Verdict
from harness.measure.stats import NUM_RESAMPLES, exact_ratio, median, paired_ratio
from runtime.errors import UsageError, cli_main
from runtime.files import write_named

NUM_METRICS = 5
SLOWDOWNS = (0.0, 0.02, 0.03, 0.05, 0.1)
NUM_LOOKS = 5


@dataclass(frozen=True)
class Noise:
    """Of one job on a shared runner, as standard deviations of log times.

    Attributes:
        between_jobs: a factor of the machine that the job is given. between_processes: a factor of each process, the
            same as long as it lives. within: of single samples. drift: of the random walk from sample to sample.
        spike_share: of the samples, hit by something else, by `spike` on average (exponential).
    """

    between_jobs: float = 0.1
    between_processes: float = 0.0075
    within: float = 0.015
    drift: float = 0.003
    spike_share: float = 0.06
    spike: float = 0.25

    def samples(
        self,
        random: np.random.Generator,
        slowdown: float,
        *,
        num_restarts: int = NUM_RESTARTS,
        num_pairs: int = NUM_PAIRS,
        is_interleaved: bool = True,
        levels: Sequence[float] = (0.0, 0.0),
    ) -> Samples:
        """Of one metric: pairs in the order ABBA, or all of base before all of head; `levels` of the jobs of each."""
        walk = np.cumsum(random.normal(0, self.drift, 2 * num_pairs))
        pair = np.arange(num_pairs)
        if is_interleaved:
            base, head = walk[2 * pair + pair % 2], walk[2 * pair + 1 - pair % 2]
        else:
            base, head = walk[:num_pairs], walk[num_pairs:]
        group = pair * num_restarts // num_pairs
        base, head = (
            level
            + walked
            + random.normal(0, self.between_processes, num_restarts)[group]
            + random.normal(0, self.within, num_pairs)
            + random.exponential(self.spike, num_pairs) * (random.random(num_pairs) < self.spike_share)
            for level, walked in zip(levels, (base, head), strict=True)
        )
        return Samples(np.exp(base).tolist(), (np.exp(head) * (1 + slowdown)).tolist(), group.tolist())


Run = Mapping[str, Samples]


@dataclass(frozen=True)
class Rule:
    """A way to measure, and what it calls slower.

    Attributes:
        alarms: the metrics of a run that it would stop, and those that it passes.
    """

    name: str
    alarms: Callable[[Run], tuple[set[str], set[str]]]
    num_restarts: int = NUM_RESTARTS
    is_interleaved: bool = True
    is_same_job: bool = True

    def draw(self, random: np.random.Generator, noise: Noise, slowdown: float) -> Run:
        """A run of `NUM_METRICS` metrics, the first of them slower by that share."""
        job, earlier = random.normal(0, noise.between_jobs, 2)
        levels = job if self.is_same_job else earlier, job
        return {
            str(metric): noise.samples(
                random,
                0.0 if metric else slowdown,
                num_restarts=self.num_restarts,
                is_interleaved=self.is_interleaved,
                levels=levels,
            )
            for metric in range(NUM_METRICS)
        }


def _by_check(run: Run) -> tuple[set[str], set[str]]:
    found = decide(run)
    return (
        {one.name for one in found if one.verdict is Verdict.REGRESSION},
        {one.name for one in found if one.verdict is Verdict.PASS},
    )


def _where(is_slower: Callable[[Samples], bool]) -> Callable[[Run], tuple[set[str], set[str]]]:
    def alarms(run: Run) -> tuple[set[str], set[str]]:
        slower = {name for name, samples in run.items() if is_slower(samples)}
        return slower, set(run) - slower

    return alarms


def _surely_above(limit: float) -> Callable[[Samples], bool]:
    """By the interval of the median, 95 %, as if every pair were independent."""
    return lambda samples: exact_ratio(samples.head, samples.base).low > 1 + limit


def _after_any_look(samples: Samples) -> bool:
    ends = [len(samples.base) * look // NUM_LOOKS for look in range(1, NUM_LOOKS + 1)]
    return any(exact_ratio(samples.head[:end], samples.base[:end]).low > 1 for end in ends)


RULES = (
    Rule("this check", _by_check),
    Rule(
        "stored baseline: median above +10 %",
        _where(lambda samples: median(samples.head) > 1.1 * median(samples.base)),
        is_same_job=False,
    ),
    Rule("base, then head: interval above 0", _where(_surely_above(0)), is_interleaved=False),
    Rule("pairs, one start: interval above 0", _where(_surely_above(0)), num_restarts=1),
    Rule("pairs, one start: interval above the margin", _where(_surely_above(MARGIN)), num_restarts=1),
    Rule("pairs: interval above 0", _where(_surely_above(0))),
    Rule("pairs: interval above 0 at any of 5 looks", _where(_after_any_look)),
    Rule("pairs: interval above the margin", _where(_surely_above(MARGIN))),
)
HARDER = (Noise(between_processes=0.005), Noise(between_processes=0.01), Noise(within=0.04))
"""Or easier; for the check alone."""


@dataclass(frozen=True)
class Rates:
    """Shares of runs: with an alarm for an unchanged metric; for the slower one; without anything but passes."""

    false_alarm: float
    found: float
    all_pass: float


def rates(rule: Rule, noise: Noise, slowdown: float, num_runs: int, seed: int = 0) -> Rates:
    """Of `num_runs` made-up runs. With a slowdown of 0, all metrics are unchanged, and `found` is 0."""
    random = np.random.default_rng(seed)
    false, found, passed = 0, 0, 0
    for _ in range(num_runs):
        alarms, passes = rule.alarms(rule.draw(random, noise, slowdown))
        slow = {"0"} if slowdown else set()
        false += bool(alarms - slow)
        found += bool(alarms & slow)
        passed += len(passes) == NUM_METRICS
    return Rates(false / num_runs, found / num_runs, passed / num_runs)


def _bootstrap_over_starts(samples: Samples) -> tuple[float, float]:
    """Percentiles of the median over resampled starts, each with all of its pairs. As many pairs in each start."""
    logs = (np.log(samples.head) - np.log(samples.base)).reshape(len(set(samples.group)), -1)
    drawn = np.random.default_rng(0).integers(0, len(logs), (NUM_RESAMPLES, len(logs)))
    medians = np.median(logs[drawn].reshape(NUM_RESAMPLES, -1), axis=1)
    low, high = np.exp(np.quantile(medians, [1 - PASS_CONFIDENCE, PASS_CONFIDENCE])).tolist()
    return low, high


def _bootstrap_over_pairs(samples: Samples) -> tuple[float, float]:
    ratio = paired_ratio(samples.head, samples.base, confidence=2 * PASS_CONFIDENCE - 1)
    return ratio.low, ratio.high


def _t_over_starts(samples: Samples) -> tuple[float, float]:
    ratio = samples.ratio()
    assert ratio is not None
    return ratio.bound(1 - PASS_CONFIDENCE), ratio.bound(PASS_CONFIDENCE)


INTERVALS = {
    "bootstrap over pairs": _bootstrap_over_pairs,
    "bootstrap over starts": _bootstrap_over_starts,
    "t over starts": _t_over_starts,
}


def coverage(interval: str, noise: Noise, num_restarts: int, num_runs: int, seed: int = 0) -> float:
    """Share of runs in which an interval of 90 %, by its name in `INTERVALS`, holds the true ratio, which is 1."""
    random = np.random.default_rng(seed)
    every = (INTERVALS[interval](noise.samples(random, 0, num_restarts=num_restarts)) for _ in range(num_runs))
    return sum(low <= 1 <= high for low, high in every) / num_runs


def _decision_rows(num_runs: int) -> Iterator[Sequence[object]]:
    yield "rule", "between_processes", "within", "slowdown", "runs", "false_alarm", "found", "all_pass"
    for rule in RULES:
        for noise in (Noise(), *(HARDER if rule is RULES[0] else ())):
            for slowdown in SLOWDOWNS:
                found = rates(rule, noise, slowdown, num_runs)
                shares = found.false_alarm, found.found if slowdown else "", found.all_pass
                yield rule.name, noise.between_processes, noise.within, slowdown, num_runs, *shares


def _coverage_rows(num_runs: int) -> Iterator[Sequence[object]]:
    yield "interval", "between_processes", "starts", "pairs", "runs", "coverage"
    for between in (0.0, 0.005, 0.01):
        for num_restarts in (4, NUM_RESTARTS):
            for interval in INTERVALS:
                share = coverage(interval, Noise(between_processes=between), num_restarts, num_runs)
                yield interval, between, num_restarts, NUM_PAIRS, num_runs, share


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m harness.checks.monte_carlo", description=__doc__)
    parser.add_argument("--runs", type=int, default=2000, metavar="N", help="made-up runs per figure (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/checks"), metavar="FOLDER", help="(%(default)s)")
    options = parser.parse_args(arguments)
    return cli_main(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.runs < 1:
        raise UsageError(f"--runs {options.runs}: at least 1")
    for name, rows in (
        ("interval-coverage.csv", _coverage_rows(options.runs)),
        ("decision-rule.csv", _decision_rows(options.runs)),
    ):
        lines = [",".join(map(_cell, row)) for row in rows]
        write_named("--out", options.out / name, "\n".join(lines) + "\n")
        print(f"{options.out / name}\n" + "\n".join(lines))


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


if __name__ == "__main__":
    sys.exit(main())
