"""A pool: the layers whose experts are alike, and the slots that they share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from runtime.cache.miss import Resting
from runtime.kernels import Arrival, HostArrival, Weights
from runtime.predictors.base import Observation
from runtime.readback import as_array
from runtime.vocabulary import Load, LoadReason, Pass

if TYPE_CHECKING:
    from runtime.cache.coordinator import Coordinator
    from runtime.host_experts import HostLayer
    from runtime.substitute import Substitution
    from runtime.transfer.slots import TensorPlace


class ExpertPlaces(Protocol):
    """Where experts rest, as far as a pool asks: `ExpertStore` (files), `HostSlab` (memory)."""

    @property
    def num_experts(self) -> int:
        """Of a layer."""

    def tensors(self, expert: int) -> tuple[TensorPlace, ...]:
        """Where the tensors of an expert lie in its slot."""


class HostWeights(Resting, Protocol):
    """Host memory that experts rest in: `HostSlab`, `HostRows`."""

    def weights(self, expert: int) -> Weights | None:
        """The tensors of an expert in host memory, as long as it is held; None: it is not there now."""


class Slots(Protocol):
    """What experts come into: `SlotArena` (host), `DeviceSlots` (GPU)."""

    num_slots: int
    slot_bytes: int

    @property
    def is_on_host(self) -> bool:
        """They take the host's memory, and can give it back."""

    def view(self, slot: int, place: TensorPlace) -> torch.Tensor:
        """The tensor at `place` of `slot`, no copy."""

    def move(self, source: int, target: int) -> None:
        """Copy all bytes of slot `source` to slot `target`; nothing is under way to either."""

    def release_tail(self, num_slots: int) -> int:
        """Give the memory of all slots from `num_slots` on back; the bytes that the system has now, 0: none."""


class Pool:
    """Slots, the store behind them and the coordinator that fills them, for layers of one expert shape.

    `host`: has the weights of what the coordinator leaves there to be computed; None where all is loaded.
    """

    def __init__(
        self, store: ExpertPlaces, arena: Slots, coordinator: Coordinator, host: HostWeights | None = None
    ) -> None:
        self.store, self.arena, self.coordinator, self.host = store, arena, coordinator, host
        self._views: dict[int, tuple[int, Weights]] = {}

    @property
    def num_slots(self) -> int:
        """Slots in use; the arena may have more."""
        return self.coordinator.residency.num_slots

    @property
    def uncharged_bytes(self) -> int:
        """Memory that the slots in use will take once they are filled."""
        return self.coordinator.residency.num_free * self.arena.slot_bytes

    @property
    def charged_bytes(self) -> int:
        """Memory that they have taken."""
        return self.num_slots * self.arena.slot_bytes - self.uncharged_bytes

    def resize(self, num_slots: int) -> int:
        """Go on with `num_slots` slots (from 1 to the arena's), between passes; the bytes that the system has back.

        Fewer: the experts most worth keeping move down and stay, without being read again. More: the new slots take
        memory as they are filled.
        """
        residency = self.coordinator.residency
        before = self.num_slots
        if num_slots >= before:
            self.coordinator.grow(num_slots)
            return 0
        self.coordinator.settle()
        plan = residency.plan_shrink(num_slots)
        for move in plan.moves:
            self.arena.move(move.source, move.target)
        residency.shrink(plan)
        self._views.clear()
        return min(self.arena.release_tail(num_slots), (before - num_slots) * self.arena.slot_bytes)

    def weights(self, expert: int) -> Weights:
        """The parameters of a resident expert, as views of its slot."""
        slot = self.coordinator.residency.slot_of(expert)
        known = self._views.get(expert)
        if known is None or known[0] != slot:
            views: Mapping[str, torch.Tensor] = {
                place.name: self.arena.view(slot, place) for place in self.store.tensors(expert)
            }
            known = self._views[expert] = (slot, views)
        return known[1]

    def arrival(self, expert: int, index: int) -> Arrival:
        """A demanded expert, number `index` in its layer, as its kernel takes it."""
        if self.host is None or self.coordinator.residency.is_ready(expert):
            return Arrival(index, self.weights(expert))
        weights = self.host.weights(expert)
        assert weights is not None, f"expert {expert} was to be computed on the host, where it is not any more"
        return HostArrival(index, weights)

    def replay(self, loads: Sequence[Load]) -> None:
        """Bring `loads` in again through the same transfer, in order and without compute, as fast as it goes.

        Slots are taken in turn, whatever the loads say, so what they held is overwritten; see `restore`.
        """
        transfer = self.coordinator.transfer
        window = min(self.num_slots, 8)
        outstanding: list[int] = []
        for turn, load in enumerate(loads):
            while len(outstanding) == window or load.expert in outstanding:
                # The oldest first: the slot that comes round next is the one it fills.
                transfer.wait_any(outstanding[:1])
                outstanding.pop(0)
            transfer.submit([Load(load.expert, turn % window, LoadReason.DEMAND)])
            outstanding.append(load.expert)
        for expert in outstanding:
            transfer.wait_any([expert])
        transfer.drain()  # of a GPU: ready is not arrived

    def restore(self) -> None:
        """Bring every resident expert into its slot again."""
        residency, transfer = self.coordinator.residency, self.coordinator.transfer
        transfer.drain()
        for expert in residency.resident():
            transfer.submit([Load(expert, residency.slot_of(expert), LoadReason.DEMAND)])
            transfer.wait_any([expert])
            residency.complete([expert])
        transfer.drain()  # ready is for the caller's stream, and passes may compute on another


