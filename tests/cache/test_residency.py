"""The decision core: golden counts on real routing, a contract over every policy, and hypothesis-driven schedules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cache.policies import POLICIES
from runtime.cache.residency import Count, Move, Residency, Shrink
from runtime.errors import BudgetError
from runtime.vocabulary import LoadReason

TRACE = Path(__file__).parents[3] / "shared" / "traces" / "gpt-oss-20b.npz"

# Hit rate in % by share of the experts in slots: the first 6,000 tokens, started empty.
GOLDEN = {
    "lru": {0.15: 45.9, 0.25: 63.2, 0.45: 88.0},
    "lfu": {0.25: 52.8},
    "lfru": {0.25: 68.4},
    "static": {0.25: 24.4},
    "next_use": {0.15: 57.2, 0.25: 72.8, 0.45: 90.4},
}


def _step(residency: Residency, layer: int, experts: list[int], tokens: list[int] | None = None) -> int:
    """One layer step in which everything loads at once; the number of misses."""
    tokens = tokens or [1] * len(experts)
    plan = residency.plan(layer, experts, tokens, max(tokens))
    misses = 0
    while True:
        misses += len(plan.loads)
        residency.complete(load.expert for load in plan.loads)
        residency.release(plan.hits + plan.awaited)
        if not plan.deferred:
            return misses
        plan = residency.plan(layer, plan.deferred, [0] * len(plan.deferred), 1, first=False)


@pytest.mark.parametrize("policy", GOLDEN)
def test_golden_hit_rates_on_real_routing(policy: str) -> None:
    if not TRACE.exists():
        pytest.skip("the gpt-oss-20b trace is not beside the repository")
    routes = np.load(TRACE, allow_pickle=False)["experts"][:6000].astype(np.int64)
    _, num_layers, top_k = routes.shape
    offsets = np.arange(num_layers)[:, None] * 32
    for share, expected in GOLDEN[policy].items():
        residency = Residency(num_layers, 32, round(num_layers * 32 * share), top_k, policy)
        for token in routes + offsets:
            for layer in range(num_layers):
                _step(residency, layer, token[layer].tolist())
        counts = residency.counts()
        assert round(100 * counts[Count.HITS] / counts[Count.LOOKUPS], 1) == expected
        assert counts[Count.LOOKUPS] == routes.size
        residency.check_integrity()


@pytest.mark.parametrize(
    ("policy", "history", "victim"),
    [
        ("lru", [[0], [1], [2], [0]], 1),
        ("lfu", [[0], [0], [1], [1], [2]], 2),
        ("static", [[0], [1], [2], [0]], 2),
        ("lfru", [[0], [0], [0], [1], [2]], 1),
    ],
)
def test_a_policy_evicts_what_its_formula_says(policy: str, history: list[list[int]], victim: int) -> None:
    residency = Residency(1, 8, 3, 1, policy)
    for experts in history:
        _step(residency, 0, experts)
    _step(residency, 0, [7])
    assert sorted({0, 1, 2} - set(residency.resident())) == [victim]


def test_next_use_evicts_the_layer_that_is_needed_last() -> None:
    """Four layers of equal frequency: when layer 2 needs room, layer 1 has just run and is needed last."""
    residency = Residency(4, 2, 3, 1, "next_use")
    _step(residency, 3, [6])
    _step(residency, 0, [0])
    _step(residency, 1, [2])
    _step(residency, 2, [4])
    assert sorted(residency.resident()) == [0, 4, 6]
    lru = Residency(4, 2, 3, 1, "lru")
    for layer, expert in ((3, 6), (0, 0), (1, 2), (2, 4)):
        _step(lru, layer, [expert])
    assert 6 not in lru.resident(), "LRU throws out what is needed next"


def test_what_a_predictor_says_of_waits_decides() -> None:
    residency = Residency(2, 4, 3, 1, "probabilistic_belady")
    for expert in range(3):
        _step(residency, 0, [expert])
    waits = np.array([[2.0, 3.0, 0.5, 9.0], [0.0] * 4], np.float32)
    residency.foresee(np.zeros((2, 4), np.float32), waits=waits)
    _step(residency, 1, [4])
    assert sorted(residency.resident()) == [0, 2, 4]
    waits[0] = [0.2, 0.0, 0.3, 0.0]  # layer 1 has just run: its turn comes after layer 0's
    residency.foresee(np.zeros((2, 4), np.float32), waits=waits)
    _step(residency, 1, [5])
    assert sorted(residency.resident()) == [0, 2, 5]


def test_td_next_use_learns_what_is_used_some_tokens_after_an_expert() -> None:
    """Experts 0, 1, 2, 3 take turns: when the third is needed, the first is needed next and the second last."""
    residency = Residency(1, 4, 3, 1, "td_next_use")
    for token in range(400):
        _step(residency, 0, [token % 4])
    assert residency.counts()[Count.MISSES] > 100
    residency.reset_counts()
    for token in range(400, 1200):
        _step(residency, 0, [token % 4])
    assert residency.counts()[Count.MISSES] / 800 == pytest.approx(1 / 3, abs=0.02), "as few as Belady's"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_demand_larger_than_the_cache_is_served_in_waves(policy: str) -> None:
    residency = Residency(2, 8, 3, 2, policy)
    assert _step(residency, 0, list(range(8))) == 8
    counts = residency.counts()
    assert (counts[Count.LOOKUPS], counts[Count.MISSES], counts[Count.LAYER_STEPS]) == (8, 8, 1)
    assert counts[Count.WAVES] == 3
    residency.check_integrity()


def test_leased_experts_are_never_evicted() -> None:
    residency = Residency(1, 8, 2, 2, "lru")
    plan = residency.plan(0, [0, 1], [1, 1], 1)
    assert len(plan.loads) == 2
    blocked = residency.plan(0, [2], [1], 1)
    assert blocked.deferred == (2,) and not blocked.loads
    residency.release([0])
    assert residency.plan(0, [2], [1], 1, first=False).loads[0].slot == plan.loads[0].slot


def test_in_flight_is_neither_a_hit_nor_a_miss() -> None:
    residency = Residency(2, 4, 4, 1, "lru")
    (load,) = residency.plan_prefetch(0, [4], [1])
    assert load.reason is LoadReason.PREFETCH
    plan = residency.plan(1, [4], [1], 1)
    assert plan.in_flight == (4,) and plan.awaited == (4,)
    residency.complete([4])
    residency.release([4])
    assert residency.plan(1, [4], [1], 1).hits == (4,)
    counts = residency.counts()
    assert (counts[Count.HITS], counts[Count.IN_FLIGHT], counts[Count.MISSES]) == (1, 1, 0)
    assert (counts[Count.PREFETCH_ISSUED], counts[Count.PREFETCH_USED], counts[Count.PREFETCH_WASTED]) == (1, 1, 0)


def test_a_prefetch_does_not_evict_what_is_needed_sooner() -> None:
    residency = Residency(4, 2, 2, 1, "lru")
    assert len(residency.plan_prefetch(0, [2, 4], [1, 2])) == 2
    assert residency.plan_prefetch(0, [6], [3]) == (), "both residents are needed before layer 3"
    assert len(residency.plan_prefetch(0, [3], [1])) == 1, "layer 2's is needed later than layer 1's"
    assert 4 not in residency.resident()


def test_a_prefetch_that_its_layer_did_not_want_goes_first_and_counts_as_wasted() -> None:
    residency = Residency(2, 4, 3, 1, "lru")
    _step(residency, 0, [0])
    residency.plan_prefetch(0, [4], [1])
    residency.complete([4])
    _step(residency, 1, [5])
    _step(residency, 0, [1])
    assert 4 not in residency.resident() and 0 in residency.resident()
    assert residency.counts()[Count.PREFETCH_WASTED] == 1


def test_a_dropped_expert_frees_its_slot() -> None:
    residency = Residency(1, 4, 1, 1, "lru")
    residency.plan(0, [0], [1], 1)
    residency.drop(0)
    residency.check_integrity()
    assert residency.plan(0, [1], [1], 1).loads[0].slot == 0


def test_a_shrink_keeps_what_the_policy_would_evict_last_and_moves_it_down() -> None:
    residency = Residency(1, 8, 4, 1, "lru")
    for expert in (0, 1, 2, 3, 0):
        _step(residency, 0, [expert])
    plan = residency.plan_shrink(2)
    assert plan == Shrink(2, evictions=(1, 2), moves=(Move(3, 3, 1),))
    assert residency.num_slots == 4, "only planned"
    residency.shrink(plan)
    residency.check_integrity()
    assert (residency.resident(), residency.num_slots, residency.num_free) == ([0, 3], 2, 0)
    assert residency.counts()[Count.EVICTIONS] == 2
    _step(residency, 0, [5])
    assert residency.resident() == [0, 5]
    residency.grow(3)
    assert residency.num_free == 1
    _step(residency, 0, [6])
    assert residency.resident() == [0, 5, 6]
    residency.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_shrink_gives_up_what_single_evictions_would(policy: str) -> None:
    """Slot by slot, a prefetch for the next pass takes the victims in the same order."""
    rng = np.random.default_rng(1)
    one, other = (Residency(3, 8, 12, 2, policy) for _ in range(2))
    for step in range(120):
        experts = (step % 3 * 8 + rng.choice(8, 2, replace=False)).tolist()
        _step(one, step % 3, experts)
        _step(other, step % 3, experts)
    absent = [expert for expert in range(24) if other.slot_of(expert) < 0]
    victims = []
    for expert in absent[:5]:
        before = set(other.resident())
        assert other.plan_prefetch(2, [expert], [1])
        victims += list(before - set(other.resident()))
        other.complete([expert])
    assert list(one.plan_shrink(7).evictions) == victims


def test_free_slots_are_given_up_before_anything_is_evicted_and_prefetches_count_as_wasted() -> None:
    residency = Residency(2, 4, 6, 1, "lru")
    _step(residency, 0, [0, 1])
    assert len(residency.plan_prefetch(0, [4], [1])) == 1
    residency.complete([4])
    assert residency.plan_shrink(3) == Shrink(3, (), ())
    residency.shrink(residency.plan_shrink(3))
    _step(residency, 1, [5])
    residency.shrink(residency.plan_shrink(1))
    assert residency.counts()[Count.PREFETCH_WASTED] == 1 and len(residency.resident()) == 1
    residency.check_integrity()


def test_nobody_gets_a_withheld_slot() -> None:
    residency = Residency(1, 8, 3, 1, "lru")
    _step(residency, 0, [0])
    (load,) = residency.plan(0, [1], [1], 1).loads
    residency.drop(1)
    residency.withhold(load.slot)
    for expert in (2, 3, 4):
        _step(residency, 0, [expert])
        assert residency.slot_of(expert) != load.slot
    residency.check_integrity()
    assert residency.plan_shrink(2).num_slots == 2
    residency.shrink(residency.plan_shrink(2))
    assert len(residency.resident()) == 1, "one of the two is withheld"
    residency.readmit(load.slot)
    _step(residency, 0, [5])
    assert residency.slot_of(5) == load.slot
    residency.check_integrity()


def test_fewer_than_one_slot_is_refused() -> None:
    with pytest.raises(BudgetError, match="at least 1"):
        Residency(1, 4, 0, 1, "lru")


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    num_slots=st.integers(1, 12),
    steps=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sets(st.integers(0, 5), min_size=1, max_size=6),
            st.lists(st.integers(0, 5), max_size=3, unique=True),
            st.booleans(),
            st.integers(0, 24),
        ),
        max_size=25,
    ),
)
def test_invariants_hold_under_any_schedule(
    policy: str, num_slots: int, steps: list[tuple[int, set[int], list[int], bool, int]]
) -> None:
    """Demands, prefetches that arrive or stay in flight, waves, slots that become fewer or more: the arrays never
    contradict each other, and what a shrink keeps is where its moves say."""
    residency = Residency(3, 6, num_slots, 2, policy)
    for layer, demand, ahead, lands, in_use in steps:
        if 1 <= in_use < residency.num_slots:
            residency.complete(residency.resident())
            plan, before = residency.plan_shrink(in_use), residency.resident()
            places = {expert: residency.slot_of(expert) for expert in set(before) - set(plan.evictions)}
            assert len(places) == min(len(before), in_use)
            residency.shrink(plan)
            places |= {move.expert: move.target for move in plan.moves}
            assert places == {expert: residency.slot_of(expert) for expert in residency.resident()}
        elif residency.num_slots < in_use <= 12:
            residency.grow(in_use)
        num_slots = residency.num_slots
        _step(residency, layer, [layer * 6 + expert for expert in sorted(demand)])
        wanted = [(layer + 1) % 3 * 6 + expert for expert in ahead]
        loads = residency.plan_prefetch(layer, wanted, [1] * len(wanted))
        assert len({load.slot for load in loads}) == len(loads)
        if lands:
            residency.complete(load.expert for load in loads)
        residency.check_integrity()
        assert len(residency.resident()) <= num_slots
    counts = residency.counts()
    assert counts[Count.LOOKUPS] == counts[Count.HITS] + counts[Count.IN_FLIGHT] + counts[Count.MISSES]
    loads_issued = counts[Count.MISSES] + counts[Count.PREFETCH_ISSUED]
    assert counts[Count.EVICTIONS] == loads_issued - len(residency.resident())
