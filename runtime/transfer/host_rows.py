"""Some of the experts of a store in host memory, in rows that files are read into and a GPU's copies read from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from runtime import numa
from runtime.cache.residency import Residency
from runtime.transfer.host_slab import Span, slot_layout
from runtime.transfer.layout import align
from runtime.transfer.slots import PAGE_BYTES, SlotArena, TensorPlace
from runtime.transfer.store import ExpertStore


class HostRows:
    """An arena of rows and the residency that says which expert is in which.

    An expert lies in its row as its file wants it, and in its slot as the GPU does: a copy is a few spans.

    Attributes:
        num_experts: of a layer, as the store counts them.
        num_bytes: of one expert in its slot. slot_bytes: the same in whole pages.
        arena: the rows. pinned_bytes: of it, from its start, that copies may have pinned.
        residency: of the rows; `TieredTransfer` changes it, and who holds experts.
        is_placed: False where the kernel did not let the memory come from `node`.

    Args:
        num_rows: at least 1. num_pinned: of these, from the first. top_k, policy: see `Residency`.
        node: of NUMA, that the memory comes from; None: any.
    """

    def __init__(
        self,
        store: ExpertStore,
        num_rows: int,
        *,
        num_pinned: int,
        top_k: int,
        policy: str,
        node: int | None = None,
    ) -> None:
        self.store, self.num_experts = store, store.num_experts
        self._places, self.num_bytes = slot_layout(store)
        self.slot_bytes = align(self.num_bytes, PAGE_BYTES)
        self.residency = Residency(store.num_layers, store.num_experts, num_rows, top_k, policy)
        self.arena = SlotArena(num_rows, store.slot_bytes)
        self.pinned_bytes = num_pinned * store.slot_bytes
        self.is_placed = node is None or numa.prefer(self.arena.address(0), num_rows * store.slot_bytes, node)
        self._spans: dict[int, tuple[Span, ...]] = {}

    def tensors(self, expert: int) -> tuple[TensorPlace, ...]:
        """Places of an expert's tensors in its slot, in the order of the layer's parameters: the same for all."""
        return self._places

    def has(self, expert: int) -> bool:
        """Whether an expert is in host memory: in a row, and not on its way there."""
        return self.residency.slot_of(expert) >= 0 and not self.residency.is_loading(expert)

    def weights(self, expert: int) -> Mapping[str, torch.Tensor] | None:
        """The parameters of an expert that is in host memory, as views of its row; None: it is not there.

        Valid until the next call of the transfer, unless it is held.
        """
        if not self.has(expert):
            return None
        row = self.residency.slot_of(expert)
        return {place.name: self.arena.view(row, place) for place in self.store.tensors(expert)}

    def hold(self, experts: Collection[int]) -> None:
        """Keep experts of one layer that are in host memory there until they are released.

        They count as used, by a turn of the layer of their own: what the same layer step loads comes as another one.
        """
        (layer,) = {expert // self.num_experts for expert in experts}
        plan = self.residency.plan(layer, list(experts), [1] * len(experts), 1)
        assert len(plan.hits) == len(experts), f"of {experts} only {plan.hits} are in host memory"

    def release(self, experts: Collection[int]) -> None:
        """Others may take their rows again."""
        self.residency.release(experts)

    def spans(self, expert: int, start: int, num_bytes: int) -> Sequence[Span]:
        """Where bytes `start` to `start + num_bytes` of the slot of an expert in host memory lie; those between its
        tensors lie nowhere."""
        row = self.residency.slot_of(expert)
        assert row >= 0, f"expert {expert} is in no row"
        own = self._spans.get(expert)
        if own is None:
            own = self._spans[expert] = self._lay_over(expert)
        found, base, end = [], row * self.arena.slot_bytes, start + num_bytes
        for source, target, length in own:
            first, last = max(target, start), min(target + length, end)
            if first < last:
                found.append(Span(base + source + first - target, first, last - first))
        return found

    def _lay_over(self, expert: int) -> tuple[Span, ...]:
        """From a row to a slot, tensors that are neighbours in both as one; ascending in the slot."""
        spans: list[Span] = []
        for source, target in zip(self.store.tensors(expert), self._places, strict=True):
            num_bytes = torch.Size(target.shape).numel() * target.dtype.itemsize
            last = spans[-1] if spans else Span(-1, -1, 0)
            if (last.source + last.num_bytes, last.target + last.num_bytes) == (source.slot_offset, target.slot_offset):
                spans[-1] = last._replace(num_bytes=last.num_bytes + num_bytes)
            else:
                spans.append(Span(source.slot_offset, target.slot_offset, num_bytes))
        return tuple(spans)
