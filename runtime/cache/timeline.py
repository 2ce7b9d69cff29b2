"""Layer steps on a virtual clock, compiled: the order of things of `Coordinator` and `SimulatedTransfer`, for whole
traces at once.

Lookup, victims and bookkeeping are `steps`, the engine's own. What stands here is when: which load the link performs
while what is computed, and so which experts have arrived when they are asked for. A test holds it to the coordinator.

Passes stream as those of a coordinator with `streams` where `Steps.stream_shares` are given (see `Streaming`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from runtime.cache import steps
from runtime.cache.policies import SOURCE
from runtime.cache.steps import DEFERRED, EXPERT, LAYER, NOW, IntArray, State, plan_ahead, plan_wave
from runtime.cache.streaming import STREAM_SHARE
from runtime.transfer.simulated import COLD_LOADS

FloatArray = npt.NDArray[np.float64]


class Steps(NamedTuple):
    """What the layer steps of some passes demand, and what is wanted ahead of them.

    Attributes:
        events: [steps + 1], where each layer step's part of `demand` begins; layers in turn from 0.
        demand: distinct experts (ids) of each step. tokens: how many tokens chose each of them.
        num_tokens: [passes], tokens in each pass.
        future: what `next_demands` says of them, which only the oracle needs; empty otherwise.
        wanted_starts: [passes * (layers + 1) + 1], where each step's part of `wanted` begins; the first of every pass
            is asked for before its first layer. Empty: nothing is prefetched.
        wanted: experts (ids) to have ready, most urgent first. steps_ahead: layers until each is needed.
        reads_hidden: what is wanted is forecast from hidden states, which a pass that streams does not look at.
        stream_shares: [passes], of a layer's experts the share that each pass is expected to need
            (`streaming.expected_share`). Empty: no pass streams.
    """

    events: IntArray
    demand: IntArray
    tokens: IntArray
    num_tokens: IntArray
    future: IntArray = np.zeros(0, np.int64)
    wanted_starts: IntArray = np.zeros(0, np.int64)
    wanted: IntArray = np.zeros(0, np.int64)
    steps_ahead: IntArray = np.zeros(0, np.int64)
    reads_hidden: bool = False
    stream_shares: FloatArray = np.zeros(0)


class Times(NamedTuple):
    """What things take, in seconds of virtual time.

    Attributes:
        load_s: the link is busy with one expert. cold_s: and longer with each of the first `COLD_LOADS` after it idled.
        slowdown: computing takes that much longer while it is busy.
        pass_s: [passes], the end of a pass. layer_s: [passes], a layer step up to its experts.
        ahead_s: [passes], forecasting at a layer step, its demand loads being under way already.
        expert_s: like `Steps.demand`, computing that expert.
    """

    load_s: float
    cold_s: float
    slowdown: float
    pass_s: FloatArray
    layer_s: FloatArray
    ahead_s: FloatArray
    expert_s: FloatArray


# Of each pass: when it ended; the totals so far of seconds waited, seconds that the link was busy, loads that ended,
# and of these the cold ones.
NOW_S, STALL_S, BUSY_S, NUM_LOADS, NUM_COLD = 0, 1, 2, 3, 4

_END_S, _TAKES_S = 5, 6  # in `Link.clock` after these: when the load under way ends, and how long it takes
_FREE = -1  # in `Link.current`: no load is under way
_DEMAND, _PREFETCH = 0, 1  # the queues
_NONE = -1


class Link(NamedTuple):
    """One link and its queues. A load is known by its slot and its ticket; one whose ticket has gone was cancelled."""

    clock: FloatArray
    current: IntArray  # the slot that is being filled, tickets given out so far, loads begun since the link was idle
    ticket: IntArray  # per slot, of the load that is queued for it, odd for one in _PREFETCH; _NONE: none is
    arrived: npt.NDArray[np.bool_]  # per slot: its last load has ended
    ends: IntArray  # [queue, first and one past the last]
    queue: IntArray  # [queue, place, slot and ticket]

    @property
    def is_busy(self) -> bool:
        """A load is under way."""
        return bool(self.current[0] != _FREE)


def new_link(num_slots: int) -> Link:
    """An idle link at time 0."""
    return Link(
        clock=np.zeros(7),
        current=np.array([_FREE, 0, 0]),
        ticket=np.full(num_slots, _NONE),
        arrived=np.zeros(num_slots, np.bool_),
        ends=np.zeros((2, 2), np.int64),
        queue=np.zeros((2, 4 * num_slots + 64, 2), np.int64),
    )


class Stream(NamedTuple):
    """What `Streaming` and `LayerStream` keep of the running pass."""

    counts: IntArray
    experts: IntArray  # [_LACKED or _WAITING, experts of a layer]


# In `Stream.counts`: passes may stream, this one is expected to, it has; what `Streaming.saw`; the layer that _LACKED
# is about, or _NONE; how many are _WAITING.
_IS_USED, _IS_EXPECTED, _HAS_RUN, _NUM_LACKED, _NUM_NEEDED, _OF_LAYER, _NUM_WAITING = 0, 1, 2, 3, 4, 5, 6
_LACKED, _WAITING = 0, 1  # whether the layer lacked an expert; those of the next layer that have no slot yet


@njit
def _put(link, slot, queue):  # type: ignore[no-untyped-def]
    """Queue a load for `slot`; one that was queued for it is cancelled."""
    if link.ends[queue, 1] == link.queue.shape[1]:
        kept = 0
        for place in range(link.ends[queue, 0], link.ends[queue, 1]):
            if link.ticket[link.queue[queue, place, 0]] == link.queue[queue, place, 1]:
                link.queue[queue, kept] = link.queue[queue, place]
                kept += 1
        link.ends[queue, 0], link.ends[queue, 1] = 0, kept
    link.current[1] += 1
    link.ticket[slot] = 2 * link.current[1] + queue
    link.arrived[slot] = False
    place = link.ends[queue, 1]
    link.queue[queue, place, 0], link.queue[queue, place, 1] = slot, link.ticket[slot]
    link.ends[queue, 1] += 1


@njit
def _start_next(link, link_s):  # type: ignore[no-untyped-def]
    """Begin the next load, demand first; at the end of the one before it, or now where the link was idle."""
    at_s = link.clock[_END_S]
    if link.current[0] == _FREE:
        at_s = max(link.clock[NOW_S], at_s)
        link.current[2] = 0
    link.current[0] = _FREE
    for queue in range(2):
        while link.ends[queue, 0] < link.ends[queue, 1]:
            place = link.ends[queue, 0]
            link.ends[queue, 0] += 1
            slot = link.queue[queue, place, 0]
            if link.ticket[slot] == link.queue[queue, place, 1]:
                link.ticket[slot] = _NONE
                link.current[0] = slot
                link.current[2] += 1
                link.clock[_TAKES_S] = link_s[0] + (link_s[1] if link.current[2] <= COLD_LOADS else 0.0)
                link.clock[_END_S] = at_s + link.clock[_TAKES_S]
                return


@njit
def _end_current(link, link_s):  # type: ignore[no-untyped-def]
    link.clock[NOW_S] = max(link.clock[NOW_S], link.clock[_END_S])
    link.clock[BUSY_S] += link.clock[_TAKES_S]
    link.clock[NUM_LOADS] += 1
    link.clock[NUM_COLD] += link.current[2] <= COLD_LOADS
    slot = link.current[0]
    if link.ticket[slot] == _NONE:
        link.arrived[slot] = True
    _start_next(link, link_s)


@njit
def _advance(link, seconds, link_s, slowdown):  # type: ignore[no-untyped-def]
    """Compute for `seconds` while the link goes on, for longer where it is busy."""
    stretch = 1.0 + slowdown
    until_s = link.clock[NOW_S] + (seconds if link.current[0] == _FREE else seconds * stretch)
    while link.current[0] != _FREE and link.clock[_END_S] <= until_s:
        ended_s = link.clock[_END_S]
        _end_current(link, link_s)
        if link.current[0] == _FREE and stretch > 1.0:
            until_s = ended_s + (until_s - ended_s) / stretch
    link.clock[NOW_S] = until_s


@njit
def _act(state, link, demand, kinds, slots, link_s):  # type: ignore[no-untyped-def]
    """Submit the loads of a wave, and let what is coming already overtake the prefetches."""
    for i in range(demand.size):
        if kinds[i] == 0:
            _put(link, slots[i], _DEMAND)
    if link.current[0] == _FREE:
        _start_next(link, link_s)
    for i in range(demand.size):
        if kinds[i] == 1 and link.ticket[slots[i]] != _NONE and link.ticket[slots[i]] % 2 == _PREFETCH:
            _put(link, slots[i], _DEMAND)


@njit
def _load_ahead(state, link, policy, layer, wanted, steps_ahead, num_wanted, link_s):  # type: ignore[no-untyped-def]
    """Prefetch what is wanted as far as there are slots; how much of it, moved to the front, still waits for one."""
    slots = np.empty(num_wanted, np.int64)
    plan_ahead(state, policy, layer, wanted[:num_wanted], steps_ahead[:num_wanted], slots)
    for i in range(num_wanted):
        if slots[i] >= 0:
            _put(link, slots[i], _PREFETCH)
    if link.current[0] == _FREE:
        _start_next(link, link_s)
    num_left = 0
    for i in range(num_wanted):
        if state.experts[wanted[i]].slot_of < 0:
            wanted[num_left], steps_ahead[num_left] = wanted[i], steps_ahead[i]
            num_left += 1
    return num_left


@njit
def _is_on(stream):  # type: ignore[no-untyped-def]
    """See `Streaming.is_on`."""
    num_lacked = stream.counts[_NUM_LACKED]
    if num_lacked == 0:
        return stream.counts[_IS_EXPECTED] == 1
    return stream.counts[_NUM_NEEDED] / num_lacked >= STREAM_SHARE


@njit
def _keep_for_pass(state, stream, layer):  # type: ignore[no-untyped-def]
    """The pass streams: see `Residency.keep_for_pass`."""
    stream.counts[_HAS_RUN] = 1
    per_layer = state.experts.size // state.layers.size
    for expert in range((layer + 1) * per_layer, state.experts.size):
        state.experts[expert].needed_at = state.scalars[NOW] + 2
    for later in range(layer + 1, state.layers.size):
        state.layers[later].is_stale = True


@njit
def _begin_stream(state, stream, share):  # type: ignore[no-untyped-def]
    """See `LayerStream.begin`."""
    stream.counts[:] = 0
    stream.counts[_IS_USED], stream.counts[_IS_EXPECTED], stream.counts[_OF_LAYER] = 1, share >= STREAM_SHARE, _NONE
    if _is_on(stream):
        _keep_for_pass(state, stream, -1)


@njit
def _routed(state, stream, layer, demand):  # type: ignore[no-untyped-def]
    """See `LayerStream.routed`."""
    per_layer = state.experts.size // state.layers.size
    first = layer * per_layer
    for index in range(per_layer):
        if stream.counts[_OF_LAYER] != layer:
            stream.experts[_LACKED, index] = state.experts[first + index].slot_of < 0
        stream.counts[_NUM_LACKED] += stream.experts[_LACKED, index]
    for i in range(demand.size):
        stream.counts[_NUM_NEEDED] += stream.experts[_LACKED, demand[i] - first]
    stream.counts[_OF_LAYER], stream.counts[_NUM_WAITING] = _NONE, 0
    if _is_on(stream):
        _keep_for_pass(state, stream, layer)


@njit
def _stream_next(state, link, policy, layer, stream, is_full, link_s):  # type: ignore[no-untyped-def]
    """See `LayerStream.load_next`."""
    if layer + 1 == state.layers.size:
        return
    per_layer, num_lacked = state.experts.size // state.layers.size, 0
    first = (layer + 1) * per_layer
    for index in range(per_layer):
        stream.experts[_LACKED, index] = state.experts[first + index].slot_of < 0
        stream.experts[_WAITING, index] = first + index
        num_lacked += stream.experts[_LACKED, index]
    stream.counts[_OF_LAYER], stream.counts[_NUM_WAITING] = layer + 1, per_layer
    if not is_full and num_lacked > 0:
        _stream(state, link, policy, layer, stream, per_layer, link_s)
    num_left = 0
    for index in range(per_layer):
        if state.experts[first + index].slot_of < 0:
            stream.experts[_WAITING, num_left] = first + index
            num_left += 1
    stream.counts[_NUM_WAITING] = num_left


@njit
def _stream(state, link, policy, layer, stream, most, link_s):  # type: ignore[no-untyped-def]
    """See `LayerStream.load`."""
    num_waiting = stream.counts[_NUM_WAITING]
    num_wanted = min(most, num_waiting)
    slots = np.empty(num_wanted, np.int64)
    plan_ahead(state, policy, layer, stream.experts[_WAITING, :num_wanted], np.ones(num_wanted, np.int64), slots)
    num_left = 0
    for i in range(num_waiting):
        if i < num_wanted and slots[i] >= 0:
            _put(link, slots[i], _DEMAND)
        else:
            stream.experts[_WAITING, num_left] = stream.experts[_WAITING, i]
            num_left += 1
    stream.counts[_NUM_WAITING] = num_left
    if link.current[0] == _FREE:
        _start_next(link, link_s)


@njit
def _compute(state, link, layer, demand, is_in, expert_s, link_s, slowdown):  # type: ignore[no-untyped-def]
    """Compute the experts that `is_in` names, then give back their leases."""
    seconds = 0.0
    for i in range(demand.size):
        if is_in[i]:
            seconds += expert_s[i]
    _advance(link, seconds, link_s, slowdown)
    for i in range(demand.size):
        if is_in[i]:
            state.experts[demand[i]].leases -= 1
    state.layers[layer].is_stale = True


@njit
def _arrivals(  # type: ignore[no-untyped-def]
    state, link, policy, layer, demand, scratch, expert_s, wanted, steps_ahead, num_wanted, link_s, slowdown
):  # fmt: skip
    """Compute one wave as its experts are ready; what still waits to be prefetched."""
    kinds, slots, is_in = scratch
    num_awaited, num_hits = 0, 0
    for i in range(demand.size):
        is_in[i] = kinds[i] == 2
        num_hits += is_in[i]
        num_awaited += kinds[i] < 2
    if num_hits > 0:
        _compute(state, link, layer, demand, is_in, expert_s, link_s, slowdown)
        if num_wanted > 0:
            num_wanted = _load_ahead(state, link, policy, layer, wanted, steps_ahead, num_wanted, link_s)
    while num_awaited > 0:
        began_s, num_arrived = link.clock[NOW_S], 0
        while True:
            for i in range(demand.size):
                is_in[i] = kinds[i] < 2 and link.arrived[slots[i]]
                num_arrived += is_in[i]
            if num_arrived > 0:
                break
            _end_current(link, link_s)
        link.clock[STALL_S] += link.clock[NOW_S] - began_s
        for i in range(demand.size):
            if is_in[i]:
                state.experts[demand[i]].ready = True
                kinds[i] = 2
        num_awaited -= num_arrived
        _compute(state, link, layer, demand, is_in, expert_s, link_s, slowdown)
        if num_wanted > 0:
            num_wanted = _load_ahead(state, link, policy, layer, wanted, steps_ahead, num_wanted, link_s)
    return num_wanted


@njit
def _await_in_turn(  # type: ignore[no-untyped-def]
    state, link, demand, slots, ready, num_ready, awaited, num_awaited, is_ordered, link_s
):  # fmt: skip
    """Append to the places in `ready` those of the `awaited` that have arrived, one at least, or, `is_ordered`, the
    first; how many are in either now."""
    began_s, num_before, num_asked = link.clock[NOW_S], num_ready, 1 if is_ordered else num_awaited
    while True:
        num_left = 0
        for turn in range(num_awaited):
            i = awaited[turn]
            if turn < num_asked and link.arrived[slots[i]]:
                state.experts[demand[i]].ready = True
                ready[num_ready] = i
                num_ready += 1
            else:
                awaited[num_left] = i
                num_left += 1
        if num_ready > num_before:
            break
        _end_current(link, link_s)
    link.clock[STALL_S] += link.clock[NOW_S] - began_s
    return num_ready, num_left


@njit
def _is_ring(stream, kinds, num_experts, is_on):  # type: ignore[no-untyped-def]
    """See `Coordinator._is_ring`."""
    for i in range(num_experts):
        if kinds[i] == DEFERRED or (is_on and kinds[i] != 2):
            return True
    return stream.counts[_NUM_WAITING] > 0


@njit
def _ring(  # type: ignore[no-untyped-def]
    state, link, policy, layer, demand, tokens, num_tokens, stream, scratch, wanted, steps_ahead, num_wanted, expert_s,
    link_s, slowdown,
):  # fmt: skip
    """Compute a layer step one expert at a time, each of whose slots goes to the next load."""
    kinds, slots, _ = scratch
    size = demand.size
    ready, awaited, deferred = np.empty(size, np.int64), np.empty(size, np.int64), _deferred(kinds, size)
    num_ready = _append(ready, 0, kinds, size, 2)
    num_awaited = _append(awaited, _append(awaited, 0, kinds, size, 1), kinds, size, 0)
    is_ordered, num_placed = _is_on(stream), 0
    for turn in range(size):
        if turn == num_ready:
            num_ready, num_awaited = _await_in_turn(
                state, link, demand, slots, ready, num_ready, awaited, num_awaited, is_ordered, link_s
            )
        i = ready[turn]
        _advance(link, expert_s[i], link_s, slowdown)
        state.experts[demand[i]].leases -= 1
        state.layers[layer].is_stale = True
        if num_placed < deferred.size:
            j = deferred[num_placed]
            one = slice(j, j + 1)
            plan_wave(state, policy, layer, demand[one], tokens[one], num_tokens, False, -1, kinds[one], slots[one])
            if kinds[j] != DEFERRED:
                _act(state, link, demand[one], kinds[one], slots[one], link_s)
                num_placed += 1
                awaited[num_awaited] = j
                num_awaited += 1
        elif stream.counts[_NUM_WAITING] > 0:
            _stream(state, link, policy, layer, stream, 1, link_s)
        elif num_wanted > 0:
            num_wanted = _load_ahead(state, link, policy, layer, wanted, steps_ahead, num_wanted, link_s)


@njit
def _layer_step(  # type: ignore[no-untyped-def]
    state, link, policy, layer, demand, tokens, num_tokens, stream, scratch, wanted, steps_ahead, looks_ahead, ahead_s,
    expert_s, link_s, slowdown,
):  # fmt: skip
    """`Coordinator.serve` and the computing of what it yields."""
    kinds, slots, _ = scratch
    for i in range(demand.size):
        slot = state.experts[demand[i]].slot_of
        if slot >= 0 and link.arrived[slot]:
            state.experts[demand[i]].ready = True
    if stream.counts[_IS_USED]:
        _routed(state, stream, layer, demand)
    plan_wave(state, policy, layer, demand, tokens, num_tokens, True, -1, kinds, slots)
    _act(state, link, demand, kinds, slots, link_s)
    num_wanted = wanted.size
    if looks_ahead or stream.counts[_HAS_RUN] == 0:
        _advance(link, ahead_s, link_s, slowdown)
    else:
        num_wanted = 0
    deferred, is_on = _deferred(kinds, demand.size), _is_on(stream)
    if is_on:
        num_wanted = 0
        _stream_next(state, link, policy, layer, stream, deferred.size > 0, link_s)
    elif num_wanted > 0:
        num_wanted = _load_ahead(state, link, policy, layer, wanted, steps_ahead, num_wanted, link_s)
    if stream.counts[_IS_USED] and _is_ring(stream, kinds, demand.size, is_on):
        _ring(
            state, link, policy, layer, demand, tokens, num_tokens, stream, scratch, wanted, steps_ahead, num_wanted,
            expert_s, link_s, slowdown,
        )  # fmt: skip
        return
    while True:
        num_wanted = _arrivals(
            state, link, policy, layer, demand, scratch, expert_s, wanted, steps_ahead, num_wanted, link_s, slowdown
        )
        if deferred.size == 0:
            return
        demand, expert_s = demand[deferred], expert_s[deferred]
        plan_wave(state, policy, layer, demand, tokens[: demand.size], num_tokens, False, -1, kinds, slots)
        _act(state, link, demand, kinds, slots, link_s)
        deferred = _deferred(kinds, demand.size)


@njit
def _deferred(kinds, num_experts):  # type: ignore[no-untyped-def]
    """Places of the experts that found no slot."""
    places = np.empty(num_experts, np.int64)
    return places[: _append(places, 0, kinds, num_experts, DEFERRED)]


@njit
def _append(places, num, kinds, num_experts, kind):  # type: ignore[no-untyped-def]
    """Append the places of the experts of a kind to the first `num` of `places`; how many there are now."""
    for i in range(num_experts):
        if kinds[i] == kind:
            places[num] = i
            num += 1
    return num


def _compile(sources: str) -> Callable[..., FloatArray]:
    """See `steps._compile`."""

    @njit(cache=True)
    def compiled(  # type: ignore[no-untyped-def]
        experts, layers, expert_in, follows, counts, scalars, clock, current, ticket, arrived, ends, queue, policy,
        events, demand, tokens, num_tokens, future, wanted_starts, wanted, steps_ahead, reads_hidden,
        stream_shares, load_s, cold_s, slowdown, pass_s, layer_s, ahead_s, expert_s,
    ):  # fmt: skip
        """See `replay`."""
        len(sources)
        state = State(experts.view(EXPERT), layers.view(LAYER), expert_in, follows, counts, scalars)
        link = Link(clock, current, ticket, arrived, ends, queue)
        num_layers = state.layers.size
        out = np.empty((num_tokens.size, 5))
        link_s = (load_s, cold_s)
        nothing = np.zeros(0, np.int64)
        per_layer = state.experts.size // num_layers
        scratch = np.empty(per_layer, np.int64), np.empty(per_layer, np.int64), np.empty(per_layer, np.bool_)
        stream = Stream(np.zeros(7, np.int64), np.zeros((2, per_layer), np.int64))
        for number in range(num_tokens.size):
            if stream_shares.size > 0:
                _begin_stream(state, stream, stream_shares[number])
            for turn in range(num_layers + 1):
                ask = number * (num_layers + 1) + turn
                goal, ahead = nothing, nothing
                if wanted_starts.size > 0 and wanted_starts[ask] < wanted_starts[ask + 1]:
                    # Copies: what is left of them is moved to the front.
                    goal = wanted[wanted_starts[ask] : wanted_starts[ask + 1]].copy()
                    ahead = steps_ahead[wanted_starts[ask] : wanted_starts[ask + 1]].copy()
                if turn == 0:
                    if _is_on(stream):
                        _stream_next(state, link, policy, -1, stream, False, link_s)
                    elif goal.size > 0:
                        _load_ahead(state, link, policy, -1, goal, ahead, goal.size, link_s)
                    continue
                event = number * num_layers + turn - 1
                start, end = events[event], events[event + 1]
                for i in range(start, min(end, future.size)):
                    state.experts[demand[i]].next_demand = future[i]
                _advance(link, layer_s[number], link_s, slowdown)
                _layer_step(
                    state, link, policy, turn - 1, demand[start:end], tokens[start:end], num_tokens[number], stream,
                    scratch, goal, ahead, not reads_hidden, ahead_s[number], expert_s[start:end], link_s, slowdown,
                )  # fmt: skip
            _advance(link, pass_s[number], link_s, slowdown)
            out[number] = clock[:5]
            if current[0] != _FREE:  # the load under way counts as far as it has come
                out[number, BUSY_S] += clock[_TAKES_S] - (clock[_END_S] - clock[NOW_S])
        return out

    return compiled


_compiled = _compile(f"{COLD_LOADS} {STREAM_SHARE} {SOURCE}{Path(steps.__file__).read_text(encoding='utf-8')}")


def replay(
    state: tuple[npt.NDArray[Any], ...], link: Link, policy: int, layer_steps: Steps, times: Times
) -> FloatArray:
    """Run passes one after the other on `state` (`steps.flat`) and `link`, which both go on from where they are.

    Returns:
        [passes, 5], see `NOW_S` and its neighbours.
    """
    return _compiled(*state, *link, policy, *layer_steps, *times)
