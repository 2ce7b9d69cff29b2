"""All experts of a store in host memory: what a GPU's copies read from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple, Self

import torch

from runtime import numa
from runtime.transfer.disk import DiskTransfer
from runtime.transfer.layout import align
from runtime.transfer.slots import PAGE_BYTES, SlotArena, TensorPlace
from runtime.transfer.store import ExpertStore
from runtime.vocabulary import Load, LoadReason

# cuBLAS chooses its kernels by the alignment of its operands, and tensors of torch's own start on this many bytes: the
# same kernels, the same bits as of a resident model.
ALIGNMENT_BYTES = 256
_STAGING_SLOTS = 4


class HostSlab:
    """One mapping that holds every expert, each laid out alike, read from its files when this is made.

    Attributes:
        num_experts: of a layer, as the store counts them.
        num_bytes: of one expert, the gaps between its tensors included. slot_bytes: the same in whole pages.
        arena: the mapping. pinned_bytes: of it, from its start, that copies may have pinned.
        is_placed: False where the kernel did not let its pages come from `node`.

    Args:
        io_threads: that read. num_pinned: experts, from the first, whose memory can be pinned; None: all. node: of
            NUMA, that the memory comes from; None: any.

    Raises:
        TransferError: an expert cannot be read.
    """

    def __init__(
        self, store: ExpertStore, *, io_threads: int = 2, num_pinned: int | None = None, node: int | None = None
    ) -> None:
        self.num_experts = store.num_experts
        self._views: dict[int, Mapping[str, torch.Tensor]] = {}
        self._rows = {expert: row for row, expert in enumerate(store.experts)}
        self._places, self.num_bytes = slot_layout(store)
        self.slot_bytes = align(self.num_bytes, PAGE_BYTES)
        self.pinned_bytes = (len(self._rows) if num_pinned is None else num_pinned) * self.slot_bytes
        self.arena = SlotArena(len(self._rows), self.slot_bytes)
        self.is_placed = node is None or numa.prefer(self.arena.address(0), len(self._rows) * self.slot_bytes, node)
        self._fill(store, io_threads)

    @classmethod
    def blank(cls, num_experts: int, num_bytes: int) -> Self:
        """`num_experts` of zeros and of no model: for timing how they are copied."""
        slab = cls.__new__(cls)
        slab.num_experts, slab.num_bytes, slab.slot_bytes = num_experts, num_bytes, align(num_bytes, PAGE_BYTES)
        slab._rows, slab._places = {expert: expert for expert in range(num_experts)}, ()
        slab.pinned_bytes, slab.is_placed = num_experts * slab.slot_bytes, True
        slab.arena = SlotArena(num_experts, slab.slot_bytes)
        torch.frombuffer(slab.arena.memory, dtype=torch.uint8).zero_()  # else every page is the kernel's page of zeros
        return slab

    def start(self, expert: int) -> int:
        """The byte of the mapping at which an expert starts."""
        return self._rows[expert] * self.slot_bytes

    def spans(self, expert: int, start: int, num_bytes: int) -> tuple[Span, ...]:
        """Where bytes `start` to `start + num_bytes` of an expert's slot lie."""
        return (Span(self.start(expert) + start, start, num_bytes),)

    def tensors(self, expert: int) -> tuple[TensorPlace, ...]:
        """Places of an expert's tensors in its slot, in the order of the layer's parameters: the same for all."""
        return self._places

    def has(self, expert: int) -> bool:
        """Every expert that there is."""
        return expert in self._rows

    def weights(self, expert: int) -> Mapping[str, torch.Tensor] | None:
        """The tensors of an expert where they rest, no copy; None would mean that it is not in host memory now."""
        known = self._views.get(expert)
        if known is None:
            row = self._rows[expert]
            known = self._views[expert] = {place.name: self.arena.view(row, place) for place in self._places}
        return known

    def hold(self, experts: Collection[int]) -> None:
        """Nothing ever goes."""

    def release(self, experts: Collection[int]) -> None:
        """See `hold`."""

    def _fill(self, store: ExpertStore, io_threads: int) -> None:
        staging = SlotArena(min(_STAGING_SLOTS, len(self._rows)), store.slot_bytes)
        reader = DiskTransfer(store, staging, io_threads)
        slots: dict[int, int] = {}
        try:
            for number, expert in enumerate(store.experts):
                if number >= staging.num_slots:
                    slots[expert] = self._take_in(store, staging, reader, slots)
                else:
                    slots[expert] = number
                reader.submit([Load(expert, slots[expert], LoadReason.DEMAND)])
            while slots:
                self._take_in(store, staging, reader, slots)
        finally:
            reader.close()

    def _take_in(self, store: ExpertStore, staging: SlotArena, reader: DiskTransfer, slots: dict[int, int]) -> int:
        """Move one expert that has been read to its place; the slot that it leaves."""
        expert = reader.wait_any(slots)[0]
        slot = slots.pop(expert)
        for source, target in zip(store.tensors(expert), self._places, strict=True):
            self.arena.view(self._rows[expert], target).copy_(staging.view(slot, source))
        return slot


def slab_slot_bytes(store: ExpertStore) -> int:
    """Bytes that each expert takes in a slab."""
    return align(slot_layout(store)[1], PAGE_BYTES)


class Span(NamedTuple):
    """Bytes of an expert that lie side by side in host memory and in its slot: `source` is in the mapping, `target` in
    the slot."""

    source: int
    target: int
    num_bytes: int


def slot_layout(store: ExpertStore) -> tuple[tuple[TensorPlace, ...], int]:
    """Places of an expert's tensors in a slot of a GPU, one after the other, aligned; and the bytes up to the end of
    the last."""
    places, end = list[TensorPlace](), 0
    for tensor in store.tensors(store.experts[0]):
        start = align(end, ALIGNMENT_BYTES)
        places.append(tensor._replace(slot_offset=start))
        end = start + torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
    return tuple(places), end
