"""One search of the product on a hidden machine, and how far from the optimum it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ParamSpec, TypeVar

from harness.measure.workload import TokenRequest
from harness.search.confirm import NUM_PAIRS, Confirmation, confirm, screening_rounds
from harness.search.guide import Guide
from harness.search.hidden import HiddenMachine
from harness.search.loop import NUM_REMEASURED, REPEATS, Choice, NothingRunsError, choose, search
from harness.search.memory_guard import MemoryGuard
from harness.search.objective import Objective
from harness.search.outcome import Kind, Limits, Outcome, Tried
from harness.search.problem import Problem
from harness.search.space import Params
from harness.search.study import Study, explore

P = ParamSpec("P")
T = TypeVar("T")

_NUM_FINALISTS = 5
_SEGMENTS = [(TokenRequest(str(n), "default", (n,), (n,)),) for n in range(screening_rounds(NUM_PAIRS) + NUM_PAIRS)]


@dataclass(frozen=True)
class Variant:
    """How to search. `is_guided`: the simulator proposes too, as in the product."""

    sampler: str = "tpe"
    is_guided: bool = True


@dataclass
class Stopwatch:
    """Processor time that some calls take."""

    spent_s: float = 0.0

    def timed(self, call: Callable[P, T]) -> Callable[P, T]:
        """The same, its time added up."""

        def timing(*args: P.args, **kwargs: P.kwargs) -> T:
            began_s = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent_s += time.process_time() - began_s

        return timing


@dataclass(frozen=True)
class Searched:
    """What a search came to.

    Attributes:
        params: chosen; None where nothing ran. latency_ms: of it, without noise.
        num_launched, num_infeasible: trials of the search, and how many of these ran out of memory; not those of the
            confirmation.
        sampler_s, guide_s: of a processor, by the study with its sampler and by the simulator's proposals.
    """

    params: dict[str, Any] | None
    latency_ms: float | None
    reason: str
    num_launched: int
    num_infeasible: int
    sampler_s: float
    guide_s: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class _Silent:
    """A `Watcher` that says nothing."""

    def trial(self, number: int, params: Params, outcome: Outcome, best: Tried | None, source: str) -> None:
        """See `Watcher.trial`."""

    def confirmation(self, name: str, outcome: Outcome) -> None:
        """See `Watcher.confirmation`."""


def search_once(problem: Problem, seed: int, variant: Variant, num_trials: int) -> Searched:
    """Search and choose as the tuner does, on the machine of `seed`.

    Args:
        num_trials: launched at most. Kept of them for the choice are the default's last one and, where the default
            does not run, those of the best that are then measured again.
    """
    guard, limits = problem.guard(), Limits(max_memory_bytes=problem.limit_bytes)
    machine = problem.hidden(seed, guard)
    machine_time, guide_time, all_time = Stopwatch(), Stopwatch(), Stopwatch()
    measure = machine_time.timed(machine.measure)
    guide = _guide(problem, guard, limits, seed) if variant.is_guided else None
    if guide is not None:
        for name in ("propose", "foretell"):
            setattr(guide, name, guide_time.timed(getattr(guide, name)))

    def run() -> Study:
        study = Study(Path(folder), problem.space, {"seed": seed}, limits=limits, seed=seed, sampler=variant.sampler)
        to_search = partial(search, study, measure, guide, _Silent(), guard=guard, objective=Objective.LATENCY)
        to_search(budget_s=float("inf"), num_trials=1)  # the default
        num_kept = 1 if study.tried() else 1 + NUM_REMEASURED * REPEATS
        to_search(budget_s=float("inf"), num_trials=num_trials - num_kept)
        return study

    with TemporaryDirectory() as folder:
        study = all_time.timed(run)()
        choice = _choice(study, machine, limits)
        records = [one for one in study.records() if not one.reused and one.outcome.was_launched]
    return Searched(
        params=None if choice is None else dict(choice.params),
        latency_ms=None if choice is None else machine.truth(choice.params).latency_ms_p50,
        reason="nothing runs within the limit" if choice is None else choice.reason,
        num_launched=len(records),
        num_infeasible=sum(one.outcome.kind is Kind.OUT_OF_MEMORY for one in records),
        sampler_s=all_time.spent_s - machine_time.spent_s - guide_time.spent_s,
        guide_s=guide_time.spent_s,
    )


def _guide(problem: Problem, guard: MemoryGuard, limits: Limits, seed: int) -> Guide:
    space = problem.space
    return Guide(space, problem.simulator, space.overrides, guard, limits, Objective.LATENCY, explore, seed=seed)


def _choice(study: Study, machine: HiddenMachine, limits: Limits) -> Choice | None:
    """As in the tuner, tokens being beyond doubt here."""

    def confirms(finalists: Sequence[Params], default: Params) -> Confirmation:
        return confirm(
            finalists,
            default,
            _SEGMENTS,
            open_contender=machine.contender,
            fit_together=lambda configurations: True,
            num_pairs=NUM_PAIRS,
            objective=Objective.LATENCY,
            limits=limits,
            on_run=lambda name, outcome: None,
        )

    def verify(params: Params) -> Outcome:
        return Outcome(Kind.OK)

    try:
        objective = Objective.LATENCY
        return choose(study, machine.measure, verify, confirms, objective=objective, num_finalists=_NUM_FINALISTS)
    except NothingRunsError:
        return None
