"""Is head slower than base by more than a margin? Decided from interleaved pairs of samples, once, without a clock.

A metric is a **regression** where both hold: it is slower at all, with at most `ALPHA` of a wrong answer over all
metrics of the run, and slower by more than the margin, with at most `ALPHA_MARGIN` (Holm over the metrics each time).
It **passes** where it is slower by less than the margin with `PASS_CONFIDENCE`; a run passes where every metric does,
which needs no correction. Anything else is **inconclusive**. The first condition keeps the promise about unchanged code
for any noise; where the noise is ordinary the margin alone does, and nearly never errs.

Both go by Student's t on the medians of the starts (`harness.measure.stats.grouped_ratio`): pairs that ran in the same
two processes share what these happen to be like (layout, huge pages), and no number of such pairs averages that out.
The percentile bootstrap of the median, which one would take first, takes pairs for independent. Where processes differ
by 1 %, its interval of 90 % holds the truth in 79 % of runs of 12 starts with 5 pairs, and in 61 % of runs of 4 with 15
(with starts resampled instead: 85 and 73 %; t: 90 and 91 %).

The number of pairs is settled before: to look five times and stop when something shows makes false alarms 2.5 times as
frequent.
`python -m harness.checks.monte_carlo` measures all this, and results/checks/decision-rule.csv keeps what it found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.checks.report import Finding, Verdict
from harness.measure.stats import GroupedRatio, grouped_ratio, holm, median_half_width

NUM_PAIRS = 60
NUM_RESTARTS = 12
"""Of base and head, five pairs each. Fewer starts with more pairs would find less: processes differ."""
MARGIN = 0.02
"""Slower by less is nothing that the check would stop."""
ALPHA = 0.01
ALPHA_MARGIN = 0.05
PASS_CONFIDENCE = 0.95
MIN_PAIRS = 10
MIN_RESTARTS = 4
"""Fewer decide nothing."""


@dataclass(frozen=True)
class Samples:
    """Of one metric; lower is better.

    Attributes:
        base, head: seconds, pair by pair, close in time. A pair with a value that is not finite and positive is left
            out.
        group: which start of the two processes each pair ran in.
    """

    base: Sequence[float]
    head: Sequence[float]
    group: Sequence[int]

    def __post_init__(self) -> None:
        """Raises ValueError where the lengths differ."""
        if not len(self.base) == len(self.head) == len(self.group):
            raise ValueError(f"{len(self.base)} and {len(self.head)} samples in {len(self.group)} do not make pairs")

    def valid(self) -> list[tuple[float, float, int]]:
        """Base, head and group of each pair that can be used."""
        every = zip(self.base, self.head, self.group, strict=True)
        return [pair for pair in every if 0 < pair[0] < math.inf and 0 < pair[1] < math.inf]

    def ratio(self) -> GroupedRatio | None:
        """Head over base; None where too few pairs are valid."""
        valid = self.valid()
        if len(valid) < MIN_PAIRS or len({group for _, _, group in valid}) < MIN_RESTARTS:
            return None
        base, head, groups = zip(*valid, strict=True)
        return grouped_ratio(head, base, groups)


def decide(
    metrics: Mapping[str, Samples], *, margin: float = MARGIN, noise_floor: Mapping[str, float] | None = None
) -> tuple[Finding, ...]:
    """A finding for each metric, in their order: `REGRESSION`, `PASS`, or `INCONCLUSIVE`, also where too few pairs are
    valid; `INVALID` where none is.

    Args:
        margin: as a share; 0.02 is 2 %.
        noise_floor: of each metric, as the function of that name finds it, where it was measured. Above half the margin
            the metric cannot pass, for a pass would be luck there; it may still be a regression.

    Raises:
        ValueError: a margin that is not positive.
    """
    if not 0 < margin < math.inf:
        raise ValueError(f"a margin of {margin} leaves nothing to pass")
    ratios = {name: samples.ratio() for name, samples in metrics.items()}
    is_slower = _adjusted(ratios, 1.0)
    is_above = _adjusted(ratios, 1 + margin)
    found = []
    for name, ratio in ratios.items():
        if ratio is None:
            found.append(_too_few(name, metrics[name]))
            continue
        floor = None if noise_floor is None else noise_floor.get(name, math.inf)
        is_regression = is_slower[name] <= ALPHA and is_above[name] <= ALPHA_MARGIN
        is_below = ratio.bound(PASS_CONFIDENCE) < 1 + margin
        is_noisy = floor is not None and floor > margin / 2
        size = _percent(margin)
        if is_regression:
            verdict, said = Verdict.REGRESSION, f"slower by more than {size} (p {is_above[name]:.2g})"
        elif is_noisy:
            verdict, said = Verdict.INCONCLUSIVE, f"runner too noisy for a margin of {size}"
        elif is_below:
            verdict, said = Verdict.PASS, f"not slower by {size}"
        else:
            verdict = Verdict.INCONCLUSIVE
            said = f"cannot say whether it is slower by {size} (p {is_above[name]:.2g}, for {len(is_above)} metrics)"
        seen = f"head/base {_figures(ratio)}, margin {size}, floor {_floor(floor)}"
        figures = {
            **_numbers(ratio),
            "p_slower": is_slower[name],
            "p_above_margin": is_above[name],
            "margin": margin,
            "noise_floor": floor if floor is not None and math.isfinite(floor) else None,
        }
        found.append(Finding(name, verdict, f"{said}: {seen}", figures))
    return tuple(found)


def noise_floor(pairs: Mapping[str, Samples], *, num_pairs: int | None = None) -> dict[str, float]:
    """What pairs of the same code leave open, as a share: half the interval of their median; infinite for too few.

    Slowdowns of that size come and go with the runner. It takes pairs for independent: what processes differ by beside
    that is in the interval of the verdict.

    Args:
        num_pairs: that the check has; None for as many as there are here.
    """
    return {name: _floor_of(samples.valid(), num_pairs) for name, samples in pairs.items()}


def judge_runner(pairs: Mapping[str, Samples], *, margin: float = MARGIN) -> tuple[Finding, ...]:
    """Whether the runner is good enough for the margin, from pairs of base with itself; a finding for each metric.

    Invalid: base differs from itself, so that one side of the pairs is favoured and nothing that they say can be used.
    """
    ratios = {name: samples.ratio() for name, samples in pairs.items()}
    slower, floors = _one_sided(ratios, 1.0), noise_floor(pairs)
    names = list(slower)
    both = dict(zip(names, holm([2 * min(slower[name], 1 - slower[name]) for name in names]), strict=True))
    found = []
    for name, ratio in ratios.items():
        if ratio is None:
            found.append(_too_few(name, pairs[name]))
            continue
        floor, half = floors[name], margin / 2
        if both[name] <= ALPHA:
            verdict, said = Verdict.INVALID, f"base differs from itself (p {both[name]:.2g}): one side is favoured"
        elif floor > half:
            verdict, said = (
                Verdict.INCONCLUSIVE,
                f"too noisy for a margin of {_percent(margin)}; --margin {_least(floor)} or more --pairs",
            )
        else:
            verdict, said = Verdict.PASS, f"quiet enough for a margin of {_percent(margin)}"
        reason = f"{said}: floor {_percent(floor)}, base/base {_figures(ratio)}"
        found.append(Finding(name, verdict, reason, {**_numbers(ratio), "noise_floor": floor, "margin": margin}))
    return tuple(found)


def _one_sided(ratios: Mapping[str, GroupedRatio | None], limit: float) -> dict[str, float]:
    return {name: ratio.p_at_most(limit) for name, ratio in ratios.items() if ratio is not None}


def _adjusted(ratios: Mapping[str, GroupedRatio | None], limit: float) -> dict[str, float]:
    p_values = _one_sided(ratios, limit)
    return dict(zip(p_values, holm(list(p_values.values())), strict=True))


def _too_few(name: str, samples: Samples) -> Finding:
    groups = [group for _, _, group in samples.valid()]
    num_pairs, num_restarts = len(groups), len(set(groups))
    reason = (
        f"too few: {num_pairs} valid pairs of {len(samples.base)}, in {num_restarts} starts; at least {MIN_PAIRS} in "
        f"{MIN_RESTARTS} starts are needed"
    )
    verdict = Verdict.INCONCLUSIVE if groups else Verdict.INVALID
    return Finding(name, verdict, reason, {"num_pairs": num_pairs, "num_restarts": num_restarts})


def _floor_of(pairs: Sequence[tuple[float, float, int]], num_pairs: int | None) -> float:
    if len(pairs) < MIN_PAIRS:
        return math.inf
    base, head, _ = zip(*pairs, strict=True)
    return median_half_width(head, base, confidence=_BOTH_SIDES, num_pairs=num_pairs or len(pairs))


def _numbers(ratio: GroupedRatio) -> dict[str, Any]:
    return {
        "ratio": ratio.estimate,
        "low": ratio.bound(1 - PASS_CONFIDENCE),
        "high": ratio.bound(PASS_CONFIDENCE),
        "confidence": _BOTH_SIDES,
        "num_pairs": ratio.num_pairs,
        "num_restarts": ratio.num_groups,
    }


_BOTH_SIDES = 2 * PASS_CONFIDENCE - 1


def _figures(ratio: GroupedRatio) -> str:
    low, high = ratio.bound(1 - PASS_CONFIDENCE), ratio.bound(PASS_CONFIDENCE)
    return (
        f"{ratio.estimate:.4f} [{low:.4f}, {high:.4f}] ({_BOTH_SIDES:.0%} interval, {ratio.num_pairs} pairs in "
        f"{ratio.num_groups} starts)"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _floor(floor: float | None) -> str:
    return "not measured" if floor is None else _percent(floor)


def _least(floor: float) -> str:
    return f"{math.ceil(200 * floor)}%"
