"""Which misses are computed in place: the split of a layer step, and the compiled plan that carries it out."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cache.coordinator import Coordinator
from runtime.cache.governor import Governor
from runtime.cache.miss import Misses, MissRates, MissSplit
from runtime.cache.policies import POLICIES
from runtime.cache.residency import Count, Residency
from runtime.predictors.base import NoPredictor, Observation
from runtime.transfer.simulated import SimulatedTransfer
from runtime.vocabulary import Pass, Phase

LAYERS, EXPERTS, SLOTS = 2, 8, 5
FEW = st.floats(1e-6, 1.0)


@given(FEW, FEW, st.floats(0, 0.1), st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_no_other_number_of_copies_ends_sooner(
    copy_s: float, expert_s: float, token_s: float, tokens: list[int]
) -> None:
    rates = MissRates(copy_s, expert_s, token_s)
    each_s = rates.compute_s(sum(tokens) / len(tokens))

    def takes_s(q: int) -> float:
        return max(q * copy_s, (len(tokens) - q) * each_s)

    chosen = MissSplit(rates).num_copies(tokens)
    best_s = min(map(takes_s, range(len(tokens) + 1)))
    assert takes_s(chosen) == best_s
    assert not any(takes_s(q) == best_s for q in range(chosen + 1, len(tokens) + 1)), "more copies take no longer"


@pytest.mark.parametrize(
    ("copy_ms", "compute_ms", "copies"),
    [(1.0, 1.0, 4), (1.0, 3.0, 6), (3.0, 1.0, 2), (1.0, 100.0, 8), (100.0, 1.0, 0), (0.0, 1.0, 8)],
)
def test_splits_of_eight(copy_ms: float, compute_ms: float, copies: int) -> None:
    split = MissSplit(MissRates(copy_ms / 1e3, compute_ms / 1e3, 0.0))
    assert split.num_copies([1] * 8) == copies
    assert split.num_copies([]) == 0
    assert split.may_compute(8, 1.0) == (copies < 8)


@pytest.mark.parametrize(("share", "copies"), [(0.0, 5), (0.1, 4), (0.49, 3), (0.5, 2), (1.0, 0)])
def test_a_share_is_rounded_to_the_nearest(share: float, copies: int) -> None:
    split = MissSplit(MissRates(1.0, 9.0, 0.0), share)
    assert split.num_copies([1] * 5) == copies
    assert split.may_compute(5, 1.0) == (share > 0)


def test_many_tokens_are_copied_whatever_the_share() -> None:
    rates = MissRates(copy_s=10.0, expert_s=1.0, token_s=1.0)  # nine tokens take as long as copying
    for split in (MissSplit(rates, 1.0), MissSplit(rates)):
        assert split.num_copies([9, 9]) < 2 and split.may_compute(2, 9.0)
    assert MissSplit(rates, 1.0).num_copies([9, 11]) == 2
    assert not MissSplit(rates, 1.0).may_compute(2, 10.0)
    assert MissSplit(rates).num_copies([50, 50]) == 2 and not MissSplit(rates).may_compute(2, 50.0)
    assert MissSplit(MissRates(1.0, 5.0, 1.0), 1.0).num_copies([1, 1]) == 0, "one token each: as the share says"


def _traces() -> st.SearchStrategy[list[tuple[int, list[int], int, list[int]]]]:
    """Layer, experts in it, most loads, and which of the experts are at hand."""
    experts = st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=EXPERTS, unique=True)
    step = st.tuples(st.integers(0, LAYERS - 1), experts, st.integers(0, EXPERTS), experts)
    return st.lists(step, min_size=1, max_size=30)


@given(_traces(), st.sampled_from(sorted(POLICIES)))
@settings(max_examples=60, deadline=None)
def test_no_more_loads_than_allowed_and_leases_of_these_alone(
    trace: list[tuple[int, list[int], int, list[int]]], policy: str
) -> None:
    residency = Residency(LAYERS, EXPERTS, SLOTS, 2, policy)
    for layer, experts, most, here in trace:
        demand, at_hand = [layer * EXPERTS + e for e in experts], {layer * EXPERTS + e for e in here}
        missing = {expert for expert in demand if residency.slot_of(expert) < 0}
        before, counts = set(residency.resident()), residency.counts()
        plan = residency.plan(layer, demand, [1] * len(demand), 1, most_loads=most, at_hand=at_hand)
        loaded = {load.expert for load in plan.loads} | set(plan.deferred)
        assert set(plan.computed) <= at_hand & missing
        assert loaded | set(plan.computed) == missing and not loaded & set(plan.computed)
        assert len(loaded) == max(len(missing - at_hand), min(most, len(missing)))
        leased = {expert for expert in range(LAYERS * EXPERTS) if residency._leases[expert]}
        assert leased == set(plan.hits) | set(plan.awaited)
        assert all(residency.slot_of(expert) < 0 for expert in plan.computed)
        grown = {count: now - counts[count] for count, now in residency.counts().items()}
        assert grown[Count.MISSES] == len(missing) and grown[Count.COMPUTED] == len(plan.computed)
        assert grown[Count.EVICTIONS] == len(before - set(residency.resident()))
        residency.complete(plan.awaited)
        residency.release(plan.hits + plan.awaited)
        residency.check_integrity()


@given(_traces(), st.sampled_from(sorted(POLICIES)))
@settings(max_examples=60, deadline=None)
def test_room_for_every_load_is_as_if_there_were_no_limit(
    trace: list[tuple[int, list[int], int, list[int]]], policy: str
) -> None:
    free, limited = (Residency(LAYERS, EXPERTS, SLOTS, 2, policy) for _ in range(2))
    for layer, experts, _, here in trace:
        demand = [layer * EXPERTS + e for e in experts]
        plan = free.plan(layer, demand, [1] * len(demand), 1)
        at_hand = {layer * EXPERTS + e for e in here}
        assert limited.plan(layer, demand, [1] * len(demand), 1, most_loads=EXPERTS, at_hand=at_hand) == plan
        for residency in (free, limited):
            residency.complete(plan.awaited)
            residency.release(plan.hits + plan.awaited)
    assert free.counts() == limited.counts()
    assert np.array_equal(free._state.experts, limited._state.experts)


def test_the_slots_go_to_those_most_worth_keeping() -> None:
    residency = Residency(1, EXPERTS, 1, 2, "lfu")
    for expert in (3, 3, 3, 5, 5, 1):
        plan = residency.plan(0, [expert], [1], 1)
        residency.complete(plan.awaited)
        residency.release(plan.hits + plan.awaited)
    plan = residency.plan(0, [2, 3, 5], [1, 1, 1], 1, most_loads=1, at_hand={2, 3, 5})
    assert [load.expert for load in plan.loads] == [3] and plan.computed == (2, 5)
    by_tokens = Residency(1, EXPERTS, 1, 2, "lru").plan(0, [0, 1, 2], [1, 4, 2], 4, most_loads=1, at_hand={0, 1, 2})
    assert [load.expert for load in by_tokens.loads] == [1], "between equals the one that more tokens chose"


class _Host:
    """Has all experts but those `far` from it."""

    def __init__(self, far: Collection[int] = ()) -> None:
        self._far, self.held = far, set[int]()

    def has(self, expert: int) -> bool:
        return expert not in self._far

    def hold(self, experts: Collection[int]) -> None:
        assert not self.held & set(experts)
        self.held |= set(experts)

    def release(self, experts: Collection[int]) -> None:
        assert self.held >= set(experts)
        self.held -= set(experts)


def _coordinator(split: MissSplit, host: _Host | None = None) -> Coordinator:
    residency = Residency(LAYERS, EXPERTS, 2, 2, "lru")
    transfer = SimulatedTransfer(load_s=1.0)
    made = Coordinator(residency, transfer, NoPredictor(), governor=Governor(0), prefetch_count=1)
    made.misses = Misses(split, host or _Host(), EXPERTS)
    return made


def _serve(coordinator: Coordinator, experts: list[int]) -> list[tuple[int, ...]]:
    observation = Observation(Pass(Phase.DECODE, 1, 0), np.zeros((1, 2), np.int64))
    return [tuple(group) for group in coordinator.serve(0, experts, [1] * len(experts), observation)]


def test_computed_ones_come_after_hits_and_before_arrivals() -> None:
    coordinator = _coordinator(MissSplit(MissRates(1.0, 1.0, 0.0), 0.5))
    assert _serve(coordinator, [0, 1]) == [(0,), (1,)], "free slots are filled, whatever the share"
    assert _serve(coordinator, [1, 2, 3]) == [(1,), (3,), (2,)]
    assert coordinator.transfer.stats().num_loads == 3
    counts = coordinator.residency.counts()
    assert (counts[Count.MISSES], counts[Count.COMPUTED]) == (4, 1)
    assert not coordinator.residency.is_ready(3)
    coordinator.residency.check_integrity()


def test_what_is_not_at_hand_is_copied() -> None:
    coordinator = _coordinator(MissSplit(MissRates(1.0, 1.0, 0.0), 1.0), _Host(far={4, 5, 6}))
    _serve(coordinator, [0, 1])
    assert _serve(coordinator, [2, 3, 4]) == [(2, 3), (4,)]
    assert sorted(expert for group in _serve(coordinator, [0, 4, 5, 6, 7]) for expert in group) == [0, 4, 5, 6, 7]
    coordinator.residency.check_integrity()


def test_an_expert_may_be_prefetched_while_it_is_computed() -> None:
    coordinator = _coordinator(MissSplit(MissRates(1.0, 1.0, 0.0), 1.0))
    residency = coordinator.residency
    _serve(coordinator, [0, 1])
    observation = Observation(Pass(Phase.DECODE, 1, 0), np.zeros((1, 2), np.int64))
    groups = coordinator.serve(0, [2, 3], [1, 1], observation)
    assert tuple(next(groups)) == (2, 3)
    loads = residency.plan_prefetch(0, [2], [1])
    coordinator.transfer.submit(loads)
    assert [load.expert for load in loads] == [2] and not residency.is_ready(2), "computed where it rests for all that"
    assert list(groups) == []
    residency.check_integrity()
    assert _serve(coordinator, [2]) == [(2,)]
    counts = residency.counts()
    assert (counts[Count.COMPUTED], counts[Count.PREFETCH_USED], counts[Count.IN_FLIGHT]) == (2, 1, 1)
    residency.check_integrity()


def test_what_is_computed_is_held_until_it_has_been_or_will_not_be() -> None:
    host = _Host()
    coordinator = _coordinator(MissSplit(MissRates(1.0, 1.0, 0.0), 1.0), host)
    _serve(coordinator, [0, 1])
    observation = Observation(Pass(Phase.DECODE, 1, 0), np.zeros((1, 2), np.int64))
    groups = coordinator.serve(0, [2, 3], [1, 1], observation)
    assert tuple(next(groups)) == (2, 3) and host.held == {2, 3}
    assert list(groups) == [] and not host.held
    for give_up in (coordinator.recover, lambda: _serve(coordinator, [6, 7])):
        broken_off = coordinator.serve(0, [4, 5], [1, 1], observation)
        next(broken_off)
        broken_off.close()
        assert host.held == {4, 5}
        give_up()
        assert not host.held
