"""Replays of two tiers: what a GPU's slots miss is demanded of host memory, and what that misses is read from disk.

Only which experts move is replayed, not when: loads are demanded, and have arrived before the next layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.measure.replay import Setting
from harness.measure.schedule import Schedule
from runtime.cache.residency import Count, Residency
from runtime.vocabulary import Load

Demand = tuple[int, list[int]]
"""A layer, and the experts that one wave of it demands of the tier below."""


@dataclass(frozen=True)
class HostResult:
    """What a host tier of `slots` experts under `policy` did with the misses of a GPU's slots.

    Attributes:
        gpu_misses: experts that were copied to the GPU. host_misses: of these, read from disk.
        expert_bytes: of one load; 0: not known. tokens: that were replayed.
    """

    gpu_policy: str
    gpu_slots: int
    policy: str
    slots: int
    gpu_misses: int
    host_misses: int
    expert_bytes: int
    tokens: int

    @property
    def hit_rate(self) -> float:
        """Of what the GPU missed, the share that was in host memory."""
        return 1.0 - self.host_misses / self.gpu_misses if self.gpu_misses else 0.0

    def as_dict(self) -> dict[str, Any]:
        """One flat JSON object."""
        per_token = {
            "hit_rate": self.hit_rate,
            "gpu_misses_per_token": self.gpu_misses / self.tokens,
            "disk_reads_per_token": self.host_misses / self.tokens,
        }
        return asdict(self) | per_token


def misses(schedule: Schedule, setting: Setting, on_pass: Callable[[int], None]) -> list[Demand]:
    """What slots as in `setting` miss of a schedule, on demand only, wave by wave."""
    residency = _residency(schedule, setting.policy, setting.slots)
    starts, experts, tokens = (array.tolist() for array in schedule.demands)
    missed: list[Demand] = []
    event = 0
    for rows in schedule.passes:
        for layer in range(schedule.trace.num_layers):
            part = slice(starts[event], starts[event + 1])
            demand, counts, is_first = experts[part], tokens[part], True
            while demand:
                loads, deferred = _wave(residency, layer, demand, counts, len(rows), first=is_first)
                if loads:
                    missed.append((layer, [load.expert for load in loads]))
                demand, counts, is_first = list(deferred), [0] * len(deferred), False
            event += 1
        on_pass(len(rows))
    return missed


def replay_host(schedule: Schedule, gpu: Setting, missed: Sequence[Demand], policy: str, slots: int) -> HostResult:
    """Serve `missed` from host memory, as `TieredTransfer` does: every wave counts as a step of one token."""
    residency = _residency(schedule, policy, slots)
    for layer, demand in missed:
        is_first = True
        while demand:
            _, deferred = _wave(residency, layer, demand, [1] * len(demand), 1, first=is_first)
            demand, is_first = list(deferred), False
    return HostResult(
        gpu.policy,
        gpu.slots,
        policy,
        slots,
        sum(len(demand) for _, demand in missed),
        residency.counts()[Count.MISSES],
        int(schedule.trace.meta.get("expert_bytes") or 0),
        schedule.num_tokens,
    )


def _residency(schedule: Schedule, policy: str, slots: int) -> Residency:
    trace = schedule.trace
    return Residency(trace.num_layers, trace.num_experts, slots, trace.top_k, policy)


def _wave(
    residency: Residency, layer: int, demand: list[int], tokens: list[int], num_tokens: int, *, first: bool
) -> tuple[tuple[Load, ...], tuple[int, ...]]:
    """The loads of one wave, which arrive and are released; and what found no slot."""
    plan = residency.plan(layer, demand, tokens, num_tokens, first=first)
    served = [*plan.hits, *plan.awaited]
    residency.complete(load.expert for load in plan.loads)
    residency.release(served)
    return plan.loads, plan.deferred
