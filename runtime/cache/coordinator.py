"""The layer step: from what the router chose to experts that are ready to compute, in the order in which they
arrive."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import suppress

import numpy as np

from runtime.cache.governor import Governor, Reading
from runtime.cache.residency import Count, Residency
from runtime.errors import TransferError
from runtime.predictors.base import BEFORE_FIRST_LAYER, Forecast, Observation, Predictor
from runtime.transfer.base import Transfer
from runtime.vocabulary import Load, LoadReason, Pass, Phase, Plan


class Coordinator:
    """Drives residency and transfer for one pool of layers. One thread at a time.

    Args:
        residency: decides. transfer: acts. predictor: forecasts.
        governor: says how many layers ahead are prefetched for.
        prefetch_count: experts per token and layer that are prefetched at most.
        predict_every: decode steps for which a forecast is reused.
        refreshes: before a pass, the slots are given to the experts that its forecast names, as far as there is one.
            For an engine that does not load what it misses.
        needed_loads: where given, every load that the run needed is appended, in the order in which it was needed:
            demand loads, and prefetches at their first use.
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
        needed_loads: list[Load] | None = None,
    ) -> None:
        self.residency, self.transfer, self.predictor = residency, transfer, predictor
        self.governor, self.prefetch_count, self.predict_every = governor, prefetch_count, predict_every
        self._depth = governor.deepest  # of the running pass
        self._forecast: Forecast | None = None
        self._waiting: list[tuple[int, int]] = []  # experts to prefetch that have no slot, and layers until each
        self.refreshes = refreshes
        self.needed_loads = needed_loads

    def begin(self, passing: Pass) -> None:
        """A forward pass starts: what the predictor knows of it already is prefetched before its first layer."""
        for slot in tuple(self.residency.withheld):
            if not self.transfer.is_filling(slot):
                self.residency.readmit(slot)
        self._depth = self.governor.depth(passing.phase, passing.num_tokens, self._reading())
        self.predictor.begin(passing)
        if self.refreshes:
            self._refresh()
        else:
            self._predict(BEFORE_FIRST_LAYER)
            self._prefetch(BEFORE_FIRST_LAYER, passing.num_tokens)

    def serve(
        self, layer: int, demand: Sequence[int], tokens: Sequence[int], observation: Observation
    ) -> Generator[Sequence[int], None, None]:
        """Yield the demanded experts in groups as they are ready; each is leased until the next group is asked for.

        Args:
            layer: index of the layer in this pool.
            demand: distinct experts (ids) that the router chose; `tokens[i]` tokens chose `demand[i]`.
            observation: what the router saw and said, for the predictor.

        Raises:
            TransferError: an expert could not be read, or no slot is left to read it into. Leases are given back and
                the engine stays usable.
        """
        num_tokens = len(observation.experts)
        self._land(demand)
        self._note_used_prefetches(demand)
        if self.residency.foresees:  # what the layer chose says which victims are best; else loads need not wait for it
            self._predict(layer, observation)
        plan = self.residency.plan(layer, demand, tokens, num_tokens)
        self._act(plan)
        if not self.residency.foresees:
            self._predict(layer, observation)
        self._prefetch(layer, num_tokens)
        yield from self._arrivals(layer, plan)
        while plan.deferred:
            plan = self.residency.plan(layer, plan.deferred, [0] * len(plan.deferred), num_tokens, first=False)
            if not (plan.hits or plan.awaited):
                raise TransferError("no expert slot is left: reads into them have not returned; check the disk")
            self._act(plan)
            yield from self._arrivals(layer, plan)

    def _land(self, experts: Sequence[int]) -> None:
        """Take note of the prefetches among `experts` that have arrived or failed since anyone looked; those that
        failed will be loaded on demand."""
        loading = [expert for expert in experts if self.residency.is_loading(expert)]
        self.residency.complete([expert for expert in loading if self.transfer.is_ready(expert)])
        for expert in loading:
            if self.transfer.has_failed(expert):
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

    @property
    def _is_asked(self) -> bool:
        """Somebody acts on a forecast: the prefetch or the policy."""
        return self._depth > 0 or self.residency.foresees or self.refreshes

    def _reading(self) -> Reading:
        counts, moved = self.residency.counts(), self.transfer.stats()
        return Reading(
            now_s=self.transfer.now_s,
            num_needed=counts[Count.MISSES] + counts[Count.PREFETCH_ISSUED],
            num_wasted=counts[Count.PREFETCH_WASTED],
            num_loads=moved.num_loads,
            busy_s=moved.busy_s + moved.disk_busy_s,
            stall_s=moved.stall_s,
            num_layer_steps=counts[Count.LAYER_STEPS],
        )

    def _predict(self, layer: int, observation: Observation | None = None) -> None:
        """Let the predictor see the layer, and the policy know what it forecasts."""
        self._forecast = None
        if not self._is_asked:
            return
        if observation is not None:
            passing = observation.passing
            if passing.phase is Phase.PREFILL or passing.step % self.predict_every == 0:
                self.predictor.observe(layer, observation)
        self._forecast = self.predictor.forecast(layer)
        if self._forecast is not None and self.residency.foresees:
            first = 0 if self.predictor.sees_next_pass else layer + 1
            self.residency.foresee(self._forecast, first, self.predictor.waits())

    def _prefetch(self, layer: int, num_tokens: int) -> None:
        """Load what the coming layers are forecast to need."""
        self._waiting = [] if self._forecast is None else self._wanted(layer, self._forecast, num_tokens)
        self._load_ahead(layer)

    def _load_ahead(self, layer: int) -> None:
        """Load what is wanted as far as there are slots for it. The rest waits for those that `layer` frees, as in
        ExpertFlow (arXiv 2410.17954v2, figure 5)."""
        if not self._waiting:
            return
        experts, steps_ahead = zip(*self._waiting, strict=True)
        self.transfer.submit(self.residency.plan_prefetch(layer, experts, steps_ahead))
        self._waiting = [one for one in self._waiting if self.residency.slot_of(one[0]) < 0]

    def _refresh(self) -> None:
        forecast = self.predictor.forecast(BEFORE_FIRST_LAYER)
        if forecast is None:
            return
        if self.residency.foresees:
            self.residency.foresee(forecast, waits=self.predictor.waits())
        self.transfer.submit(self.residency.plan_refresh(forecast))

    def _wanted(self, layer: int, forecast: Forecast, num_tokens: int) -> list[tuple[int, int]]:
        """Experts to have ready for the coming layers with layers until each, most urgent first: those of the nearest
        layer, or those of the highest likelihood x layer proximity."""
        num_layers, num_experts = forecast.shape
        most = min(self.prefetch_count * num_tokens, num_experts)
        found: list[tuple[float, int, int]] = []
        for ahead in range(1, min(self._depth, num_layers - 1 - layer) + 1):
            row = forecast[layer + ahead]
            likeliest = np.argsort(-row, kind="stable")[:most].tolist()
            base = (layer + ahead) * num_experts
            found.extend((row[index], base + index, ahead) for index in likeliest if row[index] > 0.0)
        if self.predictor.by_likelihood:
            found.sort(key=lambda one: -one[0] * (1.0 - one[2] / num_layers))
        return [(expert, ahead) for _, expert, ahead in found]

    def _arrivals(self, layer: int, plan: Plan) -> Iterator[Sequence[int]]:
        """The experts of one wave in groups as they are ready. A lease ends when the consumer comes back for more."""
        leased = set(plan.hits) | set(plan.awaited)
        awaited = list(plan.awaited)
        try:
            if plan.hits:
                yield plan.hits
                self._release(plan.hits, leased)
                self._load_ahead(layer)
            while awaited:
                arrived = self.transfer.wait_any(awaited)
                self.residency.complete(arrived)
                awaited = [expert for expert in awaited if expert not in arrived]
                yield arrived
                self._release(arrived, leased)
                self._load_ahead(layer)
        except TransferError:
            self.settle()
            leased = {expert for expert in leased if self.residency.slot_of(expert) >= 0}
            raise
        finally:
            self._release(tuple(leased), leased)

    def _release(self, experts: Collection[int], leased: set[int]) -> None:
        self.residency.release(experts)
        leased.difference_update(experts)

    def settle(self) -> None:
        """Forget every load that has not arrived, failed ones among them: nothing is under way any more."""
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
        self.transfer.drain()
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
