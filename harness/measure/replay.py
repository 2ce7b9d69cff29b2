"""Replays of routing traces on a virtual clock, through the engine's own coordinator, residency and transfer queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.cache.coordinator import Coordinator
from runtime.cache.policies import ORACLE
from runtime.cache.residency import Count, Residency
from runtime.errors import UsageError
from runtime.predictors.base import Forecast, NoPredictor, Observation, Predictor
from runtime.predictors.previous_token import PreviousToken
from runtime.telemetry import CacheStats
from runtime.trace import NO_PREDICTION, RoutingTrace
from runtime.transfer.simulated import SimulatedTransfer
from runtime.vocabulary import Pass, Phase

Tokens = npt.NDArray[np.int64]
"""Rows of a trace that run in one pass."""


@dataclass(frozen=True)
class Timing:
    """What things take, in seconds of virtual time.

    Attributes:
        load_s: bringing one expert in.
        expert_s: computing one expert of a layer step.
        layer_s: everything else of a layer step: attention, router, norms.
    """

    load_s: float
    expert_s: float
    layer_s: float


@dataclass(frozen=True)
class Setting:
    """One configuration to replay: the profile's keys of the same names."""

    policy: str
    slots: int
    predictor: str = "none"
    depth: int = 1
    count: int = 2
    every: int = 1


@dataclass(frozen=True)
class ReplayResult:
    """What a replay counted. `cache` is what the engine's `stats().cache` would be."""

    setting: Setting
    cache: CacheStats
    num_loads: int
    num_bytes: int
    stall_s: float
    elapsed_s: float

    def as_dict(self) -> dict[str, Any]:
        """One flat JSON object."""
        cache = self.cache
        return {
            **asdict(self.setting),
            "events": cache.num_layer_steps,
            "hits": cache.num_hits,
            "in_flight": cache.num_in_flight,
            "misses": cache.num_misses,
            "hit_rate": cache.hit_rate,
            "evictions": cache.num_evictions,
            "loads": self.num_loads,
            "bytes_moved": self.num_bytes,
            "prefetch_issued": cache.num_prefetch_issued,
            "prefetch_used": cache.num_prefetch_used,
            "prefetch_wasted": cache.num_prefetch_wasted,
            "stall_s": self.stall_s,
            "elapsed_s": self.elapsed_s,
            "tokens": cache.num_tokens,
            "tokens_per_s": cache.num_tokens / self.elapsed_s if self.elapsed_s else None,
        }


class RecordedLookahead(Predictor):
    """The gate lookahead that was recorded with a trace (`RoutingTrace.predicted`)."""

    def __init__(self, trace: RoutingTrace) -> None:
        assert trace.predicted is not None
        self._predicted = trace.predicted
        self._forecast: Forecast = np.zeros((trace.num_layers, trace.num_experts), np.float32)
        self._tokens: Tokens = np.zeros(0, np.int64)

    def take(self, tokens: Tokens) -> None:
        """The rows of the trace that the coming pass runs."""
        self._tokens = tokens

    def observe(self, layer: int, observation: Observation) -> None:
        """Look up what was forecast at this layer."""
        num_layers, num_experts = self._forecast.shape
        depth, num_ranks = self._predicted.shape[2:]
        worth = 1.0 - np.arange(num_ranks) / (100 * num_ranks)  # likelier first among equals
        for ahead in range(1, min(depth, num_layers - 1 - layer) + 1):
            chosen = self._predicted[self._tokens, layer, ahead - 1]
            is_known = chosen != NO_PREDICTION
            weights = np.broadcast_to(worth, chosen.shape)[is_known]
            counted = np.bincount(chosen[is_known], weights=weights, minlength=num_experts)
            self._forecast[layer + ahead] = counted

    def forecast(self, layer: int) -> Forecast:
        """Tokens for which each expert was forecast."""
        return self._forecast


