"""What the counters are counted on: one committed trace, served in several ways, by every policy and predictor whose
decisions do not depend on how a processor rounds. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from harness.measure.replay import ReplayResult, Setting, Timing, replay
from harness.measure.schedule import Schedule
from harness.search.closed_loop import Clock, ServedPasses
from harness.search.tracing import WorkloadTrace, served
from runtime.cache.policies import ORACLE, POLICIES
from runtime.predictors.params import default_period
from runtime.profile import Profile
from runtime.trace import RoutingTrace
from runtime.vocabulary import Phase

Counts = Mapping[str, int | float]
"""Counters of one scenario by name. Integers, but for virtual seconds."""

UNTRAINED = ("none", "previous_token", "gate_lookahead", "activation_matrix", "periodic")
"""Predictors. What trained ones forecast depends on how a processor rounds."""

_TIMING = Timing(load_s=2e-3, expert_s=5e-4, layer_s=1e-3)
_BATCH = 4
_CONCURRENCY = 8  # more than a scheduler of two batches of two lets run: some wait
_CLOCK = Clock(pass_s=0.02, token_s=0.001, slo_s=(0.4, 1.0, 2.0, 0.7) * 4)
_TEXT_TOKENS = 16


@dataclass(frozen=True)
class Scenarios:
    """The scenarios of one way of serving: every combination.

    Attributes:
        served: a key of `_SCHEDULES`.
        shares: of all experts, in slots.
        depth, adaptive: of prefetching; see `Setting`.
    """

    served: str
    shares: tuple[float, ...]
    policies: tuple[str, ...]
    predictors: tuple[str, ...]
    depth: int = 1
    adaptive: bool = False

    def settings(self, num_experts: int) -> Iterator[tuple[str, Setting]]:
        """By name, in the order of the goldens."""
        for share, policy, predictor in product(self.shares, self.policies, self.predictors):
            if policy == ORACLE and predictor != "none":
                continue
            more = f" depth {self.depth}" * (self.depth > 1) + " adaptive" * self.adaptive
            setting = Setting(
                policy,
                round(num_experts * share),
                predictor,
                depth=self.depth,
                every_unit=default_period(predictor)[1],
                adaptive=self.adaptive,
            )
            yield f"{self.served} {share:.0%} {policy} {predictor}{more}", setting


_BEST = ("next_use", "td_next_use")
SCENARIOS: tuple[Scenarios, ...] = (
    Scenarios("recorded", (0.15, 0.25, 0.45), (*POLICIES, ORACLE), UNTRAINED),
    Scenarios("recorded", (0.05,), _BEST, ("none", "gate_lookahead")),  # too few slots for a prompt: waves
    Scenarios("recorded", (0.25,), _BEST, ("previous_token", "gate_lookahead"), depth=2),
    Scenarios("recorded", (0.80,), ("lru", "td_next_use"), ("gate_lookahead",), depth=2, adaptive=True),
    Scenarios("batch", (0.25,), ("lru", *_BEST, ORACLE), ("none", "previous_token", "gate_lookahead")),
    Scenarios("fifo", (0.25,), _BEST, ("none", "gate_lookahead")),
    Scenarios("route_overlap", (0.25,), _BEST, ("none", "gate_lookahead")),
    Scenarios("deadline", (0.25,), _BEST, ("none", "gate_lookahead")),
)


def count_scenarios(trace: RoutingTrace, on_done: Callable[[], object] = lambda: None) -> dict[str, Counts]:
    """The counters of every scenario, in order; `on_done` is called after each.

    Raises:
        UsageError, TraceError: the trace lacks what a scenario needs.
    """
    schedules: dict[str, Schedule] = {}
    found: dict[str, Counts] = {}
    for group in SCENARIOS:
        schedule = schedules.setdefault(group.served, _SCHEDULES[group.served](trace))
        for name, setting in group.settings(trace.num_layers * trace.num_experts):
            found[name] = _counts(schedule, replay(schedule, setting, _TIMING))
            on_done()
    return found


def num_scenarios() -> int:
    """Of all together."""
    return sum(1 for group in SCENARIOS for _ in group.settings(1))


def _counts(schedule: Schedule, result: ReplayResult) -> Counts:
    cache = result.cache
    counts: dict[str, int | float] = {
        "passes": cache.num_passes,
        "layer_steps": cache.num_layer_steps,
        "waves": cache.num_waves,
        "lookups": cache.num_lookups,
        "hits": cache.num_hits,
        "misses": cache.num_misses,
        "evictions": cache.num_evictions,
        "bytes_moved": result.num_bytes,
        "prefetch_issued": cache.num_prefetch_issued,
        "prefetch_used": cache.num_prefetch_used,
        "prefetch_late": cache.num_in_flight,
        "prefetch_wasted": cache.num_prefetch_wasted,
        "peak_slots": result.peak_slots,
        "stall_s": float(result.stall_s),
    }
    if isinstance(schedule, ServedPasses) and schedule.num_in_slo is not None:
        counts["in_slo"] = schedule.num_in_slo
    return counts


LOWER_IS_BETTER: Mapping[str, bool | None] = {
    "misses": True,
    "stall_s": True,
    "bytes_moved": True,
    "prefetch_wasted": True,
    "prefetch_late": None,
    "prefetch_used": False,
    "prefetch_issued": None,
    "hits": False,
    "evictions": True,
    "lookups": True,
    "in_slo": False,
    "passes": True,
    "waves": True,
    "layer_steps": True,
    "peak_slots": True,
}
"""Every counter, the telling ones first; None: neither is better by itself.

`lookups` are distinct experts of layer steps, which is what a token scheduler lowers; `prefetch_late` are experts that
were demanded while their prefetch was under way; `in_slo` are requests, where there are SLOs. A slot holds
`expert_bytes` of the trace, so `peak_slots` says what the peak in bytes is.
"""


def _scheduled(kind: str) -> Callable[[RoutingTrace], Schedule]:
    profile = Profile.default().with_overrides({"scheduler.kind": kind, "scheduler.group": 2, "scheduler.window": 2})
    return lambda trace: ServedPasses(_short_texts(trace), profile, _CONCURRENCY, _CLOCK)


_SCHEDULES: Mapping[str, Callable[[RoutingTrace], Schedule]] = {
    "recorded": Schedule,
    "batch": lambda trace: Schedule(trace, batch=_BATCH),
    "fifo": _scheduled("fifo"),
    "route_overlap": _scheduled("route_overlap"),
    "deadline": _scheduled("deadline"),
}


def _short_texts(trace: RoutingTrace) -> WorkloadTrace:
    """The trace cut into many short requests, with prompts of several lengths: a scheduler has something to choose."""
    text = np.arange(trace.num_tokens) // _TEXT_TOKENS
    place = np.arange(trace.num_tokens) % _TEXT_TOKENS
    phase = np.where(place < 3 + 2 * (text % 3), Phase.PREFILL, Phase.DECODE)
    first = np.unique(text, return_index=True)[1]
    tasks = [trace.task(int(request)) for request in trace.request[first]]
    short = replace(
        trace,
        request=text.astype(np.int32),
        phase=phase.astype(np.uint8),
        step=None,
        meta={**trace.meta, "tasks": tasks},
    )
    return served(short, _TEXT_TOKENS)
