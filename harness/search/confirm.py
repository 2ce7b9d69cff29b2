"""Confirm a finalist against the default, in turns, on text that the search has not seen.

The best of several noisy results is partly luck. So there are two stages on different text: a few rounds choose one of
the finalists, and what is claimed of it comes from the second stage alone, whose number of pairs was settled before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

from harness.measure.stats import Ratio, exact_confidence, exact_ratio
from harness.measure.workload import TokenRequest
from harness.search.objective import SLOWDOWN, Objective
from harness.search.outcome import Kind, Limits, Measurement, Outcome, Tried
from harness.search.space import Params

NUM_PAIRS = 12
"""Find a gain of 10 % nineteen times in twenty where single runs scatter by 1.5 %, now and then far more; 20 find it
where they scatter by 4 % (tests/harness/test_trust.py)."""
MIN_PAIRS = 6
"""Fewer give no interval of 95 %."""
LEAST_GAIN = 0.01
"""Less is none: one process may be a little faster than another of the same configuration as long as it lives, which no
number of pairs would average out."""
PEAK_NOISE = 0.02
"""Peaks that differ by less are the same, for the same reason."""

DEFAULT, FINALIST = "default", "finalist"
_PROMISING = (1 + SLOWDOWN) / 2
"""Latency up to which, in a few rounds, a smaller configuration seems to be within `SLOWDOWN`."""

Segment = tuple[TokenRequest, ...]


class Contender(Protocol):
    """A configuration in a process of its own, loaded once."""

    def run(self, requests: Segment, /) -> Outcome:
        """Measure one segment of text."""


Opener = Callable[[], AbstractContextManager[Contender]]


@dataclass(frozen=True)
class Screened:
    """A finalist after the screening: latency and peak memory over those of the default, None where not measured.

    `failure`: why it dropped out.
    """

    params: Params
    ratio: float | None
    peak_ratio: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class Confirmation:
    """Pairs of runs of the second stage, index by index, and the latency of the finalist over that of the default.

    Attributes:
        ratio: None when a run failed.
        failure: why the finalist cannot be used although it was measured, or was not measured to the end.
        params: of the finalist. num_segments: of text, all different; with fewer than pairs they were used again.
        screening: every finalist, where there was more than one. failed: those whose own run ended in a failure.
    """

    finalist: tuple[Measurement, ...]
    default: tuple[Measurement, ...]
    ratio: Ratio | None
    failure: str = ""
    params: Params = field(default_factory=dict)
    objective: Objective = Objective.LATENCY
    num_segments: int = 0
    screening: tuple[Screened, ...] = ()
    failed: tuple[Params, ...] = ()

    @property
    def is_proven(self) -> bool:
        """True when the whole interval says that the finalist is better in what the objective asks for, by `LEAST_GAIN`
        or more."""
        if self.ratio is None or self.failure:
            return False
        if self.objective is Objective.MEMORY:
            return self.peak_ratio < 1 and self.ratio.high <= SLOWDOWN
        return self.objective.cost(self.ratio.high, self.peak_ratio) < 1 - LEAST_GAIN

    @property
    def peak_ratio(self) -> float:
        """Peak memory of the finalist over that of the default; 1 where they are the same but for noise."""
        return peak_ratio(self.finalist, self.default)

    @property
    def confidence(self) -> float:
        """Of the interval, for so many pairs; it holds for any noise."""
        return exact_confidence(len(self.default)) if self.default else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        derived = {"is_proven": self.is_proven, "confidence": self.confidence}
        return {**asdict(self), **derived, **({} if self.ratio is None else {"peak_ratio": self.peak_ratio})}


def confirm(
    finalists: Sequence[Params],
    default: Params,
    segments: Sequence[Segment],
    *,
    open_contender: Callable[[Params], AbstractContextManager[Contender]],
    fit_together: Callable[[Sequence[Params]], bool],
    num_pairs: int,
    objective: Objective,
    limits: Limits,
    on_run: Callable[[str, Outcome], None],
) -> Confirmation:
    """Choose among `finalists`, then measure that one beside the default.

    Args:
        finalists: at least one, best first.
        segments: of text, at least one; a single one leaves none to choose by, and the first finalist is taken.
        open_contender: starts a configuration, and ends it on leaving.
        fit_together: whether so many configurations fit into memory at once; otherwise each is loaded for every turn.
        num_pairs: at least `MIN_PAIRS`.
        on_run: told about every run, by the name of its configuration.

    Raises:
        ValueError: too few pairs, no finalist, or no text.
    """
    if num_pairs < MIN_PAIRS or not finalists or not segments:
        raise ValueError(f"{num_pairs} pairs of {len(finalists)} finalists on {len(segments)} segments confirm nothing")

    def play(contenders: Mapping[str, Params], text: Sequence[Segment], num_rounds: int) -> Turns:
        openers = {name: partial(open_contender, params) for name, params in contenders.items()}
        are_kept_open = fit_together(list(contenders.values()))
        return take_turns(openers, text, num_rounds, are_kept_open=are_kept_open, on_run=on_run)

    unseen, survivor = segments, finalists[0]
    screening: tuple[Screened, ...] = ()
    failed: tuple[Params, ...] = ()
    if len(finalists) > 1 and len(segments) > 1:
        first, unseen = _split(segments, num_pairs)
        names = [f"{FINALIST} {number}" for number in range(1, len(finalists) + 1)]
        contenders = {DEFAULT: default, **dict(zip(names, finalists, strict=True))}
        turns = play(contenders, first, screening_rounds(num_pairs))
        screening = tuple(_screened(turns, name, contenders[name], limits) for name in names)
        failed = tuple(contenders[name] for name in names if name in turns.failures)
        best = _best(screening, objective)
        if DEFAULT in turns.failures or best is None:
            failure = turns.failures.get(DEFAULT) or "; ".join(dict.fromkeys(one.failure for one in screening))
            return Confirmation((), (), None, failure, survivor, objective, 0, screening, failed)
        survivor = best.params

    turns = play({DEFAULT: default, FINALIST: survivor}, unseen, num_pairs)
    failed = (*failed, survivor) if FINALIST in turns.failures else failed
    chosen, baseline = tuple(turns.runs[FINALIST]), tuple(turns.runs[DEFAULT])
    failure, ratio = "; ".join(turns.failures.values()), None
    if not failure:
        ratio = latency_ratio(chosen, baseline)
        failure = _excess(FINALIST, Tried(survivor, chosen), limits)
    num_segments = min(len(unseen), num_pairs)
    return Confirmation(chosen, baseline, ratio, failure, survivor, objective, num_segments, screening, failed)


def screening_rounds(num_pairs: int) -> int:
    """In each, every finalist and the default run once. What needs more pairs to confirm needs more to choose by."""
    return max(3, num_pairs // 3)


def latency_ratio(runs: Sequence[Measurement], default: Sequence[Measurement]) -> Ratio:
    """Latency over that of the default, paired, with an interval that claims may go by."""
    return exact_ratio([run.latency_ms_p50 for run in runs], [run.latency_ms_p50 for run in default])


def peak_ratio(runs: Sequence[Measurement], default: Sequence[Measurement]) -> float:
    """Highest peak over that of the default; 1 where they are the same but for noise, or nothing was measured."""
    if not runs or not default:
        return 1.0
    ratio = max(run.peak_memory_bytes for run in runs) / max(run.peak_memory_bytes for run in default)
    return 1.0 if abs(ratio - 1) < PEAK_NOISE else ratio


@dataclass(frozen=True)
class Turns:
    """Runs of each contender, index by round, and why some did not go on."""

    runs: Mapping[str, list[Measurement]]
    failures: dict[str, str]


def take_turns(
    openers: Mapping[str, Opener],
    segments: Sequence[Segment],
    num_rounds: int,
    *,
    are_kept_open: bool,
    on_run: Callable[[str, Outcome], None],
) -> Turns:
    """Run all contenders on one segment a round, forwards and backwards (ABBA for two), so that drift hits all alike.

    A contender that fails is left out from then on; it ends when `DEFAULT` fails, or when nobody else is left.

    Args:
        are_kept_open: every contender is loaded once, before its first turn; otherwise anew for every turn, so that
            none has a warm cache before another.
    """
    turns = Turns({name: [] for name in openers}, {})
    with ExitStack() as kept:
        run = {
            name: kept.enter_context(opener()).run if are_kept_open else partial(_run_once, opener)
            for name, opener in openers.items()
        }
        for number in range(num_rounds):
            for name in _order([name for name in openers if name not in turns.failures], number):
                outcome = run[name](segments[number % len(segments)])
                on_run(name, outcome)
                if outcome.kind is Kind.OK:
                    turns.runs[name].append(outcome.measurement)
                    continue
                said = f"ended with {outcome.kind} on the text kept for confirming: {outcome.message}"
                turns.failures[name] = f"the {name} {said}"
                if name == DEFAULT or openers.keys() - turns.failures.keys() <= {DEFAULT}:
                    return turns
    return turns


def _order(names: list[str], number: int) -> list[str]:
    return names if number % 2 == 0 else names[::-1]


def _run_once(opener: Opener, segment: Segment) -> Outcome:
    with opener() as contender:
        return contender.run(segment)


def _split(segments: Sequence[Segment], num_pairs: int) -> tuple[Sequence[Segment], Sequence[Segment]]:
    """For choosing and for confirming; where there is too little text, each gets its share, at least one."""
    rounds = screening_rounds(num_pairs)
    num_first = max(1, min(rounds, len(segments) * rounds // (rounds + num_pairs)))
    return segments[:num_first], segments[num_first:]


def _screened(turns: Turns, name: str, params: Params, limits: Limits) -> Screened:
    runs, default = turns.runs[name], turns.runs[DEFAULT]
    if failure := turns.failures.get(name, ""):
        return Screened(params, None, failure=failure)
    if not runs or len(runs) != len(default):
        return Screened(params, None, failure=f"the {name} was not measured to the end")
    failure = _excess(name, Tried(params, tuple(runs)), limits)
    return Screened(params, latency_ratio(runs, default).estimate, peak_ratio(runs, default), failure)


def _excess(name: str, one: Tried, limits: Limits) -> str:
    """Which limits it does not keep on this text; empty where it keeps all."""
    broken = [f"{limit} by {excess:.1%}" for limit, excess in limits.excess(one).items() if excess > 0]
    return f"the {name} exceeds {', '.join(broken)} on the text kept for confirming" if broken else ""


def _best(screening: Sequence[Screened], objective: Objective) -> Screened | None:
    def cost(one: Screened) -> tuple[bool, float]:
        assert one.ratio is not None and one.peak_ratio is not None
        too_slow = objective is Objective.MEMORY and one.ratio > _PROMISING
        return too_slow, one.ratio if too_slow else objective.cost(one.ratio, one.peak_ratio)

    return min((one for one in screening if not one.failure), key=cost, default=None)