class OffloadedSource:
    """One layer's experts, served from its pool.

    Args:
        layer: the layer's index in the pool. current: the running pass.
        router_input: what the layer's router was last given, for predictors; it need not be what the experts are given.
        substitution: changed the router's choice before it came here; predictors go by what it was.
        host: computes what the pool leaves on the host; None: it leaves nothing.
        asks_ahead: what predictors want to know is read with the router's choice, as by a host that waits for each
            read; else it is computed when loads are under way.
    """

    def __init__(
        self,
        pool: Pool,
        layer: int,
        current: Callable[[], Pass],
        router_input: Callable[[], torch.Tensor | None] = lambda: None,
        substitution: Substitution | None = None,
        host: HostLayer | None = None,
        *,
        asks_ahead: bool = False,
    ) -> None:
        self._pool, self._layer, self._current, self._router_input = pool, layer, current, router_input
        self.substitution, self.host, self._asks_ahead = substitution, host, asks_ahead
        self._base = layer * pool.store.num_experts
        self._hidden: torch.Tensor | None = None

    def ask(self) -> Sequence[torch.Tensor]:
        """What the predictor wants to know of the layer."""
        hidden = self._router_input()
        if self._asks_ahead:
            return self._asked(hidden)
        self._hidden = hidden
        return ()

    def serve(
        self,
        experts: Sequence[int],
        tokens: Sequence[int],
        choice: npt.NDArray[np.int64],
        answers: Sequence[torch.Tensor],
    ) -> Generator[Sequence[Arrival], None, None]:
        """The experts as they arrive; each is leased until the next group is asked for."""
        demand = [self._base + index for index in experts]
        routed = choice if self.substitution is None else self.substitution.routed
        hidden, self._hidden = self._hidden, None  # no longer: those of a long prompt are more than many a slot
        answered = partial(_arrays, answers) if self._asks_ahead else lambda: _arrays(self._asked(hidden))
        observation = Observation(self._current(), routed, answered)
        for group in self._pool.coordinator.serve(self._layer, demand, tokens, observation):
            yield [self._pool.arrival(expert, expert - self._base) for expert in group]

    def _asked(self, hidden: torch.Tensor | None) -> Sequence[torch.Tensor]:
        return () if hidden is None else self._pool.coordinator.ask(self._layer, self._current(), hidden)


def _arrays(tensors: Sequence[torch.Tensor]) -> list[npt.NDArray[Any]]:
    return [as_array(tensor) for tensor in tensors]
