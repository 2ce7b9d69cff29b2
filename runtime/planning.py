"""Asks a scheduler what runs next, and the routes that it wants to know, beside the running pass where it can.

ExpertFlow's dual-batch pipeline: while one batch computes, the routes of the others are predicted and the next batch is
chosen in a worker thread. A request's next token is known only after its pass, so that the routes of the requests that
compute are those of their tokens so far; with several batches in turn (`window`), these are the last to run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from runtime.predictors.base import RoutePredictor
from runtime.schedulers.base import Request, Route, Scheduler

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

    Without `predictor`, routes are those that the requests' last tokens really took (`saw_routes`).

    Attributes:
        busy_s: seconds spent predicting routes and choosing.
        hidden_s: of these, spent while a pass computed.
    """

    def __init__(self, scheduler: Scheduler, predictor: RoutePredictor | None, clock: Callable[[], float]) -> None:
        self._scheduler, self._predictor, self._clock = scheduler, predictor, clock
        self._worker = ThreadPoolExecutor(1, "planner") if scheduler.needs_routes else None
        self._job: Future[tuple[list[str], float]] | None = None
        self._planned: list[str] = []
        self._routes: dict[str, Route] = {}
        self._lengths: dict[str, int] = {}  # of the contexts whose routes were predicted
        self.busy_s = self.hidden_s = 0.0

    def begin_ahead(self, expected: Situation) -> None:
        """A pass begins; `expected` is what will be the case after it, if no text ends early and nothing arrives.

        Does nothing for a scheduler that takes no routes: it costs too little to be worth a thread.
        """
        if self._worker is not None and (expected.waiting or expected.running):
            self._job = self._worker.submit(self._timed_choice, expected, dict(self._routes))

    def choose(self, found: Situation) -> list[str]:
        """Who runs in the next pass: what was planned ahead, less those who are gone, else a choice made now.

        Raises:
            RuntimeError: the scheduler named nobody.
        """
        self._settle()
        present = found.ids
        planned, self._planned = self._planned, []
        if chosen := [name for name in planned if name in present]:
            return chosen
        names, took_s = self._timed_choice(found, self._routes)
        self.busy_s += took_s
        if chosen := [name for name in names if name in present]:
            return chosen
        raise RuntimeError(f"{type(self._scheduler).__name__} chose none of {len(present)} requests: {names}")

    def saw_routes(self, routes: Mapping[str, Route]) -> None:
        """Routes that the last tokens of requests took in the pass that ended."""
        if self._predictor is None:
            self._routes |= routes

    def finished(self, request: Request) -> None:
        """A request is complete."""
        self._settle()
        self.forget(request.id)
        self._scheduler.finished(request, self._clock())

    def forget(self, name: str) -> None:
        """A request is gone."""
        self._settle()
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
        self._planned, took_s = job.result()
        self.busy_s += took_s
        self.hidden_s += max(0.0, took_s - (self._clock() - start))

    def _timed_choice(self, situation: Situation, seen: dict[str, Route]) -> tuple[list[str], float]:
        start = self._clock()
        predictor, contexts = self._predictor, situation.contexts
        routes: Mapping[str, Route] = {}
        if self._scheduler.needs_routes:
            routes = seen if predictor is None else _Lazy(contexts, lambda: self._predicted(predictor, contexts))
        chosen = self._scheduler.choose(situation.waiting, situation.running, routes, self._clock())
        return list(chosen), self._clock() - start

    def _predicted(self, predictor: RoutePredictor, contexts: Mapping[str, Context]) -> dict[str, Route]:
        """Routes of `contexts`; those that have grown since they were last predicted are predicted anew."""
        grown = {name: context for name, context in contexts.items() if self._lengths.get(name) != len(context)}
        predicted = np.asarray(predictor.routes(list(grown.values()))) if grown else ()
        for (name, context), route in zip(grown.items(), predicted, strict=True):
            self._routes[name], self._lengths[name] = route, len(context)
        return self._routes


class _Lazy(Mapping[str, Route]):
    """Routes that are predicted, all at once, when one is first asked for."""

    def __init__(self, names: Iterable[str], predict: Callable[[], Mapping[str, Route]]) -> None:
        self._names, self._predict = set(names), predict
        self._routes: Mapping[str, Route] | None = None

    def __getitem__(self, name: str) -> Route:
        if name not in self._names:
            raise KeyError(name)
        self._routes = self._predict() if self._routes is None else self._routes
        return self._routes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
