"""Which expert is in which slot: lookup, leases, victim choice and bookkeeping as one compiled step over arrays.

The engine calls it once per layer, through `Residency.plan`; a replay of a trace makes the very same calls, so a
simulator built on this class cannot disagree with the engine. Nothing here reads a clock or touches a weight.

Life of a slot: `plan` decides a load and leases the expert → the transfer brings it → `complete` → compute → `release`.
A leased expert is never evicted. A load that failed is taken back with `drop`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from runtime.cache.policies import ALPHAS, LEARNING_RATE, ORACLE, POLICIES, SOURCE, Policy, often, score
from runtime.errors import BudgetError
from runtime.vocabulary import Load, LoadReason, Lookup, Plan

IntArray = npt.NDArray[np.int64]

_DEFERRED = 3  # beside the values of Lookup: no slot could be found


class Count(enum.IntEnum):
    """Index of a counter in `State.counts`."""

    LOOKUPS = 0
    HITS = 1
    IN_FLIGHT = 2
    MISSES = 3
    EVICTIONS = 4
    PREFETCH_ISSUED = 5
    PREFETCH_USED = 6
    PREFETCH_WASTED = 7
    LAYER_STEPS = 8
    WAVES = 9


class State(NamedTuple):
    """Arrays of the cache; per expert unless said otherwise."""

    slot_of: IntArray  # -1: not resident
    expert_in: IntArray  # per slot; -1: free
    ready: npt.NDArray[np.bool_]  # its bytes have arrived
    leases: IntArray
    prefetched: npt.NDArray[np.bool_]  # brought by a prefetch and not demanded since
    unwanted: npt.NDArray[np.bool_]  # prefetched for its layer's last turn, which did not demand it
    needed_at: IntArray  # layer step at which a forecast expects it; stale once that step has passed
    last_used: IntArray
    loaded_at: IntArray
    uses: IntArray
    fast: npt.NDArray[np.float64]
    medium: npt.NDArray[np.float64]
    slow: npt.NDArray[np.float64]
    soon: npt.NDArray[np.float64]
    rate: npt.NDArray[np.float64]  # share of the tokens of its layer's last turn that selected it
    follows: npt.NDArray[np.float32]  # [expert, index]: what `expert` now adds to P(index at the layer's next token)
    next_demand: IntArray  # layer step; only the oracle is told
    counts: IntArray  # per Count
    now: IntArray  # one element: the layer step that is running


def _new_state(num_experts: int, num_slots: int, prior: float, per_layer: int) -> State:
    def filled(value: float, dtype: Any, size: int = num_experts) -> npt.NDArray[Any]:
        return np.full(size, value, dtype)

    return State(
        slot_of=filled(-1, np.int64),
        expert_in=filled(-1, np.int64, num_slots),
        ready=filled(False, np.bool_),
        leases=filled(0, np.int64),
        prefetched=filled(False, np.bool_),
        unwanted=filled(False, np.bool_),
        needed_at=filled(-1, np.int64),
        last_used=filled(-1, np.int64),
        loaded_at=filled(-1, np.int64),
        uses=filled(0, np.int64),
        fast=filled(prior, np.float64),
        medium=filled(prior, np.float64),
        slow=filled(prior, np.float64),
        soon=filled(prior, np.float64),
        rate=filled(0.0, np.float64),
        follows=np.zeros((num_experts if per_layer else 0, per_layer), np.float32),
        next_demand=filled(0, np.int64),
        counts=filled(0, np.int64, len(Count)),
        now=filled(0, np.int64, 1),
    )


@njit
def _victim(state, policy, per_layer, layer, needed_by):  # type: ignore[no-untyped-def]
    """Slot to reuse: a free one, else the lowest (tier, score) among unleased residents; -1 when there is none.

    Tiers: 0 predicted but unwanted, 1 ordinary, 2 forecast for a step still to come. With `needed_by` >= 0 (a
    prefetch needed at that step), experts forecast for that step or sooner are not considered at all.
    """
    now, num_layers = state.now[0], state.slot_of.size // per_layer
    best, best_tier, best_score = -1, 3, 0.0
    for slot in range(state.expert_in.size):
        expert = state.expert_in[slot]
        if expert < 0:
            return slot
        if state.leases[expert] > 0:
            continue
        coming = state.needed_at[expert] > now
        if coming and needed_by >= 0 and state.needed_at[expert] <= needed_by:
            continue
        tier = 0 if state.unwanted[expert] else (2 if coming else 1)
        if tier > best_tier:
            continue
        distance = (expert // per_layer - layer - 1) % num_layers + 1
        value = score(
            policy, state.last_used[expert], state.loaded_at[expert], state.uses[expert],
            state.fast[expert], state.medium[expert], state.slow[expert], state.soon[expert],
            state.next_demand[expert], now, distance, num_layers,
        )  # fmt: skip
        if tier < best_tier or value < best_score:
            best, best_tier, best_score = slot, tier, value
    return best


@njit
def _assign(state, expert, slot):  # type: ignore[no-untyped-def]
    """Give `slot` to `expert`; its former expert is gone."""
    former = state.expert_in[slot]
    if former >= 0:
        state.slot_of[former] = -1
        state.ready[former] = False
        state.counts[4] += 1
        if state.prefetched[former]:
            state.counts[7] += 1
        state.prefetched[former] = False
        state.unwanted[former] = False
    state.expert_in[slot] = expert
    state.slot_of[expert] = slot
    state.loaded_at[expert] = state.now[0]


@njit
def _observe(state, per_layer, layer, demand, tokens, num_tokens, alphas):  # type: ignore[no-untyped-def]
    """Advance the layer's statistics by `num_tokens` tokens, `tokens[i]` of which chose `demand[i]`."""
    first, end = layer * per_layer, (layer + 1) * per_layer
    learns = state.follows.size > 0
    if learns:
        _learn(state, first, end, demand, tokens, num_tokens)
    keep_fast, keep_medium, keep_slow = (
        (1.0 - alphas[0]) ** num_tokens, (1.0 - alphas[1]) ** num_tokens, (1.0 - alphas[2]) ** num_tokens,
    )  # fmt: skip
    for expert in range(first, end):
        state.fast[expert] *= keep_fast
        state.medium[expert] *= keep_medium
        state.slow[expert] *= keep_slow
        state.rate[expert] = 0.0
        state.unwanted[expert] = state.prefetched[expert]
    for i in range(demand.size):
        expert, rate = demand[i], tokens[i] / num_tokens
        state.fast[expert] += (1.0 - keep_fast) * rate
        state.medium[expert] += (1.0 - keep_medium) * rate
        state.slow[expert] += (1.0 - keep_slow) * rate
        state.rate[expert] = rate
        state.uses[expert] += tokens[i]
        state.last_used[expert] = state.now[0]
        state.unwanted[expert] = False
        if state.prefetched[expert]:
            state.prefetched[expert] = False
            state.counts[6] += 1
    if learns:
        _foresee(state, first, end, demand)


