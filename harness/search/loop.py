"""The search loop, and the choice at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from harness.measure.environment import GPU_LOST
from harness.measure.stats import median
from harness.search.confirm import Confirmation
from harness.search.guide import Guide
from harness.search.memory_guard import MemoryGuard
from harness.search.objective import Objective
from harness.search.outcome import Kind, Outcome, Tried, feasible, front
from harness.search.space import Params
from harness.search.study import Proposal, Study
from runtime.errors import ExpertFlowError

PATIENCE, PATIENT_TRIALS = 15, 25
"""After so many trials, the search ends when as many in a row have made neither the best nor the front better."""
MAX_REFUSED = 200
NOTICEABLE = 0.005
"""Share of the cost below which an improvement is none."""

NUM_REMEASURED, REPEATS = 3, 2
"""Where there is no default to confirm against: configurations that are measured again, and how often."""

Measure = Callable[[Params], Outcome]


class NothingRunsError(Exception):
    """No configuration that was tried runs within the limits."""


class GpuLostError(ExpertFlowError):
    """Nothing more can be measured; what was, is kept."""


class Watcher(Protocol):
    """Is told about every run."""

    def trial(self, number: int, params: Params, outcome: Outcome, best: Tried | None, source: str) -> None:
        """A trial of the search has ended; `source` proposed it."""

    def confirmation(self, name: str, outcome: Outcome) -> None:
        """A run of the confirmation has ended."""


class Confirms(Protocol):
    """Measures finalists beside the default on text that the search has not seen, best first."""

    def __call__(self, finalists: Sequence[Params], default: Params) -> Confirmation:
        """See `harness.search.confirm`."""


@dataclass(frozen=True)
class Choice:
    """What the profile will say, and why. `drift` is the default's latency at the end over that at the start."""

    params: Params
    reason: str
    confirmation: Confirmation | None
    drift: float | None


