"""Replays of routing traces on a virtual clock, through the engine's own coordinator, residency and transfer queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.measure.schedule import Schedule
from runtime.cache.coordinator import Coordinator
from runtime.cache.governor import Governor
from runtime.cache.policies import ORACLE
from runtime.cache.residency import Residency
from runtime.cache.timeline import FloatArray, Times, new_link
from runtime.errors import UsageError
from runtime.predictors.artifact import RoutingShape, read_artifact
from runtime.predictors.base import BEFORE_FIRST_LAYER, Forecast, Observation, Predictor
from runtime.predictors.make import PredictorSpec, make_predictor
from runtime.predictors.params import PREDICTOR_PARAMS
from runtime.telemetry import CacheStats, engine_stats
from runtime.trace import NO_PREDICTION, RoutingTrace
from runtime.transfer.base import TransferStats
from runtime.transfer.simulated import SimulatedTransfer


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

    def over(self, schedule: Schedule) -> Times:
        """The same for every pass and expert of `schedule`."""
        num_passes, none = len(schedule.passes), np.zeros(len(schedule.passes))
        expert_s = np.full(schedule.demands.experts.size, self.expert_s)
        return Times(self.load_s, 0.0, 0.0, none, np.full(num_passes, self.layer_s), none, expert_s)


@dataclass(frozen=True)
class Setting:
    """One configuration to replay: the profile's keys of the same names; `streams`: see `Coordinator`."""

    policy: str
    slots: int
    predictor: str = "none"
    depth: int = 1
    count: int = 2
    every: int = 1
    every_unit: str = "step"
    artifact: str | None = None
    adaptive: bool = False
    streams: bool = False


@dataclass(frozen=True)
class ReplayResult:
    """What a replay counted. `cache` is what the engine's `stats().cache` would be, `peak_slots` the most slots that
    held an expert."""

    setting: Setting
    cache: CacheStats
    num_loads: int
    num_bytes: int
    stall_s: float
    elapsed_s: float
    peak_slots: int

    def as_dict(self) -> dict[str, Any]:
        """One flat JSON object."""
        cache = self.cache
        return {
            **asdict(self.setting),
            "artifact": None if self.setting.artifact is None else Path(self.setting.artifact).name,
            "events": cache.num_layer_steps,
            "hits": cache.num_hits,
            "in_flight": cache.num_in_flight,
            "misses": cache.num_misses,
            "hit_rate": cache.hit_rate,
            "evictions": cache.num_evictions,
            "loads": self.num_loads,
            "bytes_moved": self.num_bytes,
            "peak_slots": self.peak_slots,
            "prefetch_issued": cache.num_prefetch_issued,
            "prefetch_used": cache.num_prefetch_used,
            "prefetch_wasted": cache.num_prefetch_wasted,
            "stall_s": self.stall_s,
            "elapsed_s": self.elapsed_s,
            "tokens": cache.num_tokens,
            "tokens_per_s": cache.num_tokens / self.elapsed_s if self.elapsed_s else None,
        }


