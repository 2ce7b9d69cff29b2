"""A serving loop on a virtual clock, with a KV cache that can be full, around any scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from runtime.schedulers.base import Request, Route, Scheduler


@dataclass(frozen=True)
class Job:
    """A request to come, and how long its answer will be."""

    id: str
    arrival_s: float = 0.0
    prompt_tokens: int = 1
    output_tokens: int = 1
    task: str = "default"
    slo_s: float | None = None
    max_output_tokens: int = 64


@dataclass
class Log:
    """What happened: the ids of every pass, whether it decoded, who was there, and when requests were complete."""

    passes: list[tuple[str, ...]] = field(default_factory=list)
    decoding: list[tuple[str, ...]] = field(default_factory=list)  # per pass, all that could; () for a prompt's pass
    under_way: list[int] = field(default_factory=list)  # per pass, requests with tokens in the KV cache
    admitted: list[str] = field(default_factory=list)
    waited: list[tuple[str, ...]] = field(default_factory=list)  # per admission, those that arrived before and wait on
    finished_s: dict[str, float] = field(default_factory=dict)
    num_preempted: int = 0

    def num_in_time(self, jobs: Sequence[Job]) -> int:
        """Jobs complete within their SLO."""
        return sum(self.finished_s[job.id] - job.arrival_s <= job.slo_s for job in jobs if job.slo_s is not None)


def no_route(name: str, place: int) -> Route | None:
    """Nothing is known."""
    return None


@dataclass
class Engine:
    """Serves `jobs`; a pass takes `pass_s(prompt tokens, requests decoded)`.

    A prompt is computed `chunk` tokens a pass. When the KV cache has no room, the request admitted last loses its part.
    """

    scheduler: Scheduler
    jobs: Sequence[Job]
    pass_s: Callable[[int, int], float]
    kv_tokens: float = math.inf
    chunk: int = 1 << 30
    route: Callable[[str, int], Route | None] = no_route

    def __post_init__(self) -> None:
        self.now_s, self.log = 0.0, Log()
        self._coming = sorted(self.jobs, key=lambda job: job.arrival_s)
        self._jobs = {job.id: job for job in self.jobs}
        self._waiting: list[Request] = []
        self._running: list[Request] = []

    def run(self) -> Log:
        """Until all jobs are complete."""
        for _ in range(10 * sum(job.prompt_tokens + job.output_tokens for job in self.jobs)):
            self._arrive()
            if not self._waiting and not self._running:
                if not self._coming:
                    return self.log
                self.now_s = self._coming[0].arrival_s
                continue
            self._pass(self._chosen())
        raise AssertionError(f"not all done: waiting {self._waiting}, running {self._running}")

    def _arrive(self) -> None:
        while self._coming and self._coming[0].arrival_s <= self.now_s:
            job = self._coming.pop(0)
            self._waiting.append(
                Request(
                    job.id, job.task, job.arrival_s, job.prompt_tokens, job.prompt_tokens, 0, job.max_output_tokens,
                    job.slo_s,
                )
            )  # fmt: skip

    def _chosen(self) -> list[Request]:
        """What the scheduler wants and the KV cache has room for; a request is preempted until that is something."""
        while True:
            chosen = self._ask(self._waiting, self._running)
            if fits := self._fitting(chosen):
                return fits
            others = [request for request in self._running if request.is_decoding and request not in chosen]
            if others and (fits := self._fitting(self._ask([], others))):
                return fits
            last = self._running.pop()
            again = last.prompt_tokens + last.output_tokens
            self._waiting.append(_with(last, left_to_prefill=again))
            self._waiting.sort(key=lambda request: request.arrival_s)
            self.log.num_preempted += 1

    def _ask(self, waiting: Sequence[Request], running: Sequence[Request]) -> list[Request]:
        known = {request.id: request for request in (*waiting, *running)}
        routes = {
            request.id: route
            for request in running
            if (route := self.route(request.id, request.output_tokens)) is not None
        }
        wants = self.scheduler.needs_routes
        chosen = self.scheduler.choose(
            tuple(waiting), tuple(running), MappingProxyType(routes if wants else {}), self.now_s
        )
        assert chosen, "nothing chosen"
        assert len(set(chosen)) == len(chosen) and set(chosen) <= known.keys(), "not a choice of what is there"
        requests = [known[name] for name in chosen]
        if all(request.is_decoding for request in requests):
            assert len(requests) <= self.scheduler.group
        else:
            assert len(requests) == 1
        return requests

    def _fitting(self, requests: Sequence[Request]) -> list[Request]:
        room = self.kv_tokens - sum(
            one.prompt_tokens + one.output_tokens - one.left_to_prefill if not one.is_decoding else _kv_tokens(one)
            for one in self._running
        )
        fits = []
        for request in requests:
            # Half a prompt in the KV cache would keep others from being completed.
            needs = 1 if request.is_decoding else request.left_to_prefill
            if needs > room:
                break
            room -= needs
            fits.append(request)
        return fits

    def _pass(self, chosen: Sequence[Request]) -> None:
        prompt = next((request for request in chosen if not request.is_decoding), None)
        num_tokens = min(self.chunk, prompt.left_to_prefill) if prompt else 0
        self.log.passes.append(tuple(request.id for request in chosen))
        self.log.decoding.append(() if prompt else tuple(one.id for one in self._running if one.is_decoding))
        if prompt in self._waiting:
            self._waiting.remove(prompt)
            self._running.append(prompt)
            self.log.admitted.append(prompt.id)
            self.log.waited.append(tuple(one.id for one in self._waiting if one.arrival_s < prompt.arrival_s))
        self.log.under_way.append(len(self._running))
        self.now_s += self.pass_s(num_tokens, 0 if prompt else len(chosen))
        for request in chosen:
            self._advance(request, num_tokens)

    def _advance(self, request: Request, num_tokens: int) -> None:
        left = max(0, request.left_to_prefill - num_tokens)
        output = request.output_tokens + (left == 0)  # a prompt's last pass gives the first token
        advanced = _with(request, left_to_prefill=left, output_tokens=output)
        place = self._running.index(request)
        if left == 0 and output >= self._jobs[request.id].output_tokens:
            del self._running[place]
            self.log.finished_s[request.id] = self.now_s
            self.scheduler.finished(advanced, self.now_s)
        else:
            self._running[place] = advanced


def _kv_tokens(request: Request) -> int:
    """Tokens of a decoding request in the KV cache: all but the last, which the next pass computes."""
    return request.prompt_tokens + request.output_tokens - 1


def _with(request: Request, *, left_to_prefill: int, output_tokens: int | None = None) -> Request:
    output = request.output_tokens if output_tokens is None else output_tokens
    return Request(
        request.id, request.task, request.arrival_s, request.prompt_tokens, left_to_prefill, output,
        request.max_output_tokens, request.slo_s,
    )  # fmt: skip
