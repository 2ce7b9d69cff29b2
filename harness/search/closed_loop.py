"""The passes in which a closed loop serves a workload: the engine's own schedulers and planner choose, a trace says
what was routed. Time is involved only where a `Clock` is given: none but `deadline` chooses by it, and only by SLOs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from harness.measure.schedule import Schedule, route_of
from harness.search.tracing import RequestRows, WorkloadTrace
from harness.search.trial import WARM_UP_TOKENS
from runtime.planning import Planner, Situation
from runtime.profile import Profile
from runtime.prompts import PromptRequest
from runtime.schedulers.base import Request, Route
from runtime.schedulers.make import build_scheduler


@dataclass(frozen=True)
class Clock:
    """Virtual time for a scheduler that chooses by SLOs.

    Attributes:
        pass_s, token_s: a pass takes `pass_s`, and `token_s` with each of its tokens.
        slo_s: of each request, in the order of the workload.
    """

    pass_s: float
    token_s: float
    slo_s: tuple[float, ...]


@dataclass
class Span:
    """The passes of one request. `arrival`: it comes when the pass before this one has ended.

    `slo_s`, `arrival_s` and `finish_s` are on the loop's `Clock`, where there is one.
    """

    rows: RequestRows
    arrival: int = 0
    first: int = -1
    last: int = -1
    slo_s: float | None = None
    arrival_s: float = 0.0
    finish_s: float = 0.0


@dataclass
class _Text:
    """One request on its way."""

    name: str
    span: Span
    num_out: int = 0

    def as_request(self, *, after: bool = False) -> Request:
        """As schedulers see it; `after` the pass that it is in."""
        rows, num_out = self.span.rows, self.num_out + after
        left = 0 if num_out else len(rows.prompt)
        return Request(
            self.name, "default", self.span.arrival_s, len(rows.prompt), left, num_out, self.max_output_tokens,
            self.span.slo_s,
        )  # fmt: skip

    @property
    def max_output_tokens(self) -> int:
        """A replay's end is no more known beforehand than that of other texts (`Served.as_request`)."""
        return max(self.span.rows.num_output_tokens, PromptRequest.max_new_tokens)


class ServedPasses(Schedule):
    """What a trial runs: the warm-up request, then the workload, `concurrency` requests outstanding.

    Args:
        profile: its scheduler section is what counts.
        clock: None: the scheduler sees no time pass, and no request has an SLO.

    Attributes:
        num_warm_up: passes of the warm-up.
        is_planned: a scheduler chose the others.
        spans: by request, in the order of the workload.
    """

    def __init__(self, workload: WorkloadTrace, profile: Profile, concurrency: int, clock: Clock | None = None) -> None:
        super().__init__(workload.trace, max_tokens=0)
        slos = clock.slo_s if clock is not None else (None,) * len(workload.requests)
        self.spans = [Span(rows, slo_s=slo_s) for rows, slo_s in zip(workload.requests, slos, strict=True)]
        self._alone([Span(_shortened(workload.requests[-1]))])
        self.num_warm_up = len(self.passes)
        self.is_planned = concurrency > 1
        if not self.is_planned:
            self._alone(self.spans)
        else:
            _Loop(self, profile, concurrency, clock).run()
        self.num_tokens = sum(map(len, self.passes))
        self.phases = np.array([self.passing(step).phase for step in range(len(self.passes))])
        self.sizes = np.array([len(rows) for rows in self.passes])

    @property
    def num_in_slo(self) -> int | None:
        """Requests that were complete within their SLO; None without a clock."""
        slos = [(span.finish_s - span.arrival_s, span.slo_s) for span in self.spans if span.slo_s is not None]
        return sum(took_s <= slo_s for took_s, slo_s in slos) if slos else None

    def add(self, rows: list[int]) -> int:
        """The number of a further pass."""
        self.passes.append(np.array(rows))
        return len(self.passes) - 1

    def _alone(self, spans: list[Span]) -> None:
        for span in spans:
            span.arrival = len(self.passes)
            span.first = self.add(list(span.rows.prompt))
            for row in span.rows.decoded:
                self.add([row])
            span.last = len(self.passes) - 1


def _shortened(rows: RequestRows) -> RequestRows:
    prompt_tokens, output_tokens = WARM_UP_TOKENS
    return RequestRows(rows.prompt[:prompt_tokens], rows.decoded[: output_tokens - 1])


@dataclass
class _Loop:
    """Continuous batching as `runtime.serving` runs it, as far as decisions are concerned."""

    passes: ServedPasses
    profile: Profile
    concurrency: int
    clock: Clock | None
    _now_s: float = 0.0
    _waiting: dict[str, _Text] = field(default_factory=dict)
    _running: dict[str, _Text] = field(default_factory=dict)

    def run(self) -> None:
        """Add every pass."""
        scheduler = build_scheduler(self.profile)
        planner = Planner(scheduler, None, lambda: self._now_s)
        coming = deque(_Text(str(number), span) for number, span in enumerate(self.passes.spans))
        try:
            while coming or self._waiting or self._running:
                while coming and len(self._waiting) + len(self._running) < self.concurrency:
                    text = coming.popleft()
                    text.span.arrival, text.span.arrival_s = len(self.passes.passes), self._now_s
                    self._waiting[text.name] = text
                chosen = self._begin(planner.choose(self._situation(())))
                planner.begin_ahead(self._situation(chosen))
                step = self.passes.add([row for text in chosen for row in _rows(text)])
                if self.clock is not None:
                    self._now_s += self.clock.pass_s + self.clock.token_s * len(self.passes.passes[step])
                planner.saw_routes(self._routes(chosen) if scheduler.needs_routes else {})
                for text in chosen:
                    self._advance(text, step, planner)
        finally:
            planner.close()

    def _begin(self, names: list[str]) -> list[_Text]:
        for name in names:
            if name in self._waiting:
                self._running[name] = self._waiting.pop(name)
        return [self._running[name] for name in names]

    def _situation(self, computing: list[_Text] | tuple[()]) -> Situation:
        """Who waits and runs; after the pass that is `computing`, as far as that can be known."""
        names = {text.name for text in computing}
        running = [text.as_request(after=name in names) for name, text in self._running.items()]
        running = [request for request in running if request.output_tokens < request.max_output_tokens]
        contexts = {request.id: (0,) * (request.output_tokens + 1) for request in running if request.is_decoding}
        return Situation([text.as_request() for text in self._waiting.values()], running, contexts)

    def _routes(self, computing: list[_Text]) -> Mapping[str, Route]:
        return {text.name: route_of(self.passes.trace, _rows(text)[-1]) for text in computing}

    def _advance(self, text: _Text, step: int, planner: Planner) -> None:
        text.num_out += 1
        if text.num_out == 1:
            text.span.first = step
        if text.num_out == text.span.rows.num_output_tokens:
            text.span.last, text.span.finish_s = step, self._now_s
            del self._running[text.name]
            planner.finished(text.as_request())


def _rows(text: _Text) -> tuple[int, ...]:
    """What it computes next."""
    rows = text.span.rows
    return rows.prompt if text.num_out == 0 else (rows.decoded[text.num_out - 1],)
