"""The compiled decisions of the cache: lookup, leases, victim choice and bookkeeping as one step over arrays.

`Residency` calls `step` once per layer for the engine; `timeline.replay` runs the very same code over a whole trace.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from runtime.cache.policies import (
    ALPHAS,
    DISCOUNT,
    KEEPS_ORDER,
    LEARNING_RATE,
    SOURCE,
    TD_STEP,
    often,
    score,
    steady_worth,
)

IntArray = npt.NDArray[np.int64]

DEFERRED, COMPUTED = 3, 4  # beside the values of Lookup: no slot could be found; a miss that is computed in place
FREE, WITHHELD = -1, -2  # in `State.expert_in`, beside experts: nobody may use a withheld slot


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
    SUBSTITUTED = 10
    COMPUTED = 11


# Per expert. Records rather than an array a field: what a compiled function is handed costs time by the array.
EXPERT = np.dtype(
    [
        ("slot_of", np.int64),  # -1: not resident
        ("ready", np.bool_),  # its bytes have arrived
        ("leases", np.int64),
        ("prefetched", np.bool_),  # brought by a prefetch and not demanded since
        ("unwanted", np.bool_),  # prefetched for its layer's last turn, which did not demand it
        ("needed_at", np.int64),  # layer step at which a forecast expects it; stale once that step has passed
        ("last_used", np.int64),
        ("loaded_at", np.int64),
        ("uses", np.int64),
        ("fast", np.float64),
        ("medium", np.float64),
        ("slow", np.float64),
        ("soon", np.float64),
        ("rate", np.float64),  # share of the tokens of its layer's last turn that selected it
        ("rate_before", np.float64),  # of the turn before that
        ("next_demand", np.int64),  # layer step; only the oracle is told
        ("forecast", np.float64),  # expected tokens at the layer's next turn; -1: unknown
        ("share", np.float64),  # of its layer's forecasts; -1: unknown
        ("wait", np.float64),  # expected tokens, discounted, beyond the layer's next turn; -1: unknown
    ],
    align=True,
)
LAYER = np.dtype(
    [
        ("worst", np.int64),  # the resident that goes first, -1: none may; holds unless `is_stale`
        ("is_stale", np.bool_),
    ],
    align=True,
)
NOW, NUM_FREE = 0, 1  # in `State.scalars`: the layer step that is running; slots without an expert


class State(NamedTuple):
    """Arrays of the cache."""

    experts: npt.NDArray[np.void]  # records of EXPERT
    layers: npt.NDArray[np.void]  # records of LAYER
    expert_in: IntArray  # per slot; or FREE, or WITHHELD
    follows: npt.NDArray[np.float32]  # [expert, index]: what `expert` now adds to P(index at the layer's next token);
    # of `td_next_use` [layer steps ago * experts + expert, index]: to what the next use of index is worth
    counts: IntArray  # per Count
    scalars: IntArray


def new_state(num_layers: int, per_layer: int, num_slots: int, prior: float, *, context: int) -> State:
    """Empty slots for `num_layers` x `per_layer` experts; `context`: layer steps whose experts are learned from."""
    experts = np.zeros(num_layers * per_layer, EXPERT)
    for name in ("slot_of", "needed_at", "last_used", "loaded_at", "forecast", "share", "wait"):
        experts[name] = -1
    for name in ("fast", "medium", "slow", "soon"):
        experts[name] = prior
    layers = np.zeros(num_layers, LAYER)
    layers["is_stale"] = True
    scalars = np.zeros(2, np.int64)
    scalars[NUM_FREE] = num_slots
    return State(
        experts=experts,
        layers=layers,
        expert_in=np.full(num_slots, FREE),
        follows=np.zeros((context * experts.size, per_layer if context else 0), np.float32),
        counts=np.zeros(len(Count), np.int64),
        scalars=scalars,
    )


def flat(state: State) -> tuple[npt.NDArray[Any], ...]:
    """The arrays of `state` as compiled functions take them fastest: plain ones, one by one."""
    return (state.experts.view(np.uint8), state.layers.view(np.uint8), *state[2:])


@njit(inline="always")
def _tier_of(own, now):  # type: ignore[no-untyped-def]
    """Tiers of victims: 0 predicted but unwanted, 1 ordinary, 2 forecast for a step still to come."""
    return 0 if own.unwanted else (2 if own.needed_at > now else 1)


@njit(inline="always")
def _score_of(state, policy, layer, expert):  # type: ignore[no-untyped-def]
    """The policy's score of a resident after a step of `layer`."""
    own, num_layers = state.experts[expert], state.layers.size
    own_layer = expert // (state.experts.size // num_layers)
    return score(
        policy, own.last_used, own.loaded_at, own.uses, own.fast, own.medium, own.slow, own.soon, own.next_demand,
        own.forecast, own.share, own.wait, state.scalars[NOW], own_layer, (own_layer - layer - 1) % num_layers + 1,
        num_layers,
    )  # fmt: skip