def passes(trace: RoutingTrace, batch: int | None = None) -> Iterator[Tokens]:
    """The rows of each pass, in order.

    Args:
        batch: None for the passes of the recorded run (`trace.step`; each token its own where it is absent); else that
            many requests are decoded together, one token of each per pass, the next request following when one ends.
    """
    if batch is None:
        steps = trace.step if trace.step is not None else np.arange(trace.num_tokens)
        cuts = np.flatnonzero(np.diff(steps)) + 1
        yield from np.split(np.arange(trace.num_tokens), cuts)
        return
    order = np.argsort(trace.request, kind="stable")
    waiting = deque(np.split(order, np.flatnonzero(np.diff(trace.request[order])) + 1))
    running: list[deque[int]] = []
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(deque(waiting.popleft().tolist()))
        yield np.array([request.popleft() for request in running])
        running = [request for request in running if request]


def replay(
    trace: RoutingTrace,
    setting: Setting,
    timing: Timing,
    *,
    batch: int | None = None,
    max_tokens: int | None = None,
    on_pass: Callable[[int], None] = lambda num_tokens: None,
) -> ReplayResult:
    """Replay `trace` from empty slots.

    Args:
        batch: see `passes`. max_tokens: stop after about that many. on_pass: told the tokens of each pass.

    Raises:
        UsageError: the setting asks for what the trace does not have, or for what cannot be.
    """
    schedule = _schedule(trace, batch, max_tokens)
    if setting.predictor == "none":
        return _replay_on_demand(trace, schedule, setting, timing, on_pass)
    if setting.policy == ORACLE.name.lower():
        raise UsageError("belady loads on demand only: leave the predictor at none")
    return _replay_with_predictor(trace, schedule, setting, timing, on_pass)


def _replay_on_demand(
    trace: RoutingTrace,
    schedule: Sequence[Tokens],
    setting: Setting,
    timing: Timing,
    on_pass: Callable[[int], None],
) -> ReplayResult:
    """All of it compiled."""
    residency = Residency(trace.num_layers, trace.num_experts, setting.slots, trace.top_k, setting.policy)
    events, demand, tokens = _events(trace, schedule)
    is_oracle = setting.policy == ORACLE.name.lower()
    future = _next_demands(events, demand) if is_oracle else np.zeros(0, np.int64)
    sizes = np.array([len(rows) for rows in schedule])
    elapsed_s = stall_s = 0.0
    for first in range(0, len(schedule), _PASSES_AT_ONCE):
        part = slice(first * trace.num_layers, (first + _PASSES_AT_ONCE) * trace.num_layers + 1)
        num_tokens = sizes[first : first + _PASSES_AT_ONCE]
        took_s, waited_s = residency.replay(events[part], demand, tokens, num_tokens, future, **asdict(timing))
        elapsed_s, stall_s = elapsed_s + took_s, stall_s + waited_s
        on_pass(int(num_tokens.sum()))
    counts = residency.counts()
    num_bytes = counts[Count.MISSES] * int(trace.meta.get("expert_bytes") or 0)
    return ReplayResult(setting, _cache_stats(counts, schedule), counts[Count.MISSES], num_bytes, stall_s, elapsed_s)


_PASSES_AT_ONCE = 2000


def _events(trace: RoutingTrace, schedule: Sequence[Tokens]) -> tuple[Tokens, Tokens, Tokens]:
    """Layer steps one after the other: where each one's demand begins, the demanded experts (ids, ascending), and
    how many tokens chose them."""
    offsets = np.arange(trace.num_layers)[:, None] * trace.num_experts
    if all(len(rows) == 1 for rows in schedule):
        chosen = trace.experts[np.concatenate(schedule)].astype(np.int64)
        demand = (np.sort(chosen, axis=2) + offsets).reshape(-1)
        return np.arange(0, demand.size + 1, trace.top_k), demand, np.ones_like(demand)
    parts = [
        np.unique(trace.experts[rows, layer].astype(np.int64) + offsets[layer], return_counts=True)
        for rows in schedule
        for layer in range(trace.num_layers)
    ]
    starts = np.cumsum([0, *(experts.size for experts, _ in parts)])
    return starts, np.concatenate([experts for experts, _ in parts]), np.concatenate([counts for _, counts in parts])


