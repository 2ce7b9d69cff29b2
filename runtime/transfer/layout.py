"""Where an expert's tensors go in a slot, and which bytes of the files are put there.

Every tensor starts on a multiple of 64 bytes in its slot: on views that do not, kernels are slower and not reproducible
to the bit. Where the file allows it, it starts at the file's own residue modulo the page, so that O_DIRECT can read
straight into the slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from runtime.transfer.slots import PAGE_BYTES, TensorPlace

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter of an experts module: its attribute name, the shape of ONE expert, the dtype of computation."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of one expert."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ExpertLayer:
    """An experts module: its path in the model and its parameters."""

    prefix: str
    num_experts: int
    parameters: tuple[ExpertParameter, ...]

    @property
    def expert_bytes(self) -> int:
        """Payload of one expert."""
        return sum(parameter.num_bytes for parameter in self.parameters)

    @property
    def slot_bytes(self) -> int:
        """Enough for one expert however its bytes lie in the files: an upper bound of `ExpertStore.slot_bytes`."""
        return align(self.expert_bytes + len(self.parameters) * PAGE_BYTES, PAGE_BYTES)


class Segment(NamedTuple):
    """`num_bytes` bytes from byte `offset` of file number `file` go to byte `slot_offset` of the slot."""

    file: int
    offset: int
    num_bytes: int
    slot_offset: int


class Source(NamedTuple):
    """One expert's part of a checkpoint tensor: where its bytes lie and how to see them.

    `pattern` is the source pattern of the converter that matched the tensor's name, or the name.
    """

    name: str
    pattern: str
    file: int
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Conversion:
    """A tensor that takes more than copying: read `sources` in full, then copy `convert(tensors)` to `place`."""

    place: TensorPlace
    sources: tuple[Source, ...]
    convert: Callable[[Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How an expert is put into a slot. Segments are in file order and do not overlap, in the file or in the slot."""

    segments: tuple[Segment, ...]
    conversions: tuple[Conversion, ...] = ()


class Part(NamedTuple):
    """One parameter of one expert before it has a place. `raw`: its sources are its bytes, one after the other."""

    parameter: ExpertParameter
    sources: tuple[Source, ...]
    raw: bool
    convert: Callable[[Sequence[torch.Tensor]], torch.Tensor]


def lay_out(parts: Sequence[Part]) -> tuple[Recipe, tuple[TensorPlace, ...], int]:
    """Give each parameter its place: in file order, straight behind its neighbour in the file where that is aligned."""
    places: dict[str, TensorPlace] = {}
    segments: list[Segment] = []
    conversions: list[Conversion] = []
    position = 0
    for part in sorted(parts, key=lambda part: (not part.raw, part.sources[0].file, part.sources[0].offset)):
        parameter, first = part.parameter, part.sources[0]
        start = _start(position, first, segments) if part.raw else align(position, _ALIGNMENT_BYTES)
        place = places[parameter.name] = TensorPlace(parameter.name, start, parameter.shape, parameter.dtype)
        position = start + parameter.num_bytes
        if not part.raw:
            conversions.append(Conversion(place, part.sources, part.convert))
            continue
        for source in part.sources:
            _append(segments, Segment(source.file, source.offset, source.num_bytes, start))
            start += source.num_bytes
    ordered = tuple(places[part.parameter.name] for part in parts)
    return Recipe(tuple(sorted(segments)), tuple(conversions)), ordered, position


def _start(position: int, first: Source, segments: Sequence[Segment]) -> int:
    """The next aligned place: right behind a neighbour in the file, else at the file's residue if that is aligned."""
    last = segments[-1] if segments else None
    is_neighbour = last is not None and (last.file, last.offset + last.num_bytes) == (first.file, first.offset)
    start = align(position, _ALIGNMENT_BYTES)
    if first.offset % _ALIGNMENT_BYTES or (is_neighbour and start == position):
        return start
    return start + (first.offset - start) % PAGE_BYTES


def _append(segments: list[Segment], new: Segment) -> None:
    """Append, or lengthen the last segment when both file and slot go on where it ends."""
    if segments:
        file, offset, num_bytes, slot_offset = segments[-1]
        if (file, offset + num_bytes, slot_offset + num_bytes) == (new.file, new.offset, new.slot_offset):
            segments[-1] = Segment(file, offset, num_bytes + new.num_bytes, slot_offset)
            return
    segments.append(new)


def align(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