class RecordedLookahead(Predictor):
    """The gate lookahead that was recorded with a trace (`RoutingTrace.predicted`).

    Args:
        beyond: experts that were ranked behind those that the router would choose are forecast too, for a little: the
            engine's own lookahead names every expert, and a batch may have room for many.

    Raises:
        UsageError: none was recorded.
    """

    reads_hidden = True

    def __init__(self, schedule: Schedule, *, beyond: bool = False) -> None:
        trace = schedule.trace
        if trace.predicted is None:
            raise UsageError("the trace has no recorded gate lookahead (field `predicted`); take another predictor")
        self._passes, self._predicted = schedule.passes, trace.predicted
        num_ranks = trace.predicted.shape[3] if beyond else min(trace.predicted.shape[3], trace.top_k)
        ranks = np.arange(num_ranks)
        self._worth = 1.0 - ranks / (100 * num_ranks)  # likelier first among equals
        self._worth[trace.top_k :] = _WORTH_BEYOND * trace.top_k / (1 + ranks[trace.top_k :])
        self._forecast: Forecast = np.zeros((trace.num_layers, trace.num_experts), np.float32)

    def observe(self, layer: int, observation: Observation) -> None:
        """Look up what was forecast at this layer."""
        num_layers, num_experts = self._forecast.shape
        rows = self._passes[observation.passing.step]
        for ahead in range(1, min(self._predicted.shape[2], num_layers - 1 - layer) + 1):
            chosen = self._predicted[rows, layer, ahead - 1, : len(self._worth)]
            is_known = chosen != NO_PREDICTION
            weights = np.broadcast_to(self._worth, chosen.shape)[is_known]
            self._forecast[layer + ahead] = np.bincount(chosen[is_known], weights=weights, minlength=num_experts)

    def forecast(self, layer: int) -> Forecast | None:
        """Tokens for which each expert was forecast."""
        return None if layer == BEFORE_FIRST_LAYER else self._forecast


_WORTH_BEYOND = 0.2
"""Beside an expert that the router would choose, one just behind: about what the engine's own lookahead makes of it."""

PREDICTORS = tuple(PREDICTOR_PARAMS)


def predictor_of(setting: Setting, schedule: Schedule) -> Predictor:
    """The predictor that `setting` names, for the trace of `schedule`.

    Raises:
        UsageError, ArtifactError: it cannot be had for this trace, and why.
    """
    if setting.predictor == "gate_lookahead":
        return RecordedLookahead(schedule)
    trace = schedule.trace
    model = trace.meta.get("model")
    spec = PredictorSpec(
        setting.predictor,
        None if setting.artifact is None else Path(setting.artifact),
        every=setting.every,
        every_unit=setting.every_unit,
        model=None if model is None else str(model),
    )
    if setting.predictor == "routing_path" and trace.token_ids is None:
        raise UsageError(
            "the trace has no token ids (field `token_ids`), which routing_path goes by; record one with them"
        )
    return make_predictor(spec, RoutingShape(trace.num_layers, trace.num_experts, trace.top_k))


def artifacts_by_kind(paths: Sequence[Path], trace: RoutingTrace) -> dict[str, str]:
    """Which predictor each artefact holds; all are for the model of `trace`.

    Raises:
        ArtifactError: one is not. UsageError: two hold the same kind.
    """
    model = trace.meta.get("model")
    shape = RoutingShape(trace.num_layers, trace.num_experts, trace.top_k)
    found: dict[str, str] = {}
    for path in paths:
        kind = read_artifact(path, shape=shape, model=None if model is None else str(model)).kind
        if kind in found:
            raise UsageError(f"{found[kind]} and {path} both hold a {kind} predictor; give one of them")
        found[kind] = str(path)
    return found


def replay(
    schedule: Schedule,
    setting: Setting,
    timing: Timing,
    on_pass: Callable[[int], None] = lambda num_tokens: None,
) -> ReplayResult:
    """Replay a trace from empty slots; `on_pass` is told how many tokens have run since it was last called.

    Raises:
        UsageError: the setting asks for what the trace does not have, or for what cannot be.
    """
    if setting.policy == ORACLE and setting.streams:
        raise UsageError("belady loads on demand only: nothing streams with it")
    if setting.predictor == "none":
        return _replay_on_demand(schedule, setting, timing, on_pass)
    if setting.policy == ORACLE:
        raise UsageError("belady loads on demand only: leave the predictor at none")
    return _replay_with_predictor(schedule, setting, timing, on_pass)