def _next_demands(events: Tokens, demand: Tokens) -> Tokens:
    """The layer step (from 1) in which each entry of `demand` is demanded next; past the last one where never."""
    step = np.repeat(np.arange(1, events.size), np.diff(events))
    order = np.lexsort((step, demand))
    again = demand[order][1:] == demand[order][:-1]
    future = np.full(demand.size, events.size)
    future[order[:-1][again]] = step[order[1:][again]]
    return future


def _replay_with_predictor(
    trace: RoutingTrace,
    schedule: Sequence[Tokens],
    setting: Setting,
    timing: Timing,
    on_pass: Callable[[int], None],
) -> ReplayResult:
    """Through the engine's coordinator and transfer queue."""
    residency = Residency(trace.num_layers, trace.num_experts, setting.slots, trace.top_k, setting.policy)
    transfer = SimulatedTransfer(timing.load_s, int(trace.meta.get("expert_bytes") or 0))
    predictor = _predictor(trace, setting.predictor)
    coordinator = Coordinator(
        residency,
        transfer,
        predictor,
        prefetch_depth=0 if isinstance(predictor, NoPredictor) else setting.depth,
        prefetch_count=setting.count,
        predict_every=setting.every,
    )
    for step, tokens in enumerate(schedule):
        passing = _pass(trace, step, tokens)
        if isinstance(predictor, RecordedLookahead):
            predictor.take(tokens)
        predictor.begin(passing)
        for layer in range(trace.num_layers):
            chosen = trace.experts[tokens, layer].astype(np.int64)
            experts, counts = np.unique(chosen, return_counts=True)
            demand = (experts + layer * trace.num_experts).tolist()
            transfer.advance(timing.layer_s)
            for group in coordinator.serve(layer, demand, counts.tolist(), Observation(passing, chosen)):
                transfer.advance(timing.expert_s * len(group))
        on_pass(len(tokens))
    stats = transfer.stats()
    cache = _cache_stats(residency.counts(), schedule)
    return ReplayResult(setting, cache, stats.num_loads, stats.num_bytes, stats.stall_s, transfer.now_s)


def _cache_stats(counts: Mapping[Count, int], schedule: Sequence[Tokens]) -> CacheStats:
    named = {f"num_{count.name.lower()}": number for count, number in counts.items()}
    return CacheStats(num_passes=len(schedule), num_tokens=sum(map(len, schedule)), **named)


def _schedule(trace: RoutingTrace, batch: int | None, max_tokens: int | None) -> list[Tokens]:
    schedule: list[Tokens] = []
    num_tokens = 0
    for tokens in passes(trace, batch):
        if max_tokens is not None and num_tokens >= max_tokens:
            break
        schedule.append(tokens)
        num_tokens += len(tokens)
    return schedule


def _predictor(trace: RoutingTrace, kind: str) -> Predictor:
    if kind == "none":
        return NoPredictor()
    if kind == "previous_token":
        return PreviousToken(trace.num_layers, trace.num_experts)
    if kind == "gate_lookahead":
        if trace.predicted is None:
            raise UsageError("the trace has no recorded gate lookahead (field `predicted`); take another predictor")
        return RecordedLookahead(trace)
    raise UsageError(f"no predictor {kind!r} that replays a trace; there are {', '.join(PREDICTORS)}")


PREDICTORS = ("none", "previous_token", "gate_lookahead")


def _pass(trace: RoutingTrace, step: int, tokens: Tokens) -> Pass:
    phase = Phase.DECODE if trace.phase is None else Phase(int(trace.phase[tokens[0]]))
    ids = () if trace.token_ids is None else tuple(trace.token_ids[tokens].tolist())
    return Pass(phase, len(tokens), step, ids, tuple(trace.request[tokens].tolist()))
