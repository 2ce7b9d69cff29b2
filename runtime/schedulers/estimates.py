"""What a scheduler can learn by watching requests: how long answers get, and how long passes take."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from itertools import combinations
from statistics import median

from runtime.schedulers.base import Request

RECENT = 32
"""Passes of one kind that a median is taken over."""
RECENT_ANSWERS = 64
"""Answers over which a mean length forgets."""
REFILL = 0.05
"""Share of the mean that is expected of an answer each time it has outlived the expectation (eMoE, section 3.4)."""


class OutputLengths:
    """Expected lengths of answers, by task."""

    def __init__(self) -> None:
        self._mean: dict[str | None, float] = {}  # None: of all tasks
        self._num_seen: dict[str | None, int] = {}

    def finished(self, request: Request) -> None:
        """Learn from a complete answer, for its task and for tasks not seen yet."""
        for task in (request.task, None):
            self._num_seen[task] = self._num_seen.get(task, 0) + 1
            mean = self._mean.get(task, 0.0)
            self._mean[task] = mean + (request.output_tokens - mean) / min(self._num_seen[task], RECENT_ANSWERS)

    def left(self, request: Request) -> float:
        """Tokens that `request` will still generate, at least 1; eMoE's G.

        Before any answer is known it is all that the request may generate.
        """
        at_most = max(1, request.max_output_tokens - request.output_tokens)
        mean = self._mean.get(request.task, self._mean.get(None))
        if mean is None:
            return at_most
        left = mean - request.output_tokens
        if left <= 0:
            refill = max(1.0, REFILL * mean)
            left = refill - (-left) % refill
        return min(max(1.0, left), at_most)


class Pace:
    """Durations of passes, from what has happened between two calls: medians, so that a slow pass now and then does
    not matter."""

    def __init__(self) -> None:
        self._before: dict[str, Request] = {}
        self._before_s = 0.0
        self._num_prefilled = self._num_decoded = 0
        self._ended_s: float | None = None
        self._prompts: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._line: tuple[float, float] | None = None
        self._decodes: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._reloads: deque[float] = deque(maxlen=RECENT)
        self._after_prompt = False

    def finished(self, request: Request, now_s: float) -> None:
        """A request is complete, at the end of a pass."""
        self._count(request)
        self._ended_s = now_s

    def observe(self, requests: Iterable[Request], now_s: float) -> None:
        """A pass is about to begin; `requests`: all that wait or run. The pass before it, if any, is complete.

        Where none of the former requests is left, the engine had nothing to do after the last of them finished.
        """
        present = {request.id: request for request in requests}
        was_idle = not (self._before.keys() & present.keys())
        for request in present.values():
            self._count(request)
        ended_s = self._ended_s if was_idle else now_s
        if ended_s is not None and ended_s > self._before_s:
            self._learn(ended_s - self._before_s)
        self._before, self._before_s = present, now_s
        self._num_prefilled = self._num_decoded = 0
        self._ended_s = None

    def decode_s(self, num_requests: int) -> float | None:
        """Seconds of a decode pass; None: not known yet.

        A number of requests that never was decoded together is expected to take what the nearest one takes. For a
        larger one that is too little; so it is tried, and known from then on.
        """
        if not self._decodes:
            return None
        return median(self._decodes[min(self._decodes, key=lambda seen: abs(seen - num_requests))])

    def prompt_s(self, num_tokens: int) -> float | None:
        """Seconds by which the prompt of an admitted request delays the others; eMoE's dE + W c. None: not known yet.

        dE, expert loading, is what a prompt's pass takes whatever its length, and what the decode pass after it takes
        longer than usual.
        """
        if self._line is None:
            return None
        constant, per_token = self._line
        return constant + per_token * num_tokens + max(0.0, median(self._reloads or [0.0]))

    def _count(self, request: Request) -> None:
        """What was computed of `request` since the last call."""
        if before := self._before.get(request.id):
            self._num_prefilled += max(0, before.left_to_prefill - request.left_to_prefill)
            if before.is_decoding:
                self._num_decoded += max(0, request.output_tokens - before.output_tokens)

    def _learn(self, seconds: float) -> None:
        """A pass of prompts or of decoding took that long; mixed ones tell nothing about either."""
        if self._num_prefilled and not self._num_decoded:
            self._prompts.append((self._num_prefilled, seconds))
            self._line = _fitted(self._prompts)
        elif self._num_decoded and not self._num_prefilled:
            known = self._decodes[self._num_decoded]
            if self._after_prompt and known:
                self._reloads.append(seconds - median(known))
            else:
                known.append(seconds)
        self._after_prompt = self._num_prefilled > 0


def _fitted(points: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """(constant, slope), neither negative: the line through most of the points (Theil and Sen). With one number of
    tokens only, the line through the origin."""
    points = list(points)
    slopes = [(b_s - a_s) / (b - a) for (a, a_s), (b, b_s) in combinations(points, 2) if a != b]
    if not slopes:
        return 0.0, median(seconds / tokens for tokens, seconds in points)
    slope = max(0.0, median(slopes))
    return max(0.0, median(seconds - slope * tokens for tokens, seconds in points)), slope
