"""Asks a scheduler what runs next, and the routes that it wants to know, beside the running pass where it can.

ExpertFlow's dual-batch pipeline: while one batch computes, the routes of the others are predicted and the next batch is
chosen in a worker thread. A request's next token is known only after its pass, so that the routes of the requests that
compute are those of their tokens so far; with several batches in turn (`window`), these are the last to run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from runtime.predictors.base import RoutePredictor
from runtime.schedulers.base import Request, Route, Scheduler
from runtime.schedulers.recent_routes import RecentRoutes

Context = Sequence[int]


@dataclass(frozen=True, slots=True)
class Situation:
    """What a scheduler is asked about.

    Attributes:
        waiting: in order of arrival.
        running: in order of admission.
        contexts: token ids so far, of each running request that decodes, by id.
    """

    waiting: Sequence[Request]
    running: Sequence[Request]
    contexts: Mapping[str, Context]

    @property
    def ids(self) -> set[str]:
        """Everyone in it."""
        return {request.id for request in (*self.waiting, *self.running)}

    def decoding_without(self, names: Sequence[str]) -> Situation:
        """The decoding requests alone, less `names`."""
        left = [request for request in self.running if request.is_decoding and request.id not in names]
        return Situation((), left, self.contexts)


class Planner:
    """One scheduler in use. `clock` gives the seconds of the run, which arrivals are counted in.

    Without `predictor`, routes are expected to be those that the requests' last tokens took (`RecentRoutes`).

    Attributes:
        busy_s: seconds spent predicting routes and choosing.
        hidden_s: of these, spent while a pass computed.
    """

    def __init__(self, scheduler: Scheduler, predictor: RoutePredictor | None, clock: Callable[[], float]) -> None:
        self._scheduler, self._predictor, self._clock = scheduler, predictor, clock
        self._worker = ThreadPoolExecutor(1, "planner") if scheduler.needs_routes else None
        self._job: Future[_Plan] | None = None
        self._plan: _Plan | None = None
        self._recent = RecentRoutes()
        self._routes: dict[str, Route] = {}  # predicted
        self._lengths: dict[str, int] = {}  # of the contexts whose routes were predicted
        self.busy_s = self.hidden_s = 0.0

    def begin_ahead(self, expected: Situation) -> None:
        """A pass begins; `expected` is what will be the case after it, if no text ends early and nothing arrives.

        Where it comes otherwise, the plan is given up, and the scheduler is as if it had not been asked.

        Does nothing for a scheduler that takes no routes: it costs too little to be worth a thread.
        """
        if self._worker is not None and (expected.waiting or expected.running):
            self._job = self._worker.submit(self._planned, expected)

    def choose(self, found: Situation) -> list[str]:
        """Who runs in the next pass: what was planned ahead for just these requests, else a choice made now.

        Raises:
            RuntimeError: the scheduler named nobody.
        """
        self._settle()
        present = found.ids
        if self._plan is not None and self._plan.expected != present:
            self._give_up()
        plan, self._plan = self._plan, None
        if plan is not None:
            return plan.names
        names, took_s = self._timed_choice(found)
        self.busy_s += took_s
        if chosen := [name for name in names if name in present]:
            return chosen
        raise RuntimeError(f"{type(self._scheduler).__name__} chose none of {len(present)} requests: {names}")

    def saw_routes(self, routes: Mapping[str, Route]) -> None:
        """Routes that the last tokens of requests took in the pass that ended."""
        self._settle()
        self._recent.saw(routes)

    def finished(self, request: Request) -> None:
        """A request is complete."""
        self.forget(request.id)
        self._scheduler.finished(request, self._clock())

    def forget(self, name: str) -> None:
        """A request is gone."""
        self._settle()
        if self._plan is not None and name in self._plan.expected:
            self._give_up()
        self._recent.forget(name)
        self._routes.pop(name, None)
        self._lengths.pop(name, None)

    def close(self) -> None:
        """Stop the worker."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def _settle(self) -> None:
        """Take the worker's answer, so that nothing else touches the scheduler's state."""
        if self._job is None:
            return
        start = self._clock()
        job, self._job = self._job, None
        self._plan = job.result()
        self.busy_s += self._plan.took_s
        self.hidden_s += max(0.0, self._plan.took_s - (self._clock() - start))

    def _give_up(self) -> None:
        assert self._plan is not None
        vars(self._scheduler).update(self._plan.before)
        self._plan = None

    def _planned(self, expected: Situation) -> _Plan:
        before = deepcopy(vars(self._scheduler))
        return _Plan(expected.ids, before, *self._timed_choice(expected))

    def _timed_choice(self, situation: Situation) -> tuple[list[str], float]:
        start = self._clock()
        routes: Mapping[str, Route] = {}
        if self._scheduler.needs_routes:
            routes = _Lazy(lambda: self._expected_routes(situation.contexts))
        chosen = self._scheduler.choose(situation.waiting, situation.running, routes, self._clock())
        return list(chosen), self._clock() - start

    def _expected_routes(self, contexts: Mapping[str, Context]) -> Mapping[str, Route]:
        """Routes of `contexts`; those that have grown since they were last predicted are predicted anew."""
        if self._predictor is None:
            return self._recent.routes(contexts)
        grown = {name: context for name, context in contexts.items() if self._lengths.get(name) != len(context)}
        predicted = np.asarray(self._predictor.routes(list(grown.values()))) if grown else ()
        for (name, context), route in zip(grown.items(), predicted, strict=True):
            self._routes[name], self._lengths[name] = route, len(context)
        return {name: self._routes[name] for name in contexts}


class _Plan(NamedTuple):
    """Of the pass after the one that runs: for whom it was made, the scheduler's state before, and the choice."""

    expected: set[str]
    before: dict[str, Any]
    names: list[str]
    took_s: float


class _Lazy(Mapping[str, Route]):
    """Routes that are found, all at once, when one is first asked for."""

    def __init__(self, find: Callable[[], Mapping[str, Route]]) -> None:
        self._find = find

    @cached_property
    def _routes(self) -> Mapping[str, Route]:
        return self._find()

    def __getitem__(self, name: str) -> Route:
        return self._routes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._routes)

    def __len__(self) -> int:
        return len(self._routes)
