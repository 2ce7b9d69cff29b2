"""The compiled decisions of the cache: lookup, leases, victim choice and bookkeeping as one step over arrays.

`Residency` calls `step` once per layer for the engine; `replay` runs the very same code over a whole trace.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from runtime.cache.policies import LEARNING_RATE, SOURCE, often, score

IntArray = npt.NDArray[np.int64]

DEFERRED = 3  # beside the values of Lookup: no slot could be found


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


def new_state(num_experts: int, num_slots: int, prior: float, per_layer: int) -> State:
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


@njit
def _wave(state, policy, per_layer, layer, demand, tokens, num_tokens, alphas, first, kinds, slots):  # type: ignore[no-untyped-def]
    """One wave of a layer step: classify and lease every demanded expert, find slots for the missing ones."""
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


@njit
def _waves(state, policy, per_layer, layer, demand, tokens, num_tokens, alphas, kinds, slots):  # type: ignore[no-untyped-def]
    """A whole layer step in which every load arrives before the next wave; hits and loads of the step."""
    num_hits, num_loads = 0, 0
    first = True
    while demand.size > 0:
        _wave(state, policy, per_layer, layer, demand, tokens, num_tokens, alphas, first, kinds, slots)
        num_deferred = 0
        deferred = np.empty(demand.size, np.int64)
        for i in range(demand.size):
            if kinds[i] == 3:
                deferred[num_deferred] = demand[i]
                num_deferred += 1
                continue
            num_hits += kinds[i] == 2
            num_loads += kinds[i] == 0
            state.ready[demand[i]] = True
            state.leases[demand[i]] -= 1
        demand, first = deferred[:num_deferred], False
    return num_hits, num_loads


@njit
def _step_time(num_hits, num_loads, load_s, expert_s):  # type: ignore[no-untyped-def]
    """Seconds of a layer step, and of these waited: hits are computed first, then what has arrived, one link."""
    clock, stall, computed = num_hits * expert_s, 0.0, 0
    while computed < num_loads:
        arrived = num_loads if load_s == 0.0 else min(int(clock / load_s), num_loads)
        if arrived <= computed:
            arrived = computed + 1
            stall += arrived * load_s - clock
            clock = arrived * load_s
        clock += (arrived - computed) * expert_s
        computed = arrived
    return clock, stall


def _compile(formulas: str) -> tuple[Callable[..., None], Callable[..., None], Callable[..., tuple[float, float]]]:
    """The compiled step, the prefetch plan and the replay.

    Numba keeps compiled code on disk under the time stamp of the file that a function stands in and the values that it
    closes over, but not of what it calls. Closing over the policies' source makes an edited formula a new entry
    instead of a stale one.
    """

    @njit(cache=True)
    def step(state, policy, per_layer, layer, demand, tokens, num_tokens, alphas, first, kinds, slots):  # type: ignore[no-untyped-def]
        """See `_wave`."""
        len(formulas)
        _wave(state, policy, per_layer, layer, demand, tokens, num_tokens, alphas, first, kinds, slots)

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

    @njit(cache=True)
    def replay(state, policy, per_layer, events, num_tokens, demand, tokens, next_demands, alphas, times):  # type: ignore[no-untyped-def]
        """All layer steps of a trace, on demand only; see `Residency.replay`."""
        len(formulas)
        load_s, expert_s, layer_s = times
        elapsed, stall = 0.0, 0.0
        kinds, slots = np.empty(per_layer, np.int64), np.empty(per_layer, np.int64)
        num_layers = state.slot_of.size // per_layer
        for event in range(events.size - 1):
            start, end = events[event], events[event + 1]
            if next_demands.size > 0:
                for i in range(start, end):
                    state.next_demand[demand[i]] = next_demands[i]
            num_hits, num_loads = _waves(
                state, policy, per_layer, event % num_layers, demand[start:end], tokens[start:end],
                num_tokens[event // num_layers], alphas, kinds, slots,
            )  # fmt: skip
            busy, waited = _step_time(num_hits, num_loads, load_s, expert_s)
            elapsed += layer_s + busy
            stall += waited
        return elapsed, stall

    return step, prefetch, replay


step, prefetch, replay = _compile(SOURCE)