@njit
def _learn(state, first, end, demand, tokens, num_tokens):  # type: ignore[no-untyped-def]
    """Correct what the experts of the layer's last turn said about this one: a step of gradient descent."""
    error = -state.soon[first:end]
    for i in range(demand.size):
        error[demand[i] - first] += tokens[i] / num_tokens
    for former in range(first, end):
        if state.rate[former] > 0.0:
            weight = LEARNING_RATE * state.rate[former]
            for index in range(end - first):
                state.follows[former, index] += weight * error[index]


@njit
def _foresee(state, first, end, demand):  # type: ignore[no-untyped-def]
    """P(selected by the layer's next token), given the experts that this one selected."""
    for expert in range(first, end):
        state.soon[expert] = often(state.fast[expert], state.medium[expert], state.slow[expert])
    for i in range(demand.size):
        for index in range(end - first):
            state.soon[first + index] += state.rate[demand[i]] * state.follows[demand[i], index]


def _compile(formulas: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """The compiled step and the compiled prefetch plan.

    Numba keeps compiled code on disk under the time stamp of the file that a function stands in and the values that it
    closes over, but not of what it calls. Closing over the policies' source makes an edited formula a new entry
    instead of a stale one.
    """

    @njit(cache=True)
    def step(state, policy, per_layer, layer, demand, tokens, num_tokens, alphas, first, kinds, slots):  # type: ignore[no-untyped-def]
        """One wave of a layer step: classify and lease every demanded expert, find slots for the missing ones."""
        len(formulas)
        if first:
            state.now[0] += 1
            state.counts[8] += 1
            _observe(state, per_layer, layer, demand, tokens, num_tokens, alphas)
        state.counts[9] += 1
        for i in range(demand.size):  # lease what is here before any victim is chosen
            expert = demand[i]
            slots[i] = state.slot_of[expert]
            kinds[i] = 0 if slots[i] < 0 else (2 if state.ready[expert] else 1)
            if slots[i] >= 0:
                state.leases[expert] += 1
            if first:
                state.counts[0] += 1
                state.counts[1 + 2 - kinds[i]] += 1
        for i in range(demand.size):
            if kinds[i] != 0:
                continue
            slot = _victim(state, policy, per_layer, layer, -1)
            if slot < 0:
                kinds[i] = 3
                continue
            _assign(state, demand[i], slot)
            state.leases[demand[i]] += 1
            slots[i] = slot

    @njit(cache=True)
    def prefetch(state, policy, per_layer, layer, wanted, steps_ahead, slots):  # type: ignore[no-untyped-def]
        """Slots for forecast experts, most urgent first; -1 where one is resident or nothing may be evicted for it."""
        len(formulas)
        now = state.now[0]
        for i in range(wanted.size):
            state.needed_at[wanted[i]] = now + steps_ahead[i]
        for i in range(wanted.size):
            slots[i] = -1
            if state.slot_of[wanted[i]] >= 0:
                continue
            slot = _victim(state, policy, per_layer, layer, now + steps_ahead[i])
            if slot < 0:
                continue
            _assign(state, wanted[i], slot)
            state.prefetched[wanted[i]] = True
            state.counts[5] += 1
            slots[i] = slot

    return step, prefetch


_step, _prefetch = _compile(SOURCE)


class Residency:
    """The slots of one pool: `num_slots` interchangeable places for the experts of `num_layers` equal layers.

    Args:
        num_layers, num_experts: MoE layers of the pool, experts per layer.
        num_slots: at least 1. A layer step that demands more experts than there are slots is served in waves.
        top_k: experts per token, the prior of the frequency estimates.
        policy: name of an eviction policy (`policies.POLICIES`), or "belady", which is told the future (`foretell`).

    Raises:
        BudgetError: fewer than one slot.
        KeyError: an unknown policy.
    """

    def __init__(self, num_layers: int, num_experts: int, num_slots: int, top_k: int, policy: str) -> None:
        if num_slots < 1:
            raise BudgetError(f"{num_slots} expert slots: at least 1 is needed; raise the memory limit or cache.slots")
        self.num_layers, self.num_experts, self.num_slots = num_layers, num_experts, num_slots
        self._policy = int({**POLICIES, ORACLE.name.lower(): ORACLE}[policy])
        per_layer = num_experts if self._policy == Policy.NEXT_USE else 0
        self._state = _new_state(num_layers * num_experts, num_slots, top_k / num_experts, per_layer)

    def plan(
        self, layer: int, demand: Sequence[int], tokens: Sequence[int], num_tokens: int, *, first: bool = True
    ) -> Plan:
        """Decide one wave of a layer step and lease the experts in it.

        Args:
            layer: index of the layer in this pool.
            demand: distinct experts (ids) that the layer's tokens chose; not empty.
            tokens: how many tokens chose each of them.
            num_tokens: tokens in this step.
            first: False for a further wave of the same step, which updates no statistics.
        """
        wanted, counts = np.array(demand, np.int64), np.array(tokens, np.int64)
        kinds, slots = np.empty_like(wanted), np.empty_like(wanted)
        _step(
            self._state, self._policy, self.num_experts, layer, wanted, counts, num_tokens, ALPHAS, first, kinds, slots
        )
        hits, in_flight, deferred, loads = [], [], [], []
        for expert, kind, slot in zip(demand, kinds.tolist(), slots.tolist(), strict=True):
            if kind == Lookup.HIT:
                hits.append(expert)
            elif kind == Lookup.IN_FLIGHT:
                in_flight.append(expert)
            elif kind == _DEFERRED:
                deferred.append(expert)
            else:
                loads.append(Load(expert, slot, LoadReason.DEMAND))
        return Plan(tuple(hits), tuple(in_flight), tuple(loads), tuple(deferred))

    def plan_prefetch(self, layer: int, wanted: Sequence[int], steps_ahead: Sequence[int]) -> tuple[Load, ...]:
        """Loads for experts that a forecast expects `steps_ahead[i]` (>= 1) layer steps after `layer`, most urgent
        first.

        A prefetch never evicts a leased expert, nor one that is forecast to be needed as soon or sooner.
        """
        experts = np.array(wanted, np.int64)
        slots = np.empty_like(experts)
        steps = np.array(steps_ahead, np.int64)
        _prefetch(self._state, self._policy, self.num_experts, layer, experts, steps, slots)
        placed = zip(wanted, slots.tolist(), strict=True)
        return tuple(Load(expert, slot, LoadReason.PREFETCH) for expert, slot in placed if slot >= 0)

    def foretell(self, experts: Sequence[int], next_demands: Sequence[int]) -> None:
        """Tell the oracle at which layer step, counted from 1 as `plan` counts them, each expert is demanded next."""
        self._state.next_demand[experts] = next_demands

    def is_loading(self, expert: int) -> bool:
        """True between the decision to load `expert` and its completion."""
        return bool(self._state.slot_of[expert] >= 0 and not self._state.ready[expert])

    def is_unused_prefetch(self, expert: int) -> bool:
        """True when a prefetch brought (or is bringing) `expert` and no layer has demanded it since."""
        return bool(self._state.prefetched[expert])

    def slot_of(self, expert: int) -> int:
        """Slot of a resident expert (arrived or not); -1 when it is not resident."""
        return int(self._state.slot_of[expert])

    def complete(self, experts: Iterable[int]) -> None:
        """The bytes of these resident experts have arrived."""
        for expert in experts:
            assert self._state.slot_of[expert] >= 0, f"expert {expert} completed without a slot"
            self._state.ready[expert] = True

    def release(self, experts: Iterable[int]) -> None:
        """Give back one lease of each; from now on they may be evicted."""
        for expert in experts:
            assert self._state.leases[expert] > 0, f"expert {expert} released without a lease"
            self._state.leases[expert] -= 1

    def drop(self, expert: int) -> None:
        """Forget a resident expert whose load failed or was abandoned; its slot is free, its leases are void."""
        state = self._state
        slot = state.slot_of[expert]
        assert slot >= 0, f"expert {expert} dropped without a slot"
        state.expert_in[slot] = -1
        state.slot_of[expert] = -1
        state.leases[expert] = 0
        for flags in (state.ready, state.prefetched, state.unwanted):
            flags[expert] = False

    def counts(self) -> dict[Count, int]:
        """Counters since the last `reset_counts`."""
        return {count: int(self._state.counts[count]) for count in Count}

    def reset_counts(self) -> None:
        """Set the counters to zero; the contents and the statistics that policies use stay."""
        self._state.counts[:] = 0

    def resident(self) -> list[int]:
        """Experts that hold a slot, arrived or not, in slot order."""
        return [int(expert) for expert in self._state.expert_in if expert >= 0]

    def check_integrity(self) -> None:
        """Raise AssertionError if the arrays contradict each other; used by tests and when idle."""
        state = self._state
        residents = np.flatnonzero(state.slot_of >= 0)
        assert len(set(state.slot_of[residents].tolist())) == residents.size, "two experts share a slot"
        assert np.array_equal(state.expert_in[state.slot_of[residents]], residents), "slot and expert disagree"
        assert int((state.expert_in >= 0).sum()) == residents.size, "a slot holds an expert that is not resident"
        absent = state.slot_of < 0
        for name in ("ready", "prefetched", "unwanted", "leases"):
            assert not getattr(state, name)[absent].any(), f"an absent expert is {name}"
        assert (state.leases >= 0).all(), "negative lease"
