"""One configuration on the virtual clock, and what a real trial of it says about costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.measure.foresight import Foresight
from harness.measure.replay import RecordedLookahead, per_pass, walk
from harness.measure.stats import median
from harness.search.closed_loop import ServedPasses
from harness.search.costs import Costs, Floats, Row
from harness.search.outcome import Measurement
from runtime.cache.coordinator import Coordinator
from runtime.cache.governor import Governor
from runtime.cache.policies import FORESEEING
from runtime.cache.residency import Count, Residency
from runtime.cache.streaming import STREAM_SHARE
from runtime.cache.timeline import NOW_S, NUM_COLD, NUM_LOADS, STALL_S, Times, new_link
from runtime.facts import wanted_slots
from runtime.predictors.artifact import RoutingShape
from runtime.predictors.base import BEFORE_FIRST_LAYER, Forecast, NoPredictor, Observation, Predictor
from runtime.predictors.make import PredictorSpec, make_predictor
from runtime.profile import Profile
from runtime.transfer.simulated import SimulatedTransfer
from runtime.vocabulary import Pass, Phase

PHASES = {Phase.PREFILL: "prefill", Phase.DECODE: "decode"}


@dataclass(frozen=True)
class Simulated:
    """One simulated trial; the fields are those of `Measurement` and of its `stats`, where they have the same name."""

    latency_ms_p50: float
    ttft_ms_p50: float
    tpot_ms_p50: float | None
    tokens_per_s: float
    run_s: float
    stall_s: float
    busy_s: float
    num_loads: int
    num_hits: int
    num_in_flight: int
    num_misses: int
    num_prefetch_issued: int
    num_prefetch_used: int
    num_passes: int
    num_layer_steps: int
    num_tokens: int

    def measurement(self) -> Measurement:
        """As if it had been run: tokens and memory are not simulated."""
        stats = {
            name: getattr(self, name)
            for name in Simulated.__dataclass_fields__
            if name.startswith(("num_", "busy", "stall"))
        }
        return Measurement(
            self.latency_ms_p50, self.ttft_ms_p50, self.tpot_ms_p50, self.tokens_per_s, "", 0, 0, 0.0, self.run_s,
            self.num_tokens, stats,
        )  # fmt: skip


def predictor_of(profile: Profile, schedule: ServedPasses) -> Predictor:
    """What the engine would build (`runtime.build`), new; of the gate lookahead what was recorded."""
    section, trace = profile.predictor, schedule.trace
    if section.kind == "gate_lookahead":
        return NoPredictor() if trace.predicted is None else RecordedLookahead(schedule, beyond=True)
    artifact = None if section.artifact is None else Path(section.artifact)
    spec = PredictorSpec(section.kind, artifact, section.params, section.every, section.every_unit)
    return make_predictor(spec, RoutingShape(trace.num_layers, trace.num_experts, trace.top_k))


def predict_every(profile: Profile) -> int:
    """See `runtime.build`: `periodic` counts for itself."""
    return profile.predictor.every if profile.predictor.kind != "periodic" else 1


class _Place(NamedTuple):
    """What a coefficient is paid for in each pass, and where in it: `pass`, `layer` or `ahead`."""

    path: str
    where: str
    units: Floats


class SimulatedTrial:
    """One configuration.

    Args:
        foresight: of a profile's predictor over a schedule; None: what it wants depends on more than the routing.
        streams: long prompts stream whole layers, as on a GPU (see `Coordinator`).
    """

    def __init__(
        self,
        profile: Profile,
        schedule: ServedPasses,
        foresight: Callable[[Profile, ServedPasses], Foresight | None],
        costs: Costs,
        *,
        streams: bool = False,
    ) -> None:
        self._profile, self._schedule, self._costs, self._streams = profile, schedule, costs, streams
        self._trace = schedule.trace
        self._is_asked = profile.predictor.kind != "none" and (
            profile.prefetch.depth > 0 or profile.cache.policy in FORESEEING
        )
        prefetches = self._is_asked and profile.cache.policy not in FORESEEING and not profile.prefetch.adaptive
        self._foresight: Foresight | None = foresight(profile, schedule) if prefetches else None

    @cached_property
    def _places(self) -> list[_Place]:
        """Every coefficient but those of experts; units are per layer step where they are paid in each."""
        schedule, section = self._schedule, self._profile
        threads, depth = section.compute.threads, min(section.prefetch.depth, self._trace.num_layers - 1)
        found = []
        for phase, name in PHASES.items():
            is_phase = (schedule.phases == phase).astype(np.float64)
            found.append(_Place(f"pass/{name}", "pass", is_phase))
            found.append(_Place(f"layer/{name}/{threads}", "layer", is_phase))
            found.append(_Place(f"token/{name}/{threads}", "layer", is_phase * schedule.sizes))
        if schedule.is_planned and section.scheduler.kind == "route_overlap":
            found.append(_Place("plan/route_overlap", "pass", np.ones(len(schedule.sizes))))
        if self._is_asked:
            found.append(_Place("prefetch/layer", "ahead", depth * self._looks_ahead))
            forecasts = max(depth, 1) * self._looks_ahead * self._is_observed
            found.append(_Place(f"forecast/{section.predictor.kind}", "ahead", forecasts))
        return [place._replace(path=self._costs.known(place.path)) for place in found]

    @property
    def _is_observed(self) -> Floats:
        every, schedule = predict_every(self._profile), self._schedule
        steps = np.arange(len(schedule.sizes))
        return np.asarray((schedule.phases == Phase.PREFILL) | (steps % every == 0), np.float64)

    @property
    def _reads_hidden(self) -> bool:
        return self._profile.predictor.kind == "gate_lookahead"

    @property
    def _looks_ahead(self) -> Floats:
        """0 for passes that stream, where that needs hidden states; of one that begins to half-way it is not known."""
        is_needless = self._streams and self._reads_hidden
        return np.asarray((self._schedule.stream_shares < STREAM_SHARE) | (not is_needless), np.float64)

    @cached_property
    def _expert_units(self) -> tuple[list[tuple[str, Floats]], Floats]:
        """Guessed seconds in each pass by coefficient, and of each demanded expert in all."""
        schedule, compute, costs = self._schedule, self._profile.compute, self._costs
        starts, _, tokens = schedule.demands
        of_pass = np.repeat(np.arange(len(schedule.passes)), np.diff(starts[:: self._trace.num_layers]))
        expert_s = np.zeros(len(tokens))
        units = []
        for phase, kernel in ((Phase.PREFILL, compute.prefill), (Phase.DECODE, compute.decode)):
            is_phase = schedule.phases[of_pass] == phase
            guess = costs.expert_s(kernel, compute.threads, tokens) * is_phase
            path = costs.known(f"expert/{kernel}/{compute.threads}")
            units.append((path, np.bincount(of_pass, guess, len(schedule.passes)).astype(np.float64)))
            expert_s += guess * costs.of(path)
        return units, expert_s

    @property
    def _load_path(self) -> str:
        return self._costs.known(f"load/{self._profile.transfer.io_threads}/{self._profile.compute.threads}")

    @property
    def _cold_path(self) -> str:
        return self._costs.known(f"cold/{self._profile.compute.threads}")

    @property
    def _slowdown_path(self) -> str:
        return self._costs.known(f"slowdown/{self._profile.compute.threads}")

    @cached_property
    def _times(self) -> Times:
        seconds = {where: np.zeros(len(self._schedule.passes)) for where in ("pass", "layer", "ahead")}
        for path, where, units in self._places:
            seconds[where] += self._costs.of(path) * units
        return Times(
            load_s=self._costs.of(self._load_path),
            cold_s=self._costs.of(self._cold_path),
            slowdown=self._costs.of(self._slowdown_path),
            pass_s=seconds["pass"],
            layer_s=seconds["layer"],
            ahead_s=seconds["ahead"],
            expert_s=self._expert_units[1],
        )

    @cached_property
    def _run(self) -> tuple[Floats, dict[Count, int]]:
        """The clock at the end of each pass (see `timeline.replay`), and the counters of all but the warm-up."""
        trace, profile = self._trace, self._profile
        num_slots = wanted_slots(profile.cache.slots, trace.num_layers * trace.num_experts)
        residency = Residency(trace.num_layers, trace.num_experts, num_slots, trace.top_k, profile.cache.policy)
        if self._is_asked and self._foresight is None:
            return self._walk(residency)
        link, ended = new_link(num_slots), []
        warm_up = self._schedule.num_warm_up
        wanted = (
            None if self._foresight is None else self._foresight.wanted(profile.prefetch.depth, profile.prefetch.count)
        )
        for part in (slice(0, warm_up), slice(warm_up, len(self._schedule.passes))):
            steps = self._schedule.steps(part, streams=self._streams)
            if wanted is not None:
                asks = trace.num_layers + 1
                starts = wanted[0][part.start * asks : part.stop * asks + 1]
                steps = steps._replace(
                    wanted_starts=starts, wanted=wanted[1], steps_ahead=wanted[2], reads_hidden=self._reads_hidden
                )
            residency.reset_counts()
            ended.append(residency.replay(steps, per_pass(self._times, part), link))
        return np.concatenate(ended), residency.counts()

    def _walk(self, residency: Residency) -> tuple[Floats, dict[Count, int]]:
        """Through the engine's coordinator itself."""
        profile, times = self._profile, self._times
        transfer = SimulatedTransfer(times.load_s, slowdown=times.slowdown, cold_s=times.cold_s)
        predictor = Timed(predictor_of(profile, self._schedule), transfer, times.ahead_s)
        coordinator = Coordinator(
            residency,
            transfer,
            predictor,
            governor=Governor(profile.prefetch.depth, adaptive=profile.prefetch.adaptive),
            prefetch_count=profile.prefetch.count,
            predict_every=predict_every(profile),
            streams=self._streams,
        )
        left = [self._schedule.num_warm_up]

        def on_pass(num_tokens: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                residency.reset_counts()

        return walk(self._schedule, coordinator, transfer, times, on_pass), residency.counts()

    def _span(self, values: Floats, first: int, last: int) -> Floats:
        """What is added to `values`, totals at the end of each pass, from the first to the last of some passes."""
        return np.asarray(values[last] - values[first - 1], np.float64)

    @cached_property
    def _spans(self) -> dict[str, list[tuple[float, int, int]]]:
        """By metric, of each request: its milliseconds, and its passes from the first to the last."""
        now_s = self._run[0][:, NOW_S]
        found: dict[str, list[tuple[float, int, int]]] = {"latency": [], "ttft": [], "tpot": []}
        for span in self._schedule.spans:
            num_out = span.rows.num_output_tokens
            for name, first, last, num in (
                ("latency", span.arrival, span.last, num_out),
                ("ttft", span.arrival, span.first, 1),
                ("tpot", span.first + 1, span.last, num_out - 1),
            ):
                if num:
                    found[name].append((1e3 * float(self._span(now_s, first, last)) / num, first, last))
        return found

    @cached_property
    def _whole(self) -> list[float]:
        """See `timeline.replay`: of all but the warm-up."""
        return list(self._span(self._run[0], self._schedule.num_warm_up, len(self._schedule.passes) - 1).tolist())

    def simulated(self) -> Simulated:
        """What a trial would measure."""
        counts, num_passes = self._run[1], len(self._schedule.passes) - self._schedule.num_warm_up
        run_s, stall_s, busy_s, num_loads, _ = self._whole
        p50 = {name: median([ms for ms, _, _ in spans]) if spans else None for name, spans in self._spans.items()}
        assert p50["latency"] is not None and p50["ttft"] is not None
        num_out = sum(span.rows.num_output_tokens for span in self._schedule.spans)
        return Simulated(
            latency_ms_p50=p50["latency"],
            ttft_ms_p50=p50["ttft"],
            tpot_ms_p50=p50["tpot"],
            tokens_per_s=num_out / run_s,
            run_s=run_s,
            stall_s=stall_s,
            busy_s=busy_s,
            num_loads=int(num_loads),
            num_hits=counts[Count.HITS],
            num_in_flight=counts[Count.IN_FLIGHT],
            num_misses=counts[Count.MISSES],
            num_prefetch_issued=counts[Count.PREFETCH_ISSUED],
            num_prefetch_used=counts[Count.PREFETCH_USED],
            num_passes=num_passes,
            num_layer_steps=counts[Count.LAYER_STEPS],
            num_tokens=int(self._schedule.sizes[-num_passes:].sum()),
        )

    def loads(self, measured: Measurement, number: int) -> list[Row]:
        """What the trial says of a load: as many were cold as there are here. `number` is the trial's."""
        num_loads, busy_s = measured.stats.get("num_loads", 0), measured.stats.get("busy_s", 0.0)
        if num_loads < _MIN_LOADS or not busy_s:
            return []
        share_cold = self._whole[NUM_COLD] / max(1.0, self._whole[NUM_LOADS])
        units = {self._load_path: 1.0, self._cold_path: share_cold}
        return [Row(units, 0.0, busy_s / num_loads * self._undisturbed(measured), number)]

    def rows(self, measured: Measurement, number: int) -> list[Row]:
        """What the trial says of everything else: of the request in the middle of each metric.

        How long it waited is not measured; it is the share of all waiting that it has here. `number` is the trial's.
        """
        ended, waited = self._run[0], self._whole[STALL_S]
        stall_s = float(measured.stats.get("stall_s", 0.0)) * self._undisturbed(measured)
        share = stall_s / waited if waited else 0.0
        rows = []
        for name, ms in _metrics(measured).items():
            spans = self._spans[name]
            middle = [spans[i] for i in _middle(spans)]
            if ms is None or not middle:
                continue
            seconds, stalled, busy = np.sum([self._span(ended, *span[1:]) for span in middle], axis=0).tolist()[:3]
            units = {
                path: sum(float(self._span(total, *span[1:])) for span in middle)
                for path, total in self._totals.items()
            }
            measured_s = seconds * ms * len(middle) / sum(span[0] for span in middle)
            known_s = stalled * share
            if known_s < measured_s:
                units[self._slowdown_path] = busy - stalled  # computed meanwhile, more or less
                rows.append(Row(units, known_s, measured_s, number))
        return rows

    def _undisturbed(self, measured: Measurement) -> float:
        """What a total has to be multiplied by to be what the medians would add up to: while the machine is disturbed,
        medians do not see it and totals do."""
        middle = self.simulated().run_s / self.simulated().latency_ms_p50 * measured.latency_ms_p50
        return min(1.0, middle / measured.run_s)

    @cached_property
    def _totals(self) -> dict[str, Floats]:
        """Units of each coefficient up to the end of each pass."""
        num_layers = self._trace.num_layers
        units = [(place.path, place.units * (1 if place.where == "pass" else num_layers)) for place in self._places]
        totals: dict[str, Floats] = {}
        for path, of_pass in (*units, *self._expert_units[0]):
            totals[path] = totals.get(path, np.zeros(())) + np.cumsum(of_pass)
        return totals


_MIN_LOADS = 50
"""Below that many, what a load took says little."""


def _metrics(measured: Measurement) -> dict[str, float | None]:
    return {"latency": measured.latency_ms_p50, "ttft": measured.ttft_ms_p50, "tpot": measured.tpot_ms_p50}


def _middle(spans: Sequence[tuple[float, int, int]]) -> list[int]:
    """The median one, or the two around it."""
    order = sorted(range(len(spans)), key=lambda i: spans[i][0])
    return order[(len(order) - 1) // 2 : len(order) // 2 + 1]


class Timed(Predictor):
    """A predictor that takes its time: the clock is advanced when it is asked."""

    def __init__(self, predictor: Predictor, transfer: SimulatedTransfer, ahead_s: Floats) -> None:
        self._predictor, self._transfer, self._ahead_s = predictor, transfer, ahead_s
        self.by_likelihood, self.sees_next_pass = predictor.by_likelihood, predictor.sees_next_pass
        self.reads_hidden = predictor.reads_hidden

    def begin(self, passing: Pass) -> None:
        """See `Predictor.begin`."""
        self._step = passing.step
        self._predictor.begin(passing)

    def observe(self, layer: int, observation: Observation) -> None:
        """See `Predictor.observe`."""
        self._predictor.observe(layer, observation)

    def forecast(self, layer: int) -> Forecast | None:
        """See `Predictor.forecast`."""
        if layer != BEFORE_FIRST_LAYER:
            self._transfer.advance(self._ahead_s[self._step])
        return self._predictor.forecast(layer)

    def waits(self) -> Forecast | None:
        """See `Predictor.waits`."""
        return self._predictor.waits()
