"""Passes that load whole layers ahead of their routers, on a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from runtime.cache.coordinator import Coordinator
from runtime.cache.governor import Governor
from runtime.cache.policies import POLICIES
from runtime.cache.residency import Count, Residency
from runtime.cache.streaming import STREAM_SHARE, Streaming
from runtime.predictors.base import Forecast, NoPredictor, Observation, Predictor
from runtime.transfer.base import Transfer
from runtime.transfer.simulated import SimulatedTransfer
from runtime.vocabulary import Load, LoadReason, Pass, Phase

LAYERS, EXPERTS, TOP_K = 8, 32, 4
LONG = 2048  # tokens of a prompt


def coordinator_of(
    slots: int, transfer: Transfer, predictor: Predictor | None = None, *, policy: str = "next_use", **more: object
) -> Coordinator:
    settings = {"streams": True, "prefetch_count": 1, **more}
    residency = Residency(LAYERS, EXPERTS, slots, TOP_K, policy)
    governor = Governor(0 if predictor is None else 1)
    return Coordinator(residency, transfer, predictor or NoPredictor(), governor=governor, **settings)  # type: ignore[arg-type]


def observation(num_tokens: int, step: int = 0) -> Observation:
    return Observation(Pass(Phase.PREFILL, num_tokens, step), np.zeros((num_tokens, 1), np.int64))


@dataclass
class Took:
    """Of a pass: seconds in all, of the link, of computing; and the counters that it moved."""

    seconds: float
    link_s: float
    compute_s: float
    counts: dict[Count, int]


def run_pass(
    coordinator: Coordinator,
    demands: Sequence[Sequence[int]],
    expert_s: Sequence[Sequence[float]],
    layer_s: float = 4.0,
    num_tokens: int = LONG,
) -> Took:
    """A pass whose layer `l` demands `demands[l]`, each expert computed for `expert_s[l]` seconds, after `layer_s`."""
    transfer: SimulatedTransfer = coordinator.transfer  # type: ignore[assignment]
    began_s, busy_s, before = transfer.now_s, transfer.stats().busy_s, coordinator.residency.counts()
    seen, compute_s = observation(num_tokens), 0.0
    coordinator.begin(seen.passing)
    for layer, (demand, seconds) in enumerate(zip(demands, expert_s, strict=True)):
        transfer.advance(layer_s)
        experts = [layer * EXPERTS + expert for expert in demand]
        takes = dict(zip(experts, seconds, strict=True))
        served: list[int] = []
        for group in coordinator.serve(layer, experts, [1] * len(experts), seen):
            transfer.advance(sum(takes[expert] for expert in group))
            served += group
        assert sorted(served) == experts
        compute_s += layer_s + sum(seconds)
    coordinator.residency.check_integrity()
    after = coordinator.residency.counts()
    return Took(
        transfer.now_s - began_s,
        transfer.stats().busy_s - busy_s,
        compute_s,
        {count: after[count] - before[count] for count in Count},
    )


ALL = [list(range(EXPERTS))] * LAYERS


def even(seconds: float) -> list[list[float]]:
    return [[seconds] * EXPERTS] * LAYERS


@pytest.mark.parametrize("expert_s", [0.2, 0.5, 0.9, 2.0])
@pytest.mark.parametrize("slots", [8, EXPERTS // 2, EXPERTS, EXPERTS + 8, 2 * EXPERTS, LAYERS * EXPERTS])
def test_a_prompt_takes_what_the_link_or_the_computing_takes(slots: int, expert_s: float) -> None:
    coordinator = coordinator_of(slots, SimulatedTransfer(1.0))
    took = run_pass(coordinator, ALL, even(expert_s))
    assert took.seconds <= max(took.link_s, took.compute_s) + 1.0 + expert_s + 1e-6  # until the last has arrived
    again = run_pass(coordinator, ALL, even(expert_s))  # into full slots
    assert again.seconds <= took.seconds + 1e-6 and again.link_s <= took.link_s == LAYERS * EXPERTS
    assert again.counts[Count.PREFETCH_WASTED] == 0


def test_without_streaming_the_link_waits_for_every_router() -> None:
    took = [
        run_pass(coordinator_of(2 * EXPERTS, SimulatedTransfer(1.0), streams=streams), ALL, even(0.5))
        for streams in (False, True)
    ]
    assert took[0].link_s == took[1].link_s == LAYERS * EXPERTS
    assert took[0].seconds >= took[0].link_s + (LAYERS - 1) * 4.0
    assert took[1].seconds <= 1.01 * took[1].link_s


@pytest.mark.parametrize(("slots", "gap_s"), [(1, 5.0), (2, 4.5), (3, 4.0)])
def test_a_few_slots_still_overlap_what_they_can(slots: int, gap_s: float) -> None:
    """One slot: nothing is loaded while it is computed. More: the link waits only while a router is waited for."""
    took = run_pass(coordinator_of(slots, SimulatedTransfer(1.0)), ALL, even(0.5))
    limit_s = took.link_s + LAYERS * gap_s
    assert took.seconds <= (took.link_s + took.compute_s if slots == 1 else limit_s)
    waves = run_pass(coordinator_of(slots, SimulatedTransfer(1.0), streams=False), ALL, even(0.5))
    assert took.seconds < waves.seconds


@pytest.mark.parametrize("slots", [EXPERTS // 2, 2 * EXPERTS])
@pytest.mark.parametrize("seed", range(4))
def test_skewed_routing(slots: int, seed: int) -> None:
    """A few experts are computed for most of the tokens, and in each layer some are not chosen."""
    generator, coordinator = np.random.default_rng(seed), coordinator_of(slots, SimulatedTransfer(1.0))
    demands = [np.sort(generator.choice(EXPERTS, 29, replace=False)).tolist() for _ in range(LAYERS)]
    expert_s = [(generator.dirichlet(np.full(29, 0.3)) * 25.0).tolist() for _ in range(LAYERS)]
    took = run_pass(coordinator, demands, expert_s)
    assert took.seconds <= 1.06 * max(took.link_s, took.compute_s)
    assert took.link_s <= LAYERS * EXPERTS


def test_what_other_layers_have_is_not_given_up_for_the_next_one() -> None:
    coordinator = coordinator_of(2 * EXPERTS, SimulatedTransfer(1.0))
    last = [[]] * (LAYERS - 1) + [list(range(EXPERTS))]
    for layer, demand in enumerate(last):
        experts = [layer * EXPERTS + expert for expert in demand]
        if experts:
            list(coordinator.serve(layer, experts, [1] * len(experts), observation(1)))
    took = run_pass(coordinator, ALL, even(0.5))
    assert took.link_s == (LAYERS - 1) * EXPERTS, "the last layer's were all there, and stayed"


@pytest.mark.parametrize("slots", [EXPERTS // 2, 2 * EXPERTS])
@pytest.mark.parametrize("chosen", [4, 16, 23])
def test_a_prompt_that_needs_too_few_wastes_one_layer(slots: int, chosen: int) -> None:
    generator, coordinator = np.random.default_rng(0), coordinator_of(slots, SimulatedTransfer(1.0))
    demands = [np.sort(generator.choice(EXPERTS, chosen, replace=False)).tolist() for _ in range(LAYERS)]
    took = run_pass(coordinator, demands, [[0.5] * chosen] * LAYERS)
    assert took.counts[Count.PREFETCH_ISSUED] <= EXPERTS
    assert took.link_s <= LAYERS * chosen + EXPERTS - chosen


@pytest.mark.parametrize("seed", range(20))
def test_what_is_loaded_in_vain_is_bounded(seed: int) -> None:
    generator, coordinator = np.random.default_rng(seed), coordinator_of(2 * EXPERTS, SimulatedTransfer(1.0))
    chosen = generator.integers(8, EXPERTS + 1, LAYERS)
    demands = [np.sort(generator.choice(EXPERTS, number, replace=False)).tolist() for number in chosen]
    took = run_pass(coordinator, demands, [[0.5] * number for number in chosen])
    in_vain = took.counts[Count.PREFETCH_ISSUED] - took.counts[Count.PREFETCH_USED]
    assert in_vain <= (1 - STREAM_SHARE) * LAYERS * EXPERTS + EXPERTS


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("slots", [1, 5, EXPERTS // 2, EXPERTS, EXPERTS + 8, 4 * EXPERTS])
def test_a_stream_keeps_its_bounds_and_gives_up_nothing_that_is_to_come(
    slots: int, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of any length that find any experts in the slots."""
    generator, coordinator = np.random.default_rng(slots), coordinator_of(slots, SimulatedTransfer(1.0), policy=policy)
    residency, lacked = coordinator.residency, list[int]()
    plan, saw = residency.plan_prefetch, Streaming.saw

    def watched(layer: int, wanted: Sequence[int], steps_ahead: Sequence[int]) -> tuple[Load, ...]:
        before, loads = set(residency.resident()), plan(layer, wanted, steps_ahead)
        gone = {expert // EXPERTS for expert in before - set(residency.resident())}
        assert max(gone, default=-1) <= layer if layer >= 0 else 0 not in gone
        return loads

    def noted(streaming: Streaming, num_lacked: int, num_needed: int) -> None:
        lacked.append(num_lacked)
        saw(streaming, num_lacked, num_needed)

    monkeypatch.setattr(residency, "plan_prefetch", watched)
    monkeypatch.setattr(Streaming, "saw", noted)
    for num_tokens in (LONG, 1, 300, LONG, LONG):
        lacked.clear()
        least = TOP_K if num_tokens == 1 or generator.random() < 0.3 else 24
        chosen = [TOP_K if num_tokens == 1 else generator.integers(least, EXPERTS + 1) for _ in range(LAYERS)]
        demands = [np.sort(generator.choice(EXPERTS, number, replace=False)).tolist() for number in chosen]
        counts = run_pass(coordinator, demands, [[0.5] * number for number in chosen], num_tokens=num_tokens).counts
        in_vain = counts[Count.PREFETCH_ISSUED] - counts[Count.PREFETCH_USED]
        assert in_vain <= (1 - STREAM_SHARE) * sum(lacked) + max(lacked)
        assert counts[Count.PREFETCH_ISSUED] <= sum(lacked)


def test_what_was_loaded_in_vain_goes_first() -> None:
    coordinator = coordinator_of(2 * EXPERTS, SimulatedTransfer(1.0))
    demands = [list(range(28))] * LAYERS
    run_pass(coordinator, demands, [[0.5] * 28] * LAYERS)
    counts = coordinator.residency.counts()
    assert counts[Count.PREFETCH_WASTED] >= 4 * (LAYERS - 2), "all but the last two layers' have gone"


@pytest.mark.parametrize(("num_tokens", "streams"), [(1, False), (16, False), (64, False), (256, True), (2048, True)])
def test_how_many_tokens_activate_most_experts(num_tokens: int, streams: bool) -> None:
    streaming = Streaming(32, 4)
    streaming.begin(num_tokens)
    assert streaming.is_on == streams


def test_a_pass_goes_by_what_its_layers_needed() -> None:
    streaming = Streaming(32, 4)
    streaming.begin(16)
    streaming.saw(24, 24)
    assert streaming.is_on
    streaming.saw(24, 6)
    assert not streaming.is_on
    streaming.saw(0, 0)
    assert streaming.share == 30 / 48
    streaming.begin(LONG)
    assert streaming.is_on


class Asked(Predictor):
    """Counts how often it was asked to compute, and forecasts the first expert of each layer."""

    def __init__(self, reads_hidden: bool) -> None:
        self.reads_hidden, self.num_asked = reads_hidden, 0

    def observe(self, layer: int, observation: Observation) -> None:
        self.num_asked += 1

    def forecast(self, layer: int) -> Forecast | None:
        rows = np.zeros((LAYERS, EXPERTS), np.float32)
        rows[:, 0] = 1.0
        return rows


@pytest.mark.parametrize("reads_hidden", [False, True])
def test_routers_are_not_looked_ahead_to_while_layers_stream(reads_hidden: bool) -> None:
    predictor = Asked(reads_hidden)
    coordinator = coordinator_of(2 * EXPERTS, SimulatedTransfer(1.0), predictor)
    run_pass(coordinator, ALL, even(0.5))
    assert predictor.num_asked == (0 if reads_hidden else LAYERS)
    run_pass(coordinator, [[3]] * LAYERS, [[0.5]] * LAYERS, num_tokens=1)
    assert predictor.num_asked == (LAYERS if reads_hidden else 2 * LAYERS)


def test_needed_loads_are_those_that_a_router_chose() -> None:
    needed: list[Load] = []
    coordinator = coordinator_of(EXPERTS // 2, SimulatedTransfer(1.0), needed_loads=needed)
    demands = [list(range(28))] * LAYERS
    took = run_pass(coordinator, demands, [[0.5] * 28] * LAYERS)
    assert [load.expert for load in needed] == [layer * EXPERTS + e for layer in range(LAYERS) for e in range(28)]
    assert sum(load.reason is LoadReason.PREFETCH for load in needed) == took.counts[Count.PREFETCH_USED] > 0