def search(
    study: Study,
    measure: Measure,
    guide: Guide | None,
    watcher: Watcher,
    *,
    guard: MemoryGuard | None = None,
    objective: Objective,
    budget_s: float,
    num_trials: int | None,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Run trials until the time or their number is spent, the default at least; why it ended.

    A trial is begun when half of it, by the median so far, still fits.

    Args:
        guide: proposes what is worth measuring; None: the study alone does.
        guard: is told what memory trials took.
        num_trials: launched ones, those before a resume among them; None: as many as the budget holds.
        stop: asked after each trial.

    Raises:
        GpuLostError: the GPU was lost; what was measured before is in the study.
    """
    start, progress, num_refused = clock(), _Progress(study, objective), 0
    while True:
        records, tried = study.records(), study.tried()
        if guard is not None:
            guard.learn(tried, sum(one.outcome.kind is Kind.OUT_OF_MEMORY for one in records))
        walls = [one.outcome.wall_s for one in records if not one.reused and one.outcome.was_launched]
        if num_trials is not None and len(walls) >= num_trials:
            return f"{len(walls)} trials"
        if walls and clock() - start + median(walls) / 2 > budget_s:
            return f"time budget of {budget_s:.0f} s"
        if stop():
            return "interrupted"
        if num_trials is None and progress.is_exhausted():
            return f"nothing better in {PATIENCE} trials"
        if guide is not None and not study.has_waiting():
            study.enqueue(guide.propose(records, tried), "simulator")
        proposal = study.ask()
        if proposal is None:
            return "every configuration was tried"
        foretold_ms = None if guide is None else guide.foretell(proposal.params)
        outcome = run_one(study, proposal, measure, foretold_ms)
        num_refused = 0 if outcome.was_launched else num_refused + 1
        if num_refused == MAX_REFUSED:
            return f"{num_refused} proposals in a row were predicted not to fit"
        watcher.trial(len(walls) + 1, proposal.params, outcome, progress.best(), proposal.source)


class _Progress:
    """Whether the search still gets anywhere."""

    def __init__(self, study: Study, objective: Objective) -> None:
        self._study, self._objective = study, objective
        self._cost = float("inf")
        self._front: list[Params] = []
        self._since = 0

    def best(self) -> Tried | None:
        """The best configuration within the limits so far."""
        return self._best(feasible(self._study.tried(), self._study.limits))

    def _best(self, within: Sequence[Tried]) -> Tried | None:
        return next(iter(self._objective.rank(within, _measured(within, self._study.space.default))), None)

    def is_exhausted(self) -> bool:
        """Asked before each trial: for how long nothing has become better."""
        within = feasible(self._study.tried(), self._study.limits)
        best, edge = self._best(within), [one.params for one in front(within)]
        cost = float("inf") if best is None else self._objective.cost(best.latency_ms_p50, best.peak_memory_bytes)
        if cost < (1 - NOTICEABLE) * self._cost or edge != self._front:
            self._since = 0
        else:
            self._since += 1
        self._cost, self._front = min(cost, self._cost), edge
        return self._since >= PATIENCE and len(self._study.records()) >= PATIENT_TRIALS


def run_one(study: Study, proposal: Proposal, measure: Measure, foretold_ms: float | None = None) -> Outcome:
    """Measure a proposal and tell it; one that is interrupted is closed first.

    Raises:
        GpuLostError: after it was told.
    """
    try:
        outcome = replace(measure(proposal.params), foretold_ms=foretold_ms)
    except BaseException:
        study.abandon(proposal)
        raise
    study.tell(proposal, outcome)
    _check_gpu(outcome)
    return outcome


def _check_gpu(outcome: Outcome) -> None:
    if outcome.kind is Kind.ENVIRONMENT and outcome.message.startswith(GPU_LOST):
        raise GpuLostError(outcome.message)


def choose(
    study: Study,
    measure: Measure,
    verify: Measure,
    confirms: Confirms,
    *,
    objective: Objective,
    num_finalists: int,
) -> Choice:
    """The best configuration within the limits if its gain over the default is proven, else the default.

    Args:
        measure: on the search's part of the workload.
        verify: whether the tokens of a configuration are those of the same kernels on demand.
        confirms: on the part kept for confirming.
        num_finalists: best configurations that are confirmed at most.

    Raises:
        NothingRunsError: nothing was tried that runs within the limits.
        GpuLostError: the GPU was lost.
    """
    default = study.space.default
    if _measured(study.tried(), default) is not None:
        run_one(study, study.propose(default), measure)
    within = feasible(study.tried(), study.limits)
    baseline = _measured(within, default)
    ranked = objective.rank(within, baseline)
    if not ranked:
        raise NothingRunsError
    if baseline is None:
        return Choice(_best_again(study, ranked, measure, verify, objective), _NO_DEFAULT, None, None)
    drift = _drift(baseline)
    better = ranked[: next(i for i, one in enumerate(ranked) if one is baseline)]
    if not better:
        has_others = any(record.params != default for record in study.records())
        return Choice(default, _NOTHING_BETTER if has_others else _NOTHING_ELSE, None, drift)
    finalists = list(islice(_sound(study, better, verify), num_finalists))
    if not finalists:
        return Choice(default, "no finalist was seen to compute what its kernels compute on demand", None, drift)
    confirmation = confirms(finalists, default)
    if confirmation.is_proven:
        return Choice(confirmation.params, _GAINS[objective], confirmation, drift)
    why = confirmation.failure or "the gain of the best configuration is not proven on other text"
    return Choice(default, f"{why}; the default is kept", confirmation, drift)


def _best_again(
    study: Study, ranked: Sequence[Tried], measure: Measure, verify: Measure, objective: Objective
) -> Params:
    """Of a few that look best the one that does when they are measured again: the best of many is partly luck."""
    sound = list(islice(_sound(study, ranked, verify), NUM_REMEASURED))
    for params in sound * REPEATS:
        run_one(study, study.propose(params, "repeat"), measure)
    again = [one for one in feasible(study.tried(), study.limits) if one.params in sound]
    if not again:
        raise NothingRunsError
    return objective.rank(again, None)[0].params


def _sound(study: Study, ranked: Sequence[Tried], verify: Measure) -> Iterator[Params]:
    """Those that compute what they should; the study is told of the others."""
    for one in ranked:
        outcome = verify(one.params)
        _check_gpu(outcome)
        if outcome.kind is Kind.OK:
            yield one.params
        elif outcome.kind is Kind.WRONG_TOKENS:
            study.tell(study.propose(one.params, "verify"), outcome)


_NO_DEFAULT = "the default does not run within the limits"
_NOTHING_BETTER = "nothing better than the default was found"
_NOTHING_ELSE = "nothing but the default was tried: the search needs more time (--time-budget, --trials)"
_GAINS = {
    Objective.LATENCY: "faster than the default, proven on other text",
    Objective.MEMORY: "smaller than the default and hardly slower, proven on other text",
    Objective.BALANCED: "better than the default in latency x memory, proven on other text",
}


def _measured(within: Sequence[Tried], params: Params) -> Tried | None:
    return next((one for one in within if one.params == params), None)


def _drift(baseline: Tried) -> float | None:
    runs = baseline.runs
    return runs[-1].latency_ms_p50 / runs[0].latency_ms_p50 if len(runs) > 1 else None
