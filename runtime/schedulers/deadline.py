"""`deadline`: as many requests as possible are complete within their SLO. eMoE (arXiv 2503.06823), section 3.4."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from runtime.schedulers.base import Request, Route, Scheduler
from runtime.schedulers.estimates import OutputLengths, Pace

Seconds = npt.NDArray[np.float64]

MAX_OVERTAKEN = 16
"""Turns of all `group * window` places that may overtake a waiting request. More meets more SLOs in an overload."""
MAX_LEFT_OUT = 4
"""Turns of `window` passes that may leave out a decoding request: what those without an SLO can cost the others."""
MAX_TRIED = 32
"""Waiting requests that are tried at one arrival or completion, so that a long queue does not hold up the engine."""


class Deadline(Scheduler):
    """Admits by strictness of SLO, and only what breaks no SLO; decodes the most urgent.

    The paper expects of request i a latency of t_i = dE + (W + n_i G_i) c + r_i. Here:

    - r_i is the time since its arrival, and its SLO is about the complete answer.
    - dE + W c is what the prompts still to be computed take. dE, loading experts for a new request, is the part that
      does not depend on the length W.
    - G_i is the mean output length of its task, less what it has generated; 5 % of the mean when it outlives that.
    - n_i G_i c is the time until i is complete. The paper's n_i requests that finish after i take part in all of its
      passes, and the others until they finish, so this is a sum over stages, each with fewer requests than the one
      before. c is learned for every number of requests decoded together. Where more than `group` run, those with a
      later deadline than i do not take part as long as the passes are full without them.

    All of it is learned from the requests and times that `choose` and `finished` are given. While durations are not
    known, requests are admitted by strictness alone.

    A waiting request is *late* when not even an idle engine would meet its SLO any more. On every arrival and
    completion the waiting requests are tried in this order: those overtaken by `MAX_OVERTAKEN` turns of requests; SLOs
    that can be met, by deadline; late requests and those without an SLO, in order of arrival. One is admitted if no
    running request whose SLO would be met without it misses that because of it, if its own SLO will be met (late ones
    have none), and if `max_tokens` suffices. When nothing runs, the first is admitted.

    Where the paper is silent: an SLO that is missed anyhow holds up nobody. Requests without an SLO that can be met get
    a place only while fewer than `group` run, as the other places are for requests that have to overtake. An overtaken
    request still waits until it breaks no SLO, but no other is admitted before it. Decoding requests are taken by
    slack, the time that would be left of their SLO; those without any slack or SLO come last, in order of admission,
    but all are in any `(MAX_LEFT_OUT + 1) * window` consecutive decode passes at least once.

    Args:
        group, window: see `Scheduler`.
        max_tokens: the paper's T_max: prompt and expected output tokens of all running requests together, as many as
            the KV cache holds; None: no limit. A request that is larger runs alone.
    """

    def __init__(self, group: int, window: int = 1, max_tokens: int | None = None) -> None:
        super().__init__(group, window)
        self._max_tokens = math.inf if max_tokens is None else max_tokens
        self._lengths = OutputLengths()
        self._pace = Pace()
        self._overtaken: dict[str, int] = {}  # of those that wait, in order of arrival
        self._left_out: dict[str, int] = {}  # of those that decode
        self._refused: tuple[list[str], list[str]] | None = None

    def finished(self, request: Request, now_s: float) -> None:
        """See `Scheduler.finished`."""
        self._lengths.finished(request)
        self._pace.finished(request, now_s)

    def choose(
        self,
        waiting: Sequence[Request],
        running: Sequence[Request],
        routes: Mapping[str, Route],
        now_s: float,
    ) -> Sequence[str]:
        """See `Scheduler.choose`."""
        self._pace.observe([*waiting, *running], now_s)
        self._count_overtaken(waiting, running)
        begun = next((request for request in running if not request.is_decoding), None)
        if prompt := begun or self._admitted(waiting, running, now_s):
            return [prompt.id]
        return self._most_urgent(running, now_s)

    def _count_overtaken(self, waiting: Sequence[Request], running: Sequence[Request]) -> None:
        """A request that was admitted since the last call has overtaken those before it in the queue."""
        if not waiting:
            return
        admitted = {request.id for request in running}
        overtaken, num_behind = {}, 0
        for name in reversed(self._overtaken):
            num_behind += name in admitted
            overtaken[name] = self._overtaken[name] + num_behind
        self._overtaken = {request.id: overtaken.get(request.id, 0) for request in waiting}

    def _admitted(self, waiting: Sequence[Request], running: Sequence[Request], now_s: float) -> Request | None:
        """The request to start now. Asked again without an arrival or completion, the answer would be the same: what
        running requests advance is what the waiting ones age."""
        if not waiting or len(running) >= self.group * self.window:
            return None
        situation = [request.id for request in waiting], [request.id for request in running]
        if situation == self._refused:
            return None
        self._refused = None
        for request in self._by_strictness(waiting, now_s)[:MAX_TRIED]:
            if not running or self._may_join(request, running, now_s):
                return request
            if self._is_overtaken(request):
                break
        self._refused = situation
        return None

    def _by_strictness(self, waiting: Sequence[Request], now_s: float) -> list[Request]:
        def strictness(request: Request) -> tuple[bool, float]:
            """Sorting is stable: equal ones stay in order of arrival."""
            overtaken = self._is_overtaken(request)
            return not overtaken, math.inf if overtaken or self._is_late(request, now_s) else _deadline_s(request)

        return sorted(waiting, key=strictness)

    def _is_overtaken(self, request: Request) -> bool:
        return self._overtaken[request.id] >= MAX_OVERTAKEN * self.group * self.window

    def _is_late(self, request: Request, now_s: float) -> bool:
        prompt_s = self._pace.prompt_s(request.left_to_prefill) or 0.0
        return now_s + prompt_s + self._lengths.left(request) * (self._pace.decode_s(1) or 0.0) > _deadline_s(request)

    def _may_join(self, request: Request, running: Sequence[Request], now_s: float) -> bool:
        joined = [*running, request]
        if sum(self._num_tokens(one) for one in joined) > self._max_tokens:
            return False
        has_no_slo = request.slo_s is None or self._is_late(request, now_s)
        is_overtaken = self._is_overtaken(request)
        if has_no_slo and not is_overtaken and len(running) >= self.group:
            return False
        before, after = self._expected_s(running), self._expected_s(joined)
        if before is None or after is None:
            return True
        left_s = np.array([_deadline_s(one) - now_s for one in joined])
        if ((before <= left_s[:-1]) & (after[:-1] > left_s[:-1])).any():
            return False
        return has_no_slo or is_overtaken or bool(after[-1] <= left_s[-1])

    def _num_tokens(self, request: Request) -> float:
        return request.prompt_tokens + request.output_tokens + self._lengths.left(request)

    def _expected_s(self, requests: Sequence[Request]) -> Seconds | None:
        """Seconds until each of `requests` is complete when they run together; None: not known yet."""
        pass_s = [self._pace.decode_s(num) for num in range(1, min(len(requests), self.group) + 1)]
        if pass_s[0] is None:
            return None
        left = np.array([self._lengths.left(request) for request in requests])
        # Stage k ends when the request with the k-th fewest tokens left is complete.
        order = np.argsort(left, kind="stable")
        rank = _ranks(np.array([_deadline_s(request) for request in requests]))
        takes_part = rank[order] <= np.maximum(rank, self.group - 1)[:, None]
        num_active = takes_part[:, ::-1].cumsum(axis=1)[:, ::-1]
        together = np.minimum(num_active, self.group)
        # A request gets a token in each pass only if no more than `group` take part. Row i is read up to i's own stage.
        token_s = np.array([0.0, *pass_s])[together] * num_active / np.maximum(together, 1)
        ends_s = (np.diff(left[order], prepend=0.0) * token_s).cumsum(axis=1)
        decoded_s: Seconds = ends_s[np.arange(len(requests)), _ranks(left)]
        prompts = [request.left_to_prefill for request in requests if not request.is_decoding]
        return decoded_s + sum(self._pace.prompt_s(tokens) or 0.0 for tokens in prompts)

    def _most_urgent(self, decoding: Sequence[Request], now_s: float) -> list[str]:
        """At most `group` ids: those left out too often, then by slack, then the others in order of admission."""
        left_out = {request.id: self._left_out.get(request.id, 0) for request in decoding}
        pass_s = self._pace.decode_s(min(len(decoding), self.group)) or 0.0

        def urgency(request: Request) -> tuple[int, float]:
            num_passes = left_out[request.id]
            slack_s = _deadline_s(request) - now_s - pass_s * self._lengths.left(request)
            return (
                -num_passes if num_passes >= MAX_LEFT_OUT * self.window else 0,
                slack_s if slack_s >= 0 else math.inf,
            )

        chosen = [request.id for request in sorted(decoding, key=urgency)[: self.group]]
        self._left_out = {name: 0 if name in chosen else num + 1 for name, num in left_out.items()}
        return chosen


def _deadline_s(request: Request) -> float:
    return math.inf if request.slo_s is None else request.arrival_s + request.slo_s


def _ranks(values: Seconds) -> npt.NDArray[np.int64]:
    """The place of each value in ascending order; equal ones in the order in which they come."""
    ranks = np.empty(len(values), np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks
