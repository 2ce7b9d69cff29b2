"""Which expert is in which slot: lookup, leases, victim choice and bookkeeping as one compiled step over arrays.

The engine calls it once per layer, through `Residency.plan`; a replay of a trace makes the very same calls, so a
simulator built on this class cannot disagree with the engine. Nothing here reads a clock or touches a weight.

Life of a slot: `plan` decides a load and leases the expert → the transfer brings it → `complete` → compute → `release`.
A leased expert is never evicted. A load that failed is taken back with `drop`; a slot that something may still write
into is kept out of use with `withhold`. Between passes the slots in use become fewer with `plan_shrink` and `shrink`,
and more with `grow`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.cache import steps as compiled
from runtime.cache import timeline
from runtime.cache.policies import FORESEEING, ORACLE, POLICIES, TD_CONTEXT, Policy
from runtime.cache.steps import COMPUTED, DEFERRED, FREE, NOW, NUM_FREE, WITHHELD, Count, IntArray, flat, new_state
from runtime.cache.timeline import FloatArray, Link, Steps, Times
from runtime.errors import BudgetError
from runtime.vocabulary import Load, LoadReason, Lookup, Plan

__all__ = ["Count", "Move", "Residency", "Shrink", "next_demands"]

_CONTEXT = {Policy.NEXT_USE: 1, Policy.PROBABILISTIC_BELADY: 1, Policy.TD_NEXT_USE: TD_CONTEXT}
"""Layer steps whose experts a policy learns from, by policy; of the others none."""


class Move(NamedTuple):
    """The bytes of `expert` go from slot `source` to slot `target`, which holds nothing that is needed."""

    expert: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Shrink:
    """How to go on with the first `num_slots` slots: who goes, and who moves down from the slots that are given up."""

    num_slots: int
    evictions: tuple[int, ...]
    moves: tuple[Move, ...]


class Residency:
    """The slots of one pool: `num_slots` interchangeable places for the experts of `num_layers` equal layers.

    Args:
        num_layers, num_experts: MoE layers of the pool, experts per layer.
        num_slots: at least 1, in use from now on. A layer step that demands more experts than there are slots is
            served in waves.
        top_k: experts per token, the prior of the frequency estimates.
        policy: name of an eviction policy (`policies.POLICIES`), or "belady", for `replay` only.

    Attributes:
        foresees: the policy goes by forecasts; see `foresee`.
        withheld: slots that nobody may use; see `withhold`.

    Raises:
        BudgetError: fewer than one slot.
        KeyError: an unknown policy.
    """

    def __init__(self, num_layers: int, num_experts: int, num_slots: int, top_k: int, policy: str) -> None:
        if num_slots < 1:
            raise BudgetError(f"{num_slots} expert slots: at least 1 is needed; raise the memory limit or cache.slots")
        self.num_layers, self.num_experts, self.num_slots, self.top_k = num_layers, num_experts, num_slots, top_k
        self._policy = int(Policy.BELADY if policy == ORACLE else POLICIES[policy])
        context = min(_CONTEXT.get(Policy(self._policy), 0), num_layers)
        self._state = new_state(num_layers, num_experts, num_slots, top_k / num_experts, context=context)
        self._flat = flat(self._state)
        # Reading a field of records makes a new array each time.
        names = ("slot_of", "ready", "leases", "prefetched", "needed_at", "forecast", "share", "wait")
        self._slot_of, self._ready, self._leases, self._prefetched, self._needed_at, *of_forecast = (
            self._state.experts[name] for name in names
        )
        self._forecast, self._share, self._wait = of_forecast
        self._is_stale = self._state.layers["is_stale"]
        self.foresees = policy in FORESEEING
        self.withheld: set[int] = set()

    def plan(
        self,
        layer: int,
        demand: Sequence[int],
        tokens: Sequence[int],
        num_tokens: int,
        *,
        first: bool = True,
        most_loads: int | None = None,
        at_hand: Collection[int] = (),
    ) -> Plan:
        """Decide one wave of a layer step and lease the experts in it.

        Args:
            layer: index of the layer in this pool.
            demand: distinct experts (ids) that the layer's tokens chose; not empty.
            tokens: how many tokens chose each of them.
            num_tokens: tokens in this step.
            first: False for a further wave of the same step, which updates no statistics.
            most_loads: of the missing experts, load at most so many (or all that are not `at_hand`, if these are more):
                those most worth keeping. None: all.
            at_hand: experts that may be computed where they rest instead.
        """
        wanted, counts = np.array(demand, np.int64), np.array(tokens, np.int64)
        kinds, slots = np.empty_like(wanted), np.empty_like(wanted)
        if most_loads is not None:
            kinds[:] = [COMPUTED if expert in at_hand else Lookup.MISS for expert in demand]
        limit = -1 if most_loads is None else most_loads
        compiled.step(*self._flat, self._policy, layer, wanted, counts, num_tokens, first, limit, kinds, slots)
        hits, in_flight, deferred, loads, computed = [], [], [], [], []
        for expert, kind, slot in zip(demand, kinds.tolist(), slots.tolist(), strict=True):
            if kind == Lookup.HIT:
                hits.append(expert)
            elif kind == Lookup.IN_FLIGHT:
                in_flight.append(expert)
            elif kind == DEFERRED:
                deferred.append(expert)
            elif kind == COMPUTED:
                computed.append(expert)
            else:
                loads.append(Load(expert, slot, LoadReason.DEMAND))
        return Plan(tuple(hits), tuple(in_flight), tuple(loads), tuple(deferred), tuple(computed))

    def foresee(
        self,
        forecast: npt.NDArray[np.floating[Any]],
        first: int = 0,
        waits: npt.NDArray[np.floating[Any]] | None = None,
    ) -> None:
        """Tell the policy how many tokens are expected to choose each expert at its layer's next turn.

        Args:
            forecast: [layers, experts].
            first: of the layers before this one nothing is known.
            waits: [layers, experts], tokens until each expert's next use beyond its layer's next turn
                (`Predictor.waits`); None: not known.
        """
        if waits is not None:
            self._wait[:] = waits.reshape(-1)
        known = first * self.num_experts
        self._forecast[known:] = forecast[first:].reshape(-1)
        self._forecast[:known] = -1.0
        if self._policy == Policy.ACTIVATION:
            totals = forecast[first:].sum(axis=1, keepdims=True)
            self._share[known:] = (forecast[first:] / np.maximum(totals, 1e-9)).reshape(-1)
            self._share[:known] = -1.0
        self._is_stale[:] = True

    def plan_prefetch(self, layer: int, wanted: Sequence[int], steps_ahead: Sequence[int]) -> tuple[Load, ...]:
        """Loads for experts that a forecast expects `steps_ahead[i]` (>= 1) layer steps after `layer`, most urgent
        first.

        A prefetch never evicts a leased expert, nor one that is forecast to be needed as soon or sooner.
        """
        experts = np.array(wanted, np.int64)
        slots = np.empty_like(experts)
        steps = np.array(steps_ahead, np.int64)
        compiled.prefetch(*self._flat, self._policy, layer, experts, steps, slots)
        placed = zip(wanted, slots.tolist(), strict=True)
        return tuple(Load(expert, slot, LoadReason.PREFETCH) for expert, slot in placed if slot >= 0)

    def keep_for_pass(self, layer: int) -> None:
        """In a pass that needs nearly all experts: until the next layer step, those of the layers after `layer` go only
        where there is no other, and never for a prefetch of the layer after it (before the first layer there is no
        other: only its own are kept). Called before `layer` is planned."""
        first = (layer + 1) * self.num_experts
        self._needed_at[first:] = self._state.scalars[NOW] + 2
        self._is_stale[layer + 1 :] = True

    def plan_refresh(self, forecast: npt.NDArray[np.floating[Any]]) -> tuple[Load, ...]:
        """Loads, in execution order, after which the slots hold the experts with the most expected tokens (eMoE, arXiv
        2503.06823, section 3.3). Called between passes.

        Every layer keeps top_k experts, if there are slots for that: without them its tokens would have no substitute.

        Args:
            forecast: [layers, experts], expected tokens at each layer's next turn.
        """
        is_absent = self._slot_of.reshape(forecast.shape) < 0
        by_layer = np.lexsort((is_absent, -forecast), axis=1)
        rank = np.empty_like(by_layer)
        np.put_along_axis(rank, by_layer, np.arange(self.num_experts)[None], axis=1)
        is_spare = rank >= self.top_k
        best = np.lexsort((is_absent.ravel(), -forecast.ravel(), is_spare.ravel()))[: self.num_slots]
        wanted = np.sort(best[(forecast.ravel()[best] > 0) | ~is_spare.ravel()[best]])
        self._needed_at[:] = -1  # no earlier forecast protects what this one leaves out
        self._is_stale[:] = True
        return self.plan_prefetch(-1, wanted.tolist(), (wanted // self.num_experts + 1).tolist())

    def replay(self, layer_steps: Steps, times: Times, link: Link) -> FloatArray:
        """Run passes on a virtual clock: what the coordinator would do of them with a `SimulatedTransfer`.

        Args:
            link: goes on from where it is.

        Returns:
            [passes, 5]: when each pass ended; and, so far, seconds waited, seconds that the link was busy, loads that
            ended, and of these the cold ones.
        """
        return timeline.replay(self._flat, link, self._policy, layer_steps, times)

    def plan_shrink(self, num_slots: int) -> Shrink:
        """How to go on with the first `num_slots` slots (at least 1, at most those in use) and the experts most worth
        keeping, by the policy as it stands between two passes. Nothing is leased, and every resident has arrived.
        """
        assert 1 <= num_slots <= self.num_slots, f"{num_slots} of {self.num_slots} slots"
        residents = np.flatnonzero(self._slot_of >= 0)
        assert not self._leases.any() and self._ready[residents].all(), "slots are in use"
        tiers, scores = np.empty(self._slot_of.size, np.int64), np.empty(self._slot_of.size)
        compiled.appraise(*self._flat, self._policy, self.num_layers - 1, tiers, scores)
        slots = self._slot_of[residents]
        first_to_go = residents[np.lexsort((slots, scores[residents], tiers[residents]))]
        num_kept = min(residents.size, num_slots - sum(slot < num_slots for slot in self.withheld))
        evictions, kept = np.split(first_to_go, [residents.size - num_kept])
        staying = {int(slot) for slot in self._slot_of[kept]} | self.withheld
        targets = (slot for slot in range(num_slots) if slot not in staying)
        moving = sorted((int(self._slot_of[expert]), int(expert)) for expert in kept)
        moves = [Move(expert, slot, next(targets)) for slot, expert in moving if slot >= num_slots]
        return Shrink(num_slots, tuple(evictions.tolist()), tuple(moves))

    def shrink(self, plan: Shrink) -> None:
        """Note that `plan` was carried out."""
        for expert in plan.evictions:
            self._state.counts[Count.EVICTIONS] += 1
            self._state.counts[Count.PREFETCH_WASTED] += self._prefetched[expert]
            self.drop(expert)
        for expert, source, target in plan.moves:
            self._state.expert_in[[source, target]] = FREE, expert
            self._slot_of[expert] = target
        self._is_stale[:] = True  # among equals the slot decides
        self.withheld = {slot for slot in self.withheld if slot < plan.num_slots}
        self._use(self._state.expert_in[: plan.num_slots].copy())

    def grow(self, num_slots: int) -> None:
        """Use `num_slots` slots, at least as many as now; the new ones are free."""
        assert num_slots >= self.num_slots, f"{num_slots} slots are fewer than {self.num_slots}"
        self._use(np.append(self._state.expert_in, np.full(num_slots - self.num_slots, FREE)))

    def _use(self, expert_in: IntArray) -> None:
        self.num_slots = expert_in.size
        self._state = self._state._replace(expert_in=expert_in)
        self._state.scalars[NUM_FREE] = (expert_in == FREE).sum()
        self._flat = flat(self._state)

    def withhold(self, slot: int) -> None:
        """Keep a free slot out of use: something may still write into it."""
        assert self._state.expert_in[slot] == FREE, f"slot {slot} is not free"
        self._state.expert_in[slot] = WITHHELD
        self._state.scalars[NUM_FREE] -= 1
        self.withheld.add(slot)

    def readmit(self, slot: int) -> None:
        """Let a withheld slot be used again."""
        self.withheld.remove(slot)
        self._state.expert_in[slot] = FREE
        self._state.scalars[NUM_FREE] += 1

    @property
    def num_free(self) -> int:
        """Slots that are free."""
        return int(self._state.scalars[NUM_FREE])

    def present(self, layer: int) -> npt.NDArray[np.bool_]:
        """Which experts of a layer hold a slot, arrived or not: bool [experts], the caller's own."""
        present: npt.NDArray[np.bool_] = self._slot_of[layer * self.num_experts : (layer + 1) * self.num_experts] >= 0
        return present

    def count_substituted(self, num_routes: int) -> None:
        """So many choices of absent experts, one for each token and rank, were changed into present ones."""
        self._state.counts[Count.SUBSTITUTED] += num_routes

    def is_loading(self, expert: int) -> bool:
        """True between the decision to load `expert` and its completion."""
        return bool(self._slot_of[expert] >= 0 and not self._ready[expert])

    def is_ready(self, expert: int) -> bool:
        """True when `expert` has arrived in a slot."""
        return bool(self._ready[expert])

    def is_unused_prefetch(self, expert: int) -> bool:
        """True when a prefetch brought (or is bringing) `expert` and no layer has demanded it since."""
        return bool(self._prefetched[expert])

    def slot_of(self, expert: int) -> int:
        """Slot of a resident expert (arrived or not); -1 when it is not resident."""
        return int(self._slot_of[expert])

    def complete(self, experts: Iterable[int]) -> None:
        """The bytes of these resident experts have arrived."""
        for expert in experts:
            assert self._slot_of[expert] >= 0, f"expert {expert} completed without a slot"
            self._ready[expert] = True

    def release(self, experts: Iterable[int]) -> None:
        """Give back one lease of each; from now on they may be evicted."""
        for expert in experts:
            assert self._leases[expert] > 0, f"expert {expert} released without a lease"
            self._leases[expert] -= 1
            self._is_stale[expert // self.num_experts] = True

    def void_leases(self) -> None:
        """Nobody computes any more: end every lease, whoever took it."""
        self._leases[:] = 0
        self._is_stale[:] = True

    def drop(self, expert: int) -> None:
        """Forget a resident expert whose load failed or was abandoned; its slot is free, its leases are void."""
        state = self._state
        slot = self._slot_of[expert]
        assert slot >= 0, f"expert {expert} dropped without a slot"
        state.expert_in[slot] = FREE
        state.scalars[NUM_FREE] += 1
        self._slot_of[expert] = -1
        self._is_stale[expert // self.num_experts] = True
        self._leases[expert] = 0
        for flag in ("ready", "prefetched", "unwanted"):
            state.experts[flag][expert] = False

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
        residents = np.flatnonzero(self._slot_of >= 0)
        slots = self._slot_of[residents]
        assert len(set(slots.tolist())) == residents.size, "two experts share a slot"
        assert np.array_equal(state.expert_in[slots], residents), "slot and expert disagree"
        assert int((state.expert_in >= 0).sum()) == residents.size, "a slot holds an expert that is not resident"
        assert int(state.scalars[NUM_FREE]) == (state.expert_in == FREE).sum(), "the free slots are miscounted"
        assert set(np.flatnonzero(state.expert_in == WITHHELD).tolist()) == self.withheld, "withheld slots differ"
        assert state.expert_in.size == self.num_slots, "the slots are miscounted"
        absent = self._slot_of < 0
        for name in ("ready", "prefetched", "unwanted", "leases"):
            assert not state.experts[name][absent].any(), f"an absent expert is {name}"
        assert (self._leases >= 0).all(), "negative lease"


def next_demands(events: IntArray, demand: IntArray) -> IntArray:
    """The layer step (from 1) in which each entry of `demand` is demanded next; past the last one where never.

    Args:
        events, demand: as in `timeline.Steps`, of all layer steps.
    """
    step = np.repeat(np.arange(1, events.size), np.diff(events))
    order = np.lexsort((step, demand))
    again = demand[order][1:] == demand[order][:-1]
    future = np.full(demand.size, events.size)
    future[order[:-1][again]] = step[order[1:][again]]
    return future