@njit(inline="always")
def _goes_before(state, policy, layer, expert, needed_by, tier, value, slot):  # type: ignore[no-untyped-def]
    """Whether `expert` is a better victim than the best so far (its tier, 3: there is none, its score and slot); and
    the best of the two.

    With `needed_by` >= 0 (a prefetch needed at that step), experts forecast for that step or sooner are no victims.
    """
    now = state.scalars[NOW]
    own = state.experts[expert]
    own_tier = _tier_of(own, now)
    if own.slot_of < 0 or own.leases > 0 or own_tier > tier:
        return False, tier, value, slot
    if own.needed_at > now and needed_by >= 0 and own.needed_at <= needed_by:
        return False, tier, value, slot
    own_value = _score_of(state, policy, layer, expert)
    if own_tier < tier or own_value < value or (own_value == value and own.slot_of < slot):
        return True, own_tier, own_value, own.slot_of
    return False, tier, value, slot


@njit
def _worst_of(state, policy, layer, start, end, are_slots, needed_by):  # type: ignore[no-untyped-def]
    """The resident that goes first, of the experts (or of those in the slots) `start` to `end`; -1 when none may."""
    worst, tier, value, slot = -1, 3, np.inf, state.expert_in.size
    for one in range(start, end):
        expert = state.expert_in[one] if are_slots else one
        if expert >= 0 and state.experts[expert].slot_of >= 0:
            goes, tier, value, slot = _goes_before(state, policy, layer, expert, needed_by, tier, value, slot)
            if goes:
                worst = expert
    return worst


@njit
def _victim(state, policy, layer, needed_by):  # type: ignore[no-untyped-def]
    """Slot to reuse: a free one, else that of the lowest (tier, score, slot) among unleased residents; -1: none.

    Each layer's worst resident is remembered until something of its layer changes, so that a victim is chosen among
    as many candidates as there are layers. See `_goes_before` for `needed_by`.
    """
    if state.scalars[NUM_FREE] > 0:
        for slot in range(state.expert_in.size):
            if state.expert_in[slot] == FREE:
                return slot
    if not KEEPS_ORDER[policy]:
        worst = _worst_of(state, policy, layer, 0, state.expert_in.size, True, needed_by)
        return state.experts[worst].slot_of if worst >= 0 else -1
    per_layer = state.experts.size // state.layers.size
    best, tier, value, slot = -1, 3, np.inf, state.expert_in.size
    for own_layer in range(state.layers.size):
        own, start = state.layers[own_layer], own_layer * per_layer
        if own.is_stale:
            own.worst = _worst_of(state, policy, layer, start, start + per_layer, False, -1)
            own.is_stale = False
        worst = own.worst
        if worst >= 0 and needed_by >= 0 and state.experts[worst].needed_at > state.scalars[NOW]:
            # All of its layer are forecast for later: which of them a prefetch may take depends on when it is needed.
            worst = _worst_of(state, policy, layer, start, start + per_layer, False, needed_by)
        if worst >= 0:
            goes, tier, value, slot = _goes_before(state, policy, layer, worst, needed_by, tier, value, slot)
            if goes:
                best = slot
    return best


