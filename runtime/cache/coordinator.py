"""The layer step: from what the router chose to experts that are ready to compute, in the order in which they
arrive."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import suppress
from typing import Any

from runtime.cache.governor import Governor, Reading
from runtime.cache.miss import Misses
from runtime.cache.prefetch import Prefetch
from runtime.cache.residency import Count, Residency
from runtime.cache.streaming import LayerStream
from runtime.errors import TransferError
from runtime.predictors.base import BEFORE_FIRST_LAYER, Observation, Predictor
from runtime.transfer.base import Transfer
from runtime.vocabulary import Load, LoadReason, Pass, Plan

_NO_SLOT = "no expert slot is left: reads into them have not returned; check the disk"


class Coordinator:
    """Drives residency and transfer for one pool of layers. One thread at a time.

    Args:
        residency: decides. transfer: acts. predictor: forecasts.
        governor: says how many layers ahead are prefetched for.
        prefetch_count: experts per token and layer that are prefetched at most.
        predict_every: decode steps for which a forecast is reused.
        refreshes: before a pass, the slots are given to the experts that its forecast names, as far as there is one.
            For an engine that does not load what it misses.
        streams: a pass that needs most experts loads whole layers ahead of their routers (see `Streaming`), and a layer
            that has more experts than there are slots is served as a ring: each expert that has been computed hands its
            slot to the next load at once. For a device that computes in the order in which it is told, without waiting.
        needed_loads: where given, every load that the run needed is appended, in the order in which it was needed:
            demand loads, and prefetches at their first use.

    Attributes:
        misses: which of the missing experts are computed where they rest; None: all are loaded.
    """

    def __init__(
        self,
        residency: Residency,
        transfer: Transfer,
        predictor: Predictor,
        *,
        governor: Governor,
        prefetch_count: int,
        predict_every: int = 1,
        refreshes: bool = False,
        streams: bool = False,
        needed_loads: list[Load] | None = None,
    ) -> None:
        self.residency, self.transfer, self.predictor = residency, transfer, predictor
        self.governor = governor
        self._prefetch = Prefetch(
            residency, transfer, predictor, count=prefetch_count, every=predict_every, refreshes=refreshes
        )
        self._prefetch.depth = governor.deepest
        self._stream = LayerStream(residency, transfer) if streams and not refreshes else None
        self.needed_loads = needed_loads
        self.misses: Misses | None = None

    def begin(self, passing: Pass) -> None:
        """A forward pass starts: what the predictor knows of it already is prefetched before its first layer."""
        for slot in tuple(self.residency.withheld):
            if not self.transfer.is_filling(slot):
                self.residency.readmit(slot)
        self._prefetch.depth = self.governor.depth(passing.phase, passing.num_tokens, self._reading())
        self.predictor.begin(passing)
        if self._stream is not None:
            num_routes = passing.num_tokens * self.residency.top_k
            self._stream.begin(
                passing.num_tokens, is_allowed=self.misses is None or not self.misses.may_compute(num_routes)
            )
        if self._prefetch.refreshes:
            self._prefetch.refresh()
            return
        self._prefetch.foresee(BEFORE_FIRST_LAYER)
        self._load_next(BEFORE_FIRST_LAYER, passing.num_tokens)

    def ask(self, layer: int, passing: Pass, hidden: Any) -> Sequence[Any]:
        """Tensors that the predictor wants to see of a layer's `hidden`, in the observation that `serve` is given."""
        return () if self._is_needless else self._prefetch.ask(layer, passing, hidden)

    def serve(
        self, layer: int, demand: Sequence[int], tokens: Sequence[int], observation: Observation
    ) -> Generator[Sequence[int], None, None]:
        """Yield the demanded experts in groups as they are ready; each is leased until the next group is asked for.

        Those that are computed where they rest are a group of their own, which `Residency.is_ready` tells: after what
        is resident, so that the device computes that meanwhile, and while loads are under way.

        Args:
            layer: index of the layer in this pool.
            demand: distinct experts (ids) that the router chose; `tokens[i]` tokens chose `demand[i]`.
            observation: what the router saw and said, for the predictor.

        Raises:
            TransferError: an expert could not be read, or no slot is left to read it into. Leases are given back and
                the engine stays usable.
        """
        num_tokens = len(observation.experts)
        try:
            self._land(demand)
            self._note_used_prefetches(demand)
            if self._stream is not None:
                self._stream.routed(layer, demand)
            if self.residency.foresees:  # what the layer chose says which victims are best; else loads do not wait
                self._predict(layer, observation)
            plan = self._plan(layer, demand, tokens, num_tokens)
            if self.misses is not None:
                self.misses.hold(plan.computed)  # before loads, which might take its place
            self._act(plan)
            if not self.residency.foresees:
                self._predict(layer, observation)
            self._load_next(layer, num_tokens, is_full=bool(plan.deferred))
            is_ring = self._is_ring(plan)
            yield from self._arrivals(layer, plan, num_tokens, is_ring=is_ring)
            while plan.deferred and not is_ring:
                plan = self.residency.plan(layer, plan.deferred, [0] * len(plan.deferred), num_tokens, first=False)
                if not (plan.hits or plan.awaited):
                    raise TransferError(_NO_SLOT)
                self._act(plan)
                yield from self._arrivals(layer, plan, num_tokens, is_ring=False)
        except TransferError:
            self.recover()
            raise

    def _plan(self, layer: int, demand: Sequence[int], tokens: Sequence[int], num_tokens: int) -> Plan:
        """The first wave."""
        if self.misses is None:
            return self.residency.plan(layer, demand, tokens, num_tokens)
        missing = {
            expert: count for expert, count in zip(demand, tokens, strict=True) if self.residency.slot_of(expert) < 0
        }
        most, at_hand = self.misses.choose(missing, self.residency.num_free)
        return self.residency.plan(layer, demand, tokens, num_tokens, most_loads=most, at_hand=at_hand)

    def _land(self, experts: Sequence[int]) -> None:
        """Take note of the prefetches among `experts` that have arrived or failed since anyone looked; those that
        failed will be loaded on demand."""
        for expert in experts:
            if self.residency.is_loading(expert):
                if self.transfer.is_ready(expert):
                    self.residency.complete([expert])
                elif self.transfer.has_failed(expert):
                    self._drop(expert)

    def _note_used_prefetches(self, demand: Sequence[int]) -> None:
        if self.needed_loads is not None:
            used = [expert for expert in demand if self.residency.is_unused_prefetch(expert)]
            slots = [self.residency.slot_of(expert) for expert in used]
            self.needed_loads.extend(Load(*pair, LoadReason.PREFETCH) for pair in zip(used, slots, strict=True))

    def _act(self, plan: Plan) -> None:
        self.transfer.submit(plan.loads)
        for expert in plan.in_flight:
            self.transfer.promote(expert)
        if self.needed_loads is not None:
            self.needed_loads.extend(plan.loads)

    def _reading(self) -> Reading:
        counts, moved = self.residency.counts(), self.transfer.stats()
        return Reading(
            now_s=self.transfer.now_s,
            num_needed=counts[Count.MISSES] - counts[Count.COMPUTED] + counts[Count.PREFETCH_ISSUED],
            num_wasted=counts[Count.PREFETCH_WASTED],
            num_loads=moved.num_loads,
            busy_s=moved.busy_s + moved.disk_busy_s,
            stall_s=moved.stall_s,
            num_layer_steps=counts[Count.LAYER_STEPS],
        )

    def _predict(self, layer: int, observation: Observation) -> None:
        """Let the predictor see the layer, and the policy know what it forecasts."""
        if self._is_needless:
            self._prefetch.forget()
        else:
            self._prefetch.observe(layer, observation)

    @property
    def _is_needless(self) -> bool:
        """What the predictor sees of a layer costs more than a pass that streamed leaves to be gained."""
        return self._stream is not None and self._stream.has_run and self.predictor.reads_hidden

    def _is_ring(self, plan: Plan) -> bool:
        """Slots are handed on one by one, or loads come in the order in which they were submitted."""
        stream = self._stream
        return stream is not None and bool(plan.deferred or stream.has_waiting or (stream.is_on and plan.awaited))

    def _load_next(self, layer: int, num_tokens: int, *, is_full: bool = False) -> None:
        """Load all of the next layer, or what the coming ones are forecast to need; `is_full`: there is no slot now."""
        if self._stream is not None and self._stream.is_on:
            self._prefetch.forget()
            self._stream.load_next(layer, is_full=is_full)
        else:
            self._prefetch.load(layer, num_tokens)

    def _arrivals(self, layer: int, plan: Plan, num_tokens: int, *, is_ring: bool) -> Iterator[Sequence[int]]:
        """The experts of one wave in groups as they are ready, those that are computed where they rest after the hits.
        A lease ends when the consumer comes back for more, and what waits for a slot takes it.

        A ring is the whole layer step: one expert at a time, each of whose slots goes to those of its layer that found
        none, then to the next layer.
        """
        ready, awaited, computed = deque(plan.hits), list(plan.awaited), plan.computed
        deferred = deque(plan.deferred if is_ring else ())
        leased = {*ready, *awaited}
        try:
            while ready or awaited or deferred or computed:
                if computed and not ready:
                    assert self.misses is not None
                    yield computed
                    self.misses.let_go()
                    computed = ()
                    continue
                if not ready:
                    ready.extend(self._await(awaited))
                    awaited = [expert for expert in awaited if expert not in ready]
                group = (ready.popleft(),) if is_ring else tuple(ready)
                yield group
                self._release(group, leased)
                if not is_ring:
                    ready.clear()
                if deferred:
                    more = self.residency.plan(layer, [deferred[0]], [0], num_tokens, first=False)
                    self._act(more)
                    if not more.deferred:
                        leased.add(deferred.popleft())
                        ready.extend(more.hits)
                        awaited.extend(more.awaited)
                elif self._stream is not None and self._stream.has_waiting:
                    self._stream.load(layer, 1)
                else:
                    self._prefetch.load_waiting(layer)
        finally:
            self._release(tuple(leased), leased)

    def _await(self, experts: Sequence[int]) -> Sequence[int]:
        """Those of the experts that are ready, at least one; of a layer that was streamed, in their order."""
        if not experts:
            raise TransferError(_NO_SLOT)
        is_ordered = self._stream is not None and self._stream.is_on
        arrived = self.transfer.wait_any(experts[:1] if is_ordered else experts)
        self.residency.complete(arrived)
        return arrived

    def _release(self, experts: Collection[int], leased: set[int]) -> None:
        leased.difference_update(experts)
        self.residency.release(experts)

    def settle(self) -> None:
        """Between passes: forget every load that has not arrived, failed ones among them. Nothing is under way then."""
        self.transfer.drain()
        self._drop_failed()
        for expert in self._loading():
            if self.transfer.is_ready(expert):
                self.residency.complete([expert])
            else:
                self._drop(expert)

    def recover(self) -> None:
        """A pass was broken off, anywhere: end its leases and its loads.

        What has arrived since is given up, too: of a load that was never submitted nobody can tell.
        """
        self.residency.void_leases()
        if self.misses is not None:
            self.misses.let_go()
        self.transfer.recover()
        with suppress(TransferError):  # the pass is lost already: no other one need hear of it
            self.transfer.submit(())
        self._drop_failed()
        for expert in self._loading():
            self._drop(expert)

    def _drop_failed(self) -> None:
        """Forget every load that failed, also after it was said to be ready."""
        for expert in self.residency.resident():
            if self.transfer.has_failed(expert):
                self._drop(expert)

    def _loading(self) -> list[int]:
        return [expert for expert in self.residency.resident() if self.residency.is_loading(expert)]

    def grow(self, num_slots: int) -> None:
        """Use `num_slots` slots, at least as many as now, from the next pass on."""
        former = self.residency.num_slots
        self.residency.grow(num_slots)
        for slot in range(former, num_slots):
            self._keep_out(slot)

    def _drop(self, expert: int) -> None:
        slot = self.residency.slot_of(expert)
        self.residency.drop(expert)
        self._keep_out(slot)

    def _keep_out(self, slot: int) -> None:
        """Let nobody use a free slot that a read which has not returned may still write into."""
        if self.transfer.is_filling(slot):
            self.residency.withhold(slot)
