"""Where the bytes of each expert lie at rest, and where in a slot they go.

Nothing is read here but the headers. Every tensor starts on a multiple of 64 bytes in its slot (kernels are slower, and
not reproducible to the bit, on views that do not), and where the file allows it at the file's own residue modulo the page,
so that O_DIRECT can read straight into the slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from runtime.errors import CheckpointError
from runtime.transfer.checkpoint_keys import Origin, convert, find_origins
from runtime.transfer.safetensors_index import TensorEntry, read_index
from runtime.transfer.slots import TensorPlace

PAGE_BYTES = 4096
ALIGNMENT_BYTES = 64
_WAY_OUT = "download it again, or check that the configuration belongs to it"


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
        """A slot that holds one expert however its bytes lie in the files; an upper bound of `ExpertStore.slot_bytes`."""
        return _align(self.expert_bytes + len(self.parameters) * PAGE_BYTES, PAGE_BYTES)


class Segment(NamedTuple):
    """`num_bytes` bytes from byte `offset` of file number `file` go to byte `slot_offset` of the slot."""

    file: int
    offset: int
    num_bytes: int
    slot_offset: int


class Source(NamedTuple):
    """A tensor that a conversion starts from: where its bytes lie and how to see them. One expert's part."""

    pattern: str
    file: int
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Conversion:
    """A tensor that is more than bytes put together: read `sources` in full, then copy `convert(tensors)` to `place`."""

    place: TensorPlace
    sources: tuple[Source, ...]
    convert: Callable[[Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How an expert is put into a slot. Segments are in file order and do not overlap, in the file or in the slot."""

    segments: tuple[Segment, ...]
    conversions: tuple[Conversion, ...] = ()


@dataclass(frozen=True)
class ExpertStore:
    """The experts of layers of one shape. An expert is `layer * num_experts + index`, `layer` counted from 0 here.

    Attributes:
        files: the checkpoint's files, as `Segment.file` numbers them.
        num_experts: experts of the largest layer. expert_bytes: payload. slot_bytes: a multiple of 4096.
    """

    files: tuple[Path, ...]
    num_layers: int
    num_experts: int
    expert_bytes: int
    slot_bytes: int
    _recipes: dict[int, Recipe]
    _places: dict[int, tuple[TensorPlace, ...]]

    @classmethod
    def open(cls, model: PreTrainedModel, files: Sequence[Path], layers: Sequence[ExpertLayer]) -> ExpertStore:
        """Find every expert of `layers` in the safetensors `files` (all shards of the checkpoint that `model` is of).

        `model` gives names and conversion rules only: it may be on meta, or without its experts' parameters.

        Raises:
            CheckpointError: a file is missing, truncated or corrupt; an expert's tensor is missing or does not fit.
            ValueError: `layers` is empty, or their parameters differ: open one store for each shape.
        """
        if len({layer.parameters for layer in layers}) != 1:
            raise ValueError("a store holds layers with the same parameters; open one store for each shape")
        index = read_index(files)
        names = [f"{layer.prefix}.{p.name}" for layer in layers for p in layer.parameters]
        builder = _Builder(model, tuple(files), index, find_origins(model, index, frozenset(names)), layers)
        num_experts = max(layer.num_experts for layer in layers)
        recipes, places, slot_bytes = {}, {}, 0
        for number, layer in enumerate(layers):
            for expert, (recipe, placed, end) in enumerate(builder.layer(layer), number * num_experts):
                recipes[expert], places[expert] = recipe, placed
                slot_bytes = max(slot_bytes, _align(end, PAGE_BYTES))
        return cls(tuple(files), len(layers), num_experts, layers[0].expert_bytes, slot_bytes, recipes, places)

    def tensors(self, expert: int) -> tuple[TensorPlace, ...]:
        """The places of the expert's tensors in its slot, in the order of the layer's parameters. They vary by expert."""
        return self._places[expert]

    def recipe(self, expert: int) -> Recipe:
        """What to read for `expert`. Raises KeyError when there is no such expert."""
        return self._recipes[expert]

    def describe(self, expert: int) -> str:
        """The expert by layer and index, for messages."""
        layer, index = divmod(expert, self.num_experts)
        return f"expert {index} of MoE layer {layer}"


class _Part(NamedTuple):
    """One parameter of one expert before it has a place. `raw`: its sources are its bytes, one after the other."""

    parameter: ExpertParameter
    sources: tuple[Source, ...]
    raw: bool
    convert: Callable[[Sequence[torch.Tensor]], torch.Tensor]


class _Builder:
    def __init__(
        self,
        model: PreTrainedModel,
        files: tuple[Path, ...],
        index: dict[str, TensorEntry],
        origins: dict[str, Origin],
        layers: Sequence[ExpertLayer],
    ) -> None:
        self._model, self._index, self._origins = model, index, origins
        self._file_numbers = {file: number for number, file in enumerate(files)}
        self._folder = files[0].parent if files else Path()
        self._shapes = {f"{layer.prefix}.{p.name}": (1, *p.shape) for layer in layers for p in layer.parameters}

    def layer(self, layer: ExpertLayer) -> Iterable[tuple[Recipe, tuple[TensorPlace, ...], int]]:
        """Recipe, places and the end of the last byte in the slot, for every expert of a layer."""
        parts = [self._parts(layer, parameter) for parameter in layer.parameters]
        return [_lay_out(expert_parts) for expert_parts in zip(*parts, strict=True)]

    def _parts(self, layer: ExpertLayer, parameter: ExpertParameter) -> list[_Part]:
        name = f"{layer.prefix}.{parameter.name}"
        origin = self._origins.get(name)
        if origin is None:
            raise CheckpointError(f"{self._folder}: no tensor for the experts {name!r}; {_WAY_OUT}")
        by_pattern = [self._split(origin, pattern, layer) for pattern in origin.patterns()]
        experts = [tuple(source for sources in of_one for source in sources) for of_one in zip(*by_pattern, strict=True)]
        raw = self._is_raw(origin, parameter, experts[0])

        def run(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            typed = [tensor.to(parameter.dtype) for tensor in tensors]
            patterns = [source.pattern for source in experts[0]]
            return convert(origin, name, zip(patterns, typed, strict=True), self._model, self._shapes)

        if not raw:
            self._check_conversion(name, parameter, experts[0], run)
        return [_Part(parameter, sources, raw, run) for sources in experts]

    def _split(self, origin: Origin, pattern: str, layer: ExpertLayer) -> list[tuple[Source, ...]]:
        """The sources of every expert of a layer for one pattern."""
        entries = [self._index[key] for key in origin.sources[pattern]]
        for entry in entries:
            if entry.dtype is None or not entry.dtype.is_floating_point:
                raise CheckpointError(f"{entry.file}: expert tensor {entry.name!r} is not of a floating-point dtype")
        if len(entries) == 1 and "*" not in pattern:
            return [(source,) for source in self._slices(pattern, entries[0], layer)]
        wanted = layer.num_experts * origin.num_targets
        if len(entries) != wanted:
            raise CheckpointError(f"{self._folder}: {_what_is_missing(entries, wanted, layer)}; {_WAY_OUT}")
        whole = [self._source(pattern, entry, entry.shape, 0, entry.num_bytes) for entry in entries]
        return [tuple(whole[expert :: layer.num_experts]) for expert in range(layer.num_experts)]

    def _slices(self, pattern: str, entry: TensorEntry, layer: ExpertLayer) -> list[Source]:
        if entry.shape[:1] != (layer.num_experts,):
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name!r} of shape {list(entry.shape)} does not hold the "
                f"{layer.num_experts} experts of {layer.prefix}; {_WAY_OUT}"
            )
        stride = entry.num_bytes // layer.num_experts
        shape = (1, *entry.shape[1:])
        return [self._source(pattern, entry, shape, e * stride, stride) for e in range(layer.num_experts)]

    def _source(
        self, pattern: str, entry: TensorEntry, shape: tuple[int, ...], start: int, num_bytes: int
    ) -> Source:
        assert entry.dtype is not None
        return Source(pattern, self._file_numbers[entry.file], entry.offset + start, num_bytes, shape, entry.dtype)

    def _is_raw(self, origin: Origin, parameter: ExpertParameter, sources: tuple[Source, ...]) -> bool:
        if not origin.is_concatenation() or any(source.dtype != parameter.dtype for source in sources):
            return False
        shapes = [source.shape[1:] if len(source.shape) > len(parameter.shape) else source.shape for source in sources]
        if len(shapes) == 1:
            return shapes[0] == parameter.shape
        rows = sum(shape[0] for shape in shapes)
        return rows == parameter.shape[0] and all(shape[1:] == parameter.shape[1:] for shape in shapes)

    def _check_conversion(
        self,
        name: str,
        parameter: ExpertParameter,
        sources: tuple[Source, ...],
        run: Callable[[Sequence[torch.Tensor]], torch.Tensor],
    ) -> None:
        """Try the conversion of one expert without data, so that weights of another shape are refused now."""
        tensors = [torch.empty(source.shape, dtype=source.dtype, device="meta") for source in sources]
        try:
            shape = tuple(run(tensors).shape)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{self._folder}: {name!r} cannot be made from the checkpoint ({error})") from error
        if shape not in (parameter.shape, (1, *parameter.shape)):
            raise CheckpointError(
                f"{self._folder}: one expert of {name!r} has shape {list(shape)} in the checkpoint and "
                f"{list(parameter.shape)} in the model; {_WAY_OUT}"
            )


def _what_is_missing(entries: Sequence[TensorEntry], wanted: int, layer: ExpertLayer) -> str:
    """Name the first tensor that a gap in the experts' numbers gives away."""
    for number, entry in enumerate(entries):
        head, found, tail = _expert_number(entry.name)
        if found != number:
            return f"tensor '{head}{number}{tail}' is missing"
    head, found, tail = _expert_number(entries[-1].name)
    if found is not None and len(entries) < wanted:
        return f"tensor '{head}{found + 1}{tail}' is missing"
    return f"{layer.prefix} wants {wanted} tensors like {entries[-1].name!r}, the files hold {len(entries)}"


def _expert_number(name: str) -> tuple[str, int | None, str]:
    """The last number among the dotted parts of a name, with what is before and after it."""
    parts = name.split(".")
    for at in reversed(range(len(parts))):
        if parts[at].isdigit():
            tail = parts[at + 1 :]
            return ".".join([*parts[:at], ""]), int(parts[at]), ".".join(["", *tail]) if tail else ""
    return name, None, ""


def _lay_out(parts: Sequence[_Part]) -> tuple[Recipe, tuple[TensorPlace, ...], int]:
    """Give each parameter its place: in file order, straight behind its neighbour in the file where that is aligned."""
    places: dict[str, TensorPlace] = {}
    segments: list[Segment] = []
    conversions: list[Conversion] = []
    position = 0
    for part in sorted(parts, key=lambda part: (not part.raw, part.sources[0].file, part.sources[0].offset)):
        parameter, first = part.parameter, part.sources[0]
        start = _start(position, first, segments) if part.raw else _align(position, ALIGNMENT_BYTES)
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
    """The next aligned place: at once behind a neighbour in the file, else at the file's own residue if that is aligned."""
    last = segments[-1] if segments else None
    is_neighbour = last is not None and (last.file, last.offset + last.num_bytes) == (first.file, first.offset)
    start = _align(position, ALIGNMENT_BYTES)
    if first.offset % ALIGNMENT_BYTES or (is_neighbour and start == position):
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


def _align(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