@njit
def _assign(state, expert, slot):  # type: ignore[no-untyped-def]
    """Give `slot` to `expert`; its former expert is gone."""
    former = state.expert_in[slot]
    if former < 0:
        state.scalars[NUM_FREE] -= 1
    else:
        state.layers[former // (state.experts.size // state.layers.size)].is_stale = True
        state.counts[4] += 1
        out = state.experts[former]
        if out.prefetched:
            state.counts[7] += 1
        out.slot_of = -1
        out.ready = out.prefetched = out.unwanted = False
    state.expert_in[slot] = expert
    state.experts[expert].slot_of = slot
    state.experts[expert].loaded_at = state.scalars[NOW]


@njit
def _observe(state, policy, layer, demand, tokens, num_tokens):  # type: ignore[no-untyped-def]
    """Advance the layer's statistics by `num_tokens` tokens, `tokens[i]` of which chose `demand[i]`."""
    per_layer = state.experts.size // state.layers.size
    first, end = layer * per_layer, (layer + 1) * per_layer
    learns_waits = policy == 10
    learns_next = state.follows.size > 0 and not learns_waits
    if learns_next:
        _learn(state, first, end, demand, tokens, num_tokens)
    keep_fast, keep_medium, keep_slow = (
        (1.0 - ALPHAS[0]) ** num_tokens, (1.0 - ALPHAS[1]) ** num_tokens, (1.0 - ALPHAS[2]) ** num_tokens,
    )  # fmt: skip
    for expert in range(first, end):
        one = state.experts[expert]
        one.fast *= keep_fast
        one.medium *= keep_medium
        one.slow *= keep_slow
        one.rate_before, one.rate = one.rate, 0.0
        one.unwanted = one.prefetched
    for i in range(demand.size):
        one, rate = state.experts[demand[i]], tokens[i] / num_tokens
        one.fast += (1.0 - keep_fast) * rate
        one.medium += (1.0 - keep_medium) * rate
        one.slow += (1.0 - keep_slow) * rate
        one.rate = rate
        one.uses += tokens[i]
        one.last_used = state.scalars[NOW]
        one.unwanted = False
        if one.prefetched:
            one.prefetched = False
            state.counts[6] += 1
    if learns_next:
        _foresee(state, first, end, demand)
    if learns_waits:
        _learn_waits(state, layer)


@njit
def _learn(state, first, end, demand, tokens, num_tokens):  # type: ignore[no-untyped-def]
    """Correct what the experts of the layer's last turn said about this one: a step of gradient descent."""
    error = np.empty(end - first)
    for index in range(end - first):
        error[index] = -state.experts[first + index].soon
    for i in range(demand.size):
        error[demand[i] - first] += tokens[i] / num_tokens
    for former in range(first, end):
        rate = state.experts[former].rate
        if rate > 0.0:
            for index in range(end - first):
                state.follows[former, index] += LEARNING_RATE * rate * error[index]


@njit
def _foresee(state, first, end, demand):  # type: ignore[no-untyped-def]
    """P(selected by the layer's next token), given the experts that this one selected."""
    soon = np.zeros(end - first)
    for i in range(demand.size):
        rate = state.experts[demand[i]].rate
        for index in range(end - first):
            soon[index] += rate * state.follows[demand[i], index]
    for index in range(end - first):
        one = state.experts[first + index]
        one.soon = often(one.fast, one.medium, one.slow) + soon[index]


@njit
def _learn_waits(state, layer):  # type: ignore[no-untyped-def]
    """Temporal differences (Sutton 1988) of G = E[DISCOUNT ** further tokens of waiting], what an expert's next use is
    worth: that of a steady expert, and what the experts of the last layer steps add. If the next token selects the
    expert, G was 1, else it was DISCOUNT times what it is then."""
    per_layer = state.experts.size // state.layers.size
    first = layer * per_layer
    said, error = _said_by_context(state, layer), np.empty(per_layer)
    for index in range(per_layer):
        own = state.experts[first + index]
        steady = steady_worth(own.fast, own.medium, own.slow)
        worth = min(max(steady + said[index], _MIN_OF_STEADY * steady), _MAX_WORTH)
        error[index] = 0.0
        if own.wait >= 0.0:
            error[index] = own.rate + (1.0 - own.rate) * DISCOUNT * worth - (1.0 - (1.0 - DISCOUNT) * own.wait)
        own.wait = (1.0 - worth) / (1.0 - DISCOUNT)
    _correct_context(state, layer, error)


_MIN_OF_STEADY, _MAX_WORTH = 0.1, 0.99  # a linear estimate has no bounds of its own


@njit
def _said_by_context(state, layer):  # type: ignore[no-untyped-def]
    """What the experts of the layer steps that just ran add to each expert of `layer`."""
    num_layers, num_experts = state.layers.size, state.experts.size
    per_layer = num_experts // num_layers
    said = np.zeros(per_layer)
    for ago in range(state.follows.shape[0] // num_experts):
        start = (layer - ago) % num_layers * per_layer
        for expert in range(start, start + per_layer):
            rate = state.experts[expert].rate
            if rate > 0.0:
                for index in range(per_layer):
                    said[index] += rate * state.follows[ago * num_experts + expert, index]
    return said


@njit
def _correct_context(state, layer, error):  # type: ignore[no-untyped-def]
    """Correct what was said when the layer ran before: a normalised step of gradient descent."""
    num_layers, num_experts = state.layers.size, state.experts.size
    per_layer, context = num_experts // num_layers, state.follows.shape[0] // num_experts
    norm = 0.0
    for ago in range(context):
        start = (layer - ago) % num_layers * per_layer
        for expert in range(start, start + per_layer):
            norm += state.experts[expert].rate_before ** 2
    if norm == 0.0:
        return
    for ago in range(context):
        start = (layer - ago) % num_layers * per_layer
        for expert in range(start, start + per_layer):
            rate = state.experts[expert].rate_before
            if rate > 0.0:
                for index in range(per_layer):
                    state.follows[ago * num_experts + expert, index] += TD_STEP / norm * rate * error[index]


@njit
def _choose_loads(state, policy, layer, demand, tokens, most_loads, kinds):  # type: ignore[no-untyped-def]
    """Of the missing experts that may be computed in place, make loads of those that are worth most, up to
    `most_loads` in all: by the policy's score, then by the tokens that chose them."""
    num_loads = 0
    for i in range(demand.size):
        num_loads += kinds[i] == 0
        state.counts[11] += kinds[i] == COMPUTED
    while num_loads < most_loads:
        best, value = -1, -np.inf
        for i in range(demand.size):
            if kinds[i] == COMPUTED:
                own = _score_of(state, policy, layer, demand[i])
                if best < 0 or own > value or (own == value and tokens[i] > tokens[best]):
                    best, value = i, own
        if best < 0:
            return
        kinds[best] = 0
        num_loads += 1
        state.counts[11] -= 1


@njit
def plan_wave(  # type: ignore[no-untyped-def]
    state, policy, layer, demand, tokens, num_tokens, first, most_loads, kinds, slots
):  # fmt: skip
    """One wave of a layer step: classify and lease every demanded expert, find slots for the missing ones.

    With `most_loads` >= 0, `kinds` says on entry which experts may be COMPUTED in place, should they be missing; so
    many are loaded at most as far as that goes, and the rest has neither slot nor lease.
    """
    if first:
        state.scalars[NOW] += 1
        state.counts[8] += 1
        _observe(state, policy, layer, demand, tokens, num_tokens)
    state.counts[9] += 1
    state.layers[layer].is_stale = True
    for i in range(demand.size):  # lease what is here before any victim is chosen
        expert = demand[i]
        may_compute = most_loads >= 0 and kinds[i] == COMPUTED
        slots[i] = state.experts[expert].slot_of
        kinds[i] = 0 if slots[i] < 0 else (2 if state.experts[expert].ready else 1)
        if slots[i] >= 0:
            state.experts[expert].leases += 1
        if first:
            state.counts[0] += 1
            state.counts[1 + 2 - kinds[i]] += 1
        if may_compute and slots[i] < 0:
            kinds[i] = COMPUTED
    if most_loads >= 0:
        _choose_loads(state, policy, layer, demand, tokens, most_loads, kinds)
    for i in range(demand.size):
        if kinds[i] != 0:
            continue
        slot = _victim(state, policy, layer, -1)
        if slot < 0:
            kinds[i] = DEFERRED
            continue
        _assign(state, demand[i], slot)
        state.experts[demand[i]].leases += 1
        slots[i] = slot


@njit
def plan_ahead(state, policy, layer, wanted, steps_ahead, slots):  # type: ignore[no-untyped-def]
    """Slots for forecast experts, most urgent first; -1 where one is resident or nothing may be evicted for it."""
    now, per_layer = state.scalars[NOW], state.experts.size // state.layers.size
    for i in range(wanted.size):
        state.experts[wanted[i]].needed_at = now + steps_ahead[i]
        state.layers[wanted[i] // per_layer].is_stale = True
    for i in range(wanted.size):
        slots[i] = -1
        if state.experts[wanted[i]].slot_of >= 0:
            continue
        slot = _victim(state, policy, layer, now + steps_ahead[i])
        if slot < 0:
            continue
        _assign(state, wanted[i], slot)
        state.layers[wanted[i] // per_layer].is_stale = True
        state.experts[wanted[i]].prefetched = True
        state.counts[5] += 1
        slots[i] = slot


def _compile(formulas: str) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """The compiled step, the prefetch plan and the worth of experts. The first arguments are `flat(state)`.

    Numba keeps compiled code on disk under the time stamp of the file that a function stands in and the values that it
    closes over, but not of what it calls. Closing over the policies' source makes an edited formula a new entry
    instead of a stale one.
    """

    @njit(cache=True)
    def step(  # type: ignore[no-untyped-def]
        experts, layers, expert_in, follows, counts, scalars,
        policy, layer, demand, tokens, num_tokens, first, most_loads, kinds, slots,
    ):  # fmt: skip
        """See `plan_wave`."""
        len(formulas)
        state = State(experts.view(EXPERT), layers.view(LAYER), expert_in, follows, counts, scalars)
        plan_wave(state, policy, layer, demand, tokens, num_tokens, first, most_loads, kinds, slots)

    @njit(cache=True)
    def prefetch(experts, layers, expert_in, follows, counts, scalars, policy, layer, wanted, steps_ahead, slots):  # type: ignore[no-untyped-def]
        """See `plan_ahead`."""
        len(formulas)
        state = State(experts.view(EXPERT), layers.view(LAYER), expert_in, follows, counts, scalars)
        plan_ahead(state, policy, layer, wanted, steps_ahead, slots)

    @njit(cache=True)
    def appraise(experts, layers, expert_in, follows, counts, scalars, policy, layer, tiers, scores):  # type: ignore[no-untyped-def]
        """Tier and score of every expert as a resident, [experts] each: the lowest (tier, score) goes first."""
        len(formulas)
        state = State(experts.view(EXPERT), layers.view(LAYER), expert_in, follows, counts, scalars)
        for expert in range(state.experts.size):
            tiers[expert] = _tier_of(state.experts[expert], state.scalars[NOW])
            scores[expert] = _score_of(state, policy, layer, expert)

    return step, prefetch, appraise


step, prefetch, appraise = _compile(SOURCE)
