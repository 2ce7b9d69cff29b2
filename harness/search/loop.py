"""The search loop, and the choice at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from harness.measure.stats import median
from harness.search.confirm import Confirmation, Measure, confirm
from harness.search.outcome import Kind, Outcome, Tried, feasible
from harness.search.plan import num_pairs
from harness.search.space import Params
from harness.search.study import Proposal, Study


class NothingRunsError(Exception):
    """No configuration that was tried runs within the limit."""


class Watcher(Protocol):
    """Is told about every run."""

    def trial(self, number: int, params: Params, outcome: Outcome, best: Tried | None) -> None:
        """A trial of the search has ended."""

    def confirmation(self, name: str, outcome: Outcome) -> None:
        """A run of the confirmation has ended."""


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
    watcher: Watcher,
    *,
    budget_s: float,
    num_trials: int | None,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Run trials until the time or their number is spent, the default at least; why it ended.

    A trial is begun when half of it, by the median so far, still fits.
    """
    start = clock()
    while True:
        walls = [record.outcome.wall_s for record in study.records() if not record.reused]
        if num_trials is not None and len(walls) >= num_trials:
            return f"{len(walls)} trials"
        if walls and clock() - start + median(walls) / 2 > budget_s:
            return f"time budget of {budget_s:.0f} s"
        proposal = study.ask()
        if proposal is None:
            return "every configuration was tried"
        outcome = run_one(study, proposal, measure)
        best = next(iter(feasible(study.tried(), study.max_memory_bytes)), None)
        watcher.trial(len(walls) + 1, proposal.params, outcome, best)


def run_one(study: Study, proposal: Proposal, measure: Measure) -> Outcome:
    """Measure a proposal and tell it; one that is interrupted is closed first."""
    try:
        outcome = measure(proposal.params)
    except BaseException:
        study.abandon(proposal)
        raise
    study.tell(proposal, outcome)
    return outcome


def choose(study: Study, measure: Measure, measure_unseen: Measure, watcher: Watcher, *, budget_s: float) -> Choice:
    """The fastest configuration within the limit if its gain over the default is proven, else the default.

    Args:
        measure: on the search's part of the workload. measure_unseen: on the part kept for confirming.
        budget_s: of the search; confirming takes its share of as much again.

    Raises:
        NothingRunsError: nothing was tried that runs within the limit.
    """
    default = study.space.default
    again = run_one(study, study.propose(default), measure)
    tried = study.tried()
    within = feasible(tried, study.max_memory_bytes)
    if not within:
        raise NothingRunsError
    best = within[0]
    baseline = next((one for one in within if one.params == default), None)
    if baseline is None:
        return Choice(best.params, "the default does not run within the limit", None, None)
    drift = _drift(baseline)
    if best.params == default:
        return Choice(default, "nothing faster than the default was found", None, drift)
    pair_s = again.wall_s + median([run.load_s + run.run_s for run in best.runs])
    confirmation = confirm(measure_unseen, best.params, default, num_pairs(pair_s, budget_s), watcher.confirmation)
    if confirmation.is_proven:
        return Choice(best.params, "faster than the default, proven on other text", confirmation, drift)
    why = confirmation.failure or "the gain of the fastest configuration is not proven on other text"
    return Choice(default, f"{why}; the default is kept", confirmation, drift)


def _drift(baseline: Tried) -> float | None:
    runs = baseline.runs
    return runs[-1].latency_ms_p50 / runs[0].latency_ms_p50 if len(runs) > 1 else None


def closest(study: Study) -> str:
    """For people: what kept every configuration from being used."""
    if study.tried():
        nearest = min(study.tried(), key=lambda one: one.peak_memory_bytes)
        return f"the smallest configuration peaked at {nearest.peak_memory_bytes} bytes"
    kinds = [record.outcome for record in study.records() if record.outcome.kind is not Kind.OK]
    return f"the last trial ended with {kinds[-1].kind}: {kinds[-1].message}" if kinds else "nothing was tried"
