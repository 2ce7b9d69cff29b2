"""What a scheduler's batches need on a recorded trace: the scheduler itself chooses, the trace says what was routed.

No model and no time is involved, so any number of requests, any model's routing, and schedulers that know the future.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from harness.measure.schedule import Integers, Schedule, route_of
from runtime.errors import UsageError
from runtime.schedulers.base import Request, Route, Scheduler
from runtime.schedulers.recent_routes import RecentRoutes
from runtime.trace import RoutingTrace
from runtime.vocabulary import Phase

Knowledge = Literal["none", "last", "recent", "next"]
"""Which routes a scheduler is told: none, that of each request's last token, those that its last tokens used most
(as the engine does), or that of its next token, which nobody can know."""

MIN_TOKENS = 2


class ScheduledPasses(Schedule):
    """The decode passes in which a scheduler runs the requests of a trace, in a closed loop.

    As many requests are outstanding as the scheduler lets be under way; the next one takes the place of one that ends.
    Only the tokens that were decoded count. The run stops when fewer requests are left.

    Args:
        max_tokens: stop after about that many.

    Raises:
        UsageError: the trace has too few requests.
    """

    def __init__(self, trace: RoutingTrace, scheduler: Scheduler, knowledge: Knowledge, max_tokens: int) -> None:
        super().__init__(trace, max_tokens=0)
        outstanding = scheduler.group * scheduler.window
        requests = _decoded(trace)
        if len(requests) < outstanding:
            raise UsageError(
                f"the trace has {len(requests)} requests of {MIN_TOKENS} decoded tokens or more, {outstanding} are to "
                "be outstanding; record more, or take a smaller group or window"
            )
        loop = _Loop(trace, requests, knowledge)
        while self.num_tokens < max_tokens and loop.admit(outstanding):
            rows = loop.run_pass(scheduler)
            self.passes.append(rows)
            self.num_tokens += len(rows)

    @property
    def distinct_experts(self) -> float:
        """Mean experts that a layer of a pass needs."""
        return len(self.demands.experts) / (len(self.demands.starts) - 1)

    @property
    def batch(self) -> float:
        """Mean requests of a pass."""
        return self.num_tokens / len(self.passes)


def _decoded(trace: RoutingTrace) -> list[Integers]:
    """The decoded rows of each request, those without any left out."""
    decoded = np.ones(trace.num_tokens, np.bool_) if trace.phase is None else trace.phase == Phase.DECODE
    rows = np.flatnonzero(decoded)
    rows = rows[np.argsort(trace.request[rows], kind="stable")]
    parts = np.split(rows, np.flatnonzero(np.diff(trace.request[rows])) + 1)
    return [part for part in parts if len(part) >= MIN_TOKENS]


@dataclass
class _Text:
    """One request on its way."""

    name: str
    rows: Integers
    place: int = 0

    def as_request(self) -> Request:
        return Request(self.name, "default", 0.0, 1, 0, self.place, len(self.rows))


class _Loop:
    """Requests as they come and go."""

    def __init__(self, trace: RoutingTrace, requests: list[Integers], knowledge: Knowledge) -> None:
        # Neighbours in a trace are often of one kind; a server's are not.
        order = np.random.default_rng(0).permutation(len(requests))
        self._coming = deque(_Text(str(number), requests[number]) for number in order)
        self._running: dict[str, _Text] = {}
        self._trace, self._recent = trace, RecentRoutes()
        self._routes: dict[Knowledge, Callable[[], Mapping[str, Route]]] = {
            "none": dict,
            "last": lambda: {text.name: self._route(text, text.place - 1) for text in self._running.values()},
            "recent": lambda: self._recent.routes(self._running),
            "next": lambda: {text.name: self._route(text, text.place) for text in self._running.values()},
        }
        self._known = self._routes[knowledge]

    def admit(self, outstanding: int) -> bool:
        """Let requests arrive until so many are outstanding; False: there are no more."""
        while len(self._running) < outstanding and self._coming:
            text = self._coming.popleft()
            self._running[text.name] = text
            self._advance(text)  # the first token is not decided about: it shows where the request begins
        return len(self._running) == outstanding

    def run_pass(self, scheduler: Scheduler) -> Integers:
        """The rows of the next pass."""
        running = [text.as_request() for text in self._running.values()]
        chosen = [self._running[name] for name in scheduler.choose([], running, self._known(), 0.0)]
        rows = np.array([text.rows[text.place] for text in chosen])
        for text in chosen:
            self._advance(text)
            if text.place == len(text.rows):
                del self._running[text.name]
                self._recent.forget(text.name)
                scheduler.finished(text.as_request(), 0.0)
        return rows

    def _advance(self, text: _Text) -> None:
        self._recent.saw({text.name: self._route(text, text.place)})
        text.place += 1

    def _route(self, text: _Text, place: int) -> Route:
        return route_of(self._trace, int(text.rows[place]))