def _replay_on_demand(
    schedule: Schedule, setting: Setting, timing: Timing, on_pass: Callable[[int], None]
) -> ReplayResult:
    """All of it compiled."""
    residency, link = _residency(schedule.trace, setting), new_link(setting.slots)
    times = timing.over(schedule)
    for first in range(0, len(schedule.passes), _PASSES_AT_ONCE):
        part = slice(first, first + _PASSES_AT_ONCE)
        steps = schedule.steps(part, is_oracle=setting.policy == ORACLE, streams=setting.streams)
        now_s, stall_s, _, num_loads, _ = residency.replay(steps, per_pass(times, part), link)[-1].tolist()
        on_pass(int(steps.num_tokens.sum()))
    num_begun = int(num_loads) + link.is_busy
    moved = TransferStats(int(num_loads), num_begun * _expert_bytes(schedule.trace), stall_s=stall_s)
    return _result(schedule, setting, residency, moved, now_s)


_PASSES_AT_ONCE = 2000


def _replay_with_predictor(
    schedule: Schedule, setting: Setting, timing: Timing, on_pass: Callable[[int], None]
) -> ReplayResult:
    """Through the engine's coordinator and transfer queue."""
    trace, residency = schedule.trace, _residency(schedule.trace, setting)
    transfer = SimulatedTransfer(timing.load_s, _expert_bytes(trace))
    coordinator = Coordinator(
        residency,
        transfer,
        predictor_of(setting, schedule),
        governor=Governor(setting.depth, adaptive=setting.adaptive),
        prefetch_count=setting.count,
        predict_every=1 if setting.predictor == "periodic" else setting.every,
        streams=setting.streams,
    )
    walk(schedule, coordinator, transfer, timing.over(schedule), on_pass)
    return _result(schedule, setting, residency, transfer.stats(), transfer.now_s)


def per_pass(times: Times, part: slice) -> Times:
    """Those of some passes."""
    return times._replace(pass_s=times.pass_s[part], layer_s=times.layer_s[part], ahead_s=times.ahead_s[part])


def walk(
    schedule: Schedule,
    coordinator: Coordinator,
    transfer: SimulatedTransfer,
    times: Times,
    on_pass: Callable[[int], None] = lambda num_tokens: None,
) -> FloatArray:
    """Run `schedule` through a coordinator on the clock of its transfer; what `Residency.replay` returns.

    Forecasting takes no time here: the predictor may advance the clock (`Times.ahead_s` is not read).
    """
    trace, ended = schedule.trace, []
    starts, experts, tokens = (array.tolist() for array in schedule.demands)
    event = 0
    for step, rows in enumerate(schedule.passes):
        passing = schedule.passing(step)
        coordinator.begin(passing)
        for layer in range(trace.num_layers):
            part = slice(starts[event], starts[event + 1])
            expert_s = dict(zip(experts[part], times.expert_s[part].tolist(), strict=True))
            seen = Observation(passing, trace.experts[rows, layer].astype(np.int64))
            transfer.advance(times.layer_s[step])
            for group in coordinator.serve(layer, experts[part], tokens[part], seen):
                transfer.advance(sum(expert_s[expert] for expert in group))
            event += 1
        transfer.advance(times.pass_s[step])
        moved = transfer.stats()
        ended.append((transfer.now_s, moved.stall_s, moved.busy_s, moved.num_loads, transfer.num_cold))
        on_pass(len(rows))
    return np.array(ended, np.float64)


def _residency(trace: RoutingTrace, setting: Setting) -> Residency:
    return Residency(trace.num_layers, trace.num_experts, setting.slots, trace.top_k, setting.policy)


def _expert_bytes(trace: RoutingTrace) -> int:
    return int(trace.meta.get("expert_bytes") or 0)


def _result(
    schedule: Schedule, setting: Setting, residency: Residency, moved: TransferStats, elapsed_s: float
) -> ReplayResult:
    stats = engine_stats(
        residencies=[residency.counts()],
        transfers=[moved],
        num_passes=len(schedule.passes),
        num_tokens=schedule.num_tokens,
        peak_resident_bytes=0,
    )
    peak_slots = residency.num_slots - residency.num_free  # an expert leaves its slot to another only
    return ReplayResult(setting, stats.cache, stats.num_loads, stats.num_bytes, stats.stall_s, elapsed_s, peak_slots)
