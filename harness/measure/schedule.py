"""The passes in which the tokens of a routing trace run, and what their layer steps demand."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.cache.residency import next_demands
from runtime.cache.streaming import expected_share
from runtime.cache.timeline import Steps
from runtime.schedulers.base import Route
from runtime.trace import RoutingTrace
from runtime.vocabulary import Pass, Phase

Integers = npt.NDArray[np.int64]


class Demands(NamedTuple):
    """What the layer steps of a schedule demand, one after the other: step `i` from `starts[i]` to `starts[i + 1]`."""

    starts: Integers
    experts: Integers  # ids, ascending within a step
    tokens: Integers  # how many tokens chose each


class Schedule:
    """The passes in which the tokens of a trace run.

    Args:
        batch: None for the passes of the recorded run (`trace.step`; each token its own where it is absent); else that
            many requests are decoded together, one token of each per pass, the next request following when one ends.
        max_tokens: stop after about that many.
    Attributes:
        passes: the rows of the trace in each pass.
    """

    def __init__(self, trace: RoutingTrace, *, batch: int | None = None, max_tokens: int | None = None) -> None:
        self.trace = trace
        self._decodes = batch is not None
        self.passes: list[Integers] = []
        self.num_tokens = 0
        for rows in _recorded_passes(trace) if batch is None else _batched_passes(trace, batch):
            if max_tokens is not None and self.num_tokens >= max_tokens:
                break
            self.passes.append(rows)
            self.num_tokens += len(rows)

    def passing(self, step: int) -> Pass:
        """Pass `step`, as predictors see it. Batches are decoded, however their tokens were recorded."""
        trace, rows = self.trace, self.passes[step]
        is_decode = self._decodes or trace.phase is None or bool(trace.phase[rows[0]])
        ids = () if trace.token_ids is None else tuple(trace.token_ids[rows].tolist())
        requests = tuple(trace.request[rows].tolist())
        tasks = tuple(trace.task(request) for request in requests)
        return Pass(Phase.DECODE if is_decode else Phase.PREFILL, len(rows), step, ids, requests, tasks)

    @cached_property
    def demands(self) -> Demands:
        """What every layer step demands."""
        trace = self.trace
        offsets = np.arange(trace.num_layers)[:, None] * trace.num_experts
        if all(len(rows) == 1 for rows in self.passes):
            chosen = trace.experts[np.concatenate(self.passes)].astype(np.int64)
            experts = (np.sort(chosen, axis=2) + offsets).reshape(-1)
            return Demands(np.arange(0, experts.size + 1, trace.top_k), experts, np.ones_like(experts))
        parts = [
            np.unique(trace.experts[rows, layer].astype(np.int64) + offsets[layer], return_counts=True)
            for rows in self.passes
            for layer in range(trace.num_layers)
        ]
        starts = np.cumsum([0, *(experts.size for experts, _ in parts)])
        return Demands(starts, np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]))

    def steps(self, part: slice, *, is_oracle: bool = False, streams: bool = False) -> Steps:
        """The layer steps of some passes, nothing wanted ahead but by those that stream. Indices into the demands are
        those of the whole schedule."""
        starts, experts, tokens = self.demands
        first, end, _ = part.indices(len(self.passes))
        num_layers = self.trace.num_layers
        num_tokens = np.array([len(rows) for rows in self.passes[part]], np.int64)
        future = self.future if is_oracle else np.zeros(0, np.int64)
        shares = self.stream_shares[part] if streams else np.zeros(0)
        events = starts[first * num_layers : end * num_layers + 1]
        return Steps(events, experts, tokens, num_tokens, future, stream_shares=shares)

    @cached_property
    def stream_shares(self) -> npt.NDArray[np.float64]:
        """[passes], of a layer's experts the share that each is expected to need."""
        trace = self.trace
        return np.array([expected_share(trace.num_experts, trace.top_k, len(rows)) for rows in self.passes])

    @cached_property
    def future(self) -> Integers:
        """In which layer step each demanded expert is demanded next."""
        return next_demands(self.demands.starts, self.demands.experts)


def route_of(trace: RoutingTrace, row: int) -> Route:
    """The experts that the token of a row was routed to."""
    route: Route = np.zeros((trace.num_layers, trace.num_experts), np.bool_)
    np.put_along_axis(route, trace.experts[row].astype(np.int64), True, axis=1)
    return route


def _recorded_passes(trace: RoutingTrace) -> list[Integers]:
    steps = trace.step if trace.step is not None else np.arange(trace.num_tokens)
    return np.split(np.arange(trace.num_tokens), np.flatnonzero(np.diff(steps)) + 1)


def _batched_passes(trace: RoutingTrace, batch: int) -> Iterator[Integers]:
    order = np.argsort(trace.request, kind="stable")
    waiting = deque(np.split(order, np.flatnonzero(np.diff(trace.request[order])) + 1))
    running: list[deque[int]] = []
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(deque(waiting.popleft().tolist()))
        yield np.array([request.popleft() for request in running])
        running = [request for request in running if request]
