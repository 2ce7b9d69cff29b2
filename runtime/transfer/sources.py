"""From checkpoint tensors to the parts of every expert: which tensor, or which row of one, belongs to whom."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from runtime.errors import CheckpointError
from runtime.transfer.checkpoint_keys import Origin, convert, find_origins
from runtime.transfer.layout import ExpertLayer, ExpertParameter, Part, Source
from runtime.transfer.safetensors_index import TensorEntry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WAY_OUT = "download it again, or check that the configuration belongs to it"


class PartFinder:
    """Finds the parts of the experts of `layers` among the tensors in `index`.

    Raises:
        CheckpointError (by `parts`): a tensor is missing, or is not what the model's parameter can be made of.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: Sequence[Path],
        index: dict[str, TensorEntry],
        layers: Sequence[ExpertLayer],
    ) -> None:
        self._model, self._index = model, index
        self._shapes = {f"{layer.prefix}.{p.name}": (1, *p.shape) for layer in layers for p in layer.parameters}
        # A parameter that is tied to another is stored once, under the other's name.
        self._tied = {name: other for name, other in model.all_tied_weights_keys.items() if name in self._shapes}
        self._shapes |= {other: self._shapes[name] for name, other in self._tied.items()}
        self._origins = find_origins(model, index, self._shapes)
        self._file_numbers = {file: number for number, file in enumerate(files)}
        self._folder = files[0].parent if files else Path()

    def parts(self, layer: ExpertLayer) -> list[tuple[Part, ...]]:
        """One part per parameter, for every expert of a layer."""
        by_parameter = [self._parts_of(layer, parameter) for parameter in layer.parameters]
        return list(zip(*by_parameter, strict=True))

    def _parts_of(self, layer: ExpertLayer, parameter: ExpertParameter) -> list[Part]:
        name = f"{layer.prefix}.{parameter.name}"
        if name not in self._origins:
            name = self._tied.get(name, name)
        origin = self._origins.get(name)
        if origin is None:
            raise CheckpointError(f"{self._folder}: no tensor for the experts {name!r}; {_WAY_OUT}")
        if origin.missing:
            raise CheckpointError(f"{self._folder}: no tensor like {origin.missing[0]!r} for {name!r}; {_WAY_OUT}")
        by_pattern = [self._split(origin, pattern, layer) for pattern in origin.patterns()]
        experts = [tuple(chain.from_iterable(sources)) for sources in zip(*by_pattern, strict=True)]
        run = partial(self._convert, origin, name, parameter.dtype, tuple(source.pattern for source in experts[0]))
        is_raw: dict[tuple[tuple[tuple[int, ...], torch.dtype], ...], bool] = {}
        parts = []
        for sources in experts:
            kind = tuple((source.shape, source.dtype) for source in sources)
            if kind not in is_raw:
                is_raw[kind] = self._is_raw(origin, parameter, sources)
                if not is_raw[kind]:
                    self._check_conversion(Part(parameter, sources, False, run), name)
            parts.append(Part(parameter, sources, is_raw[kind], run))
        return parts

    def _convert(
        self,
        origin: Origin,
        name: str,
        dtype: torch.dtype,
        patterns: Sequence[str],
        tensors: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The parameter `name` of one expert. Like transformers, cast first, then convert."""
        typed = [tensor.to(dtype) for tensor in tensors]
        return convert(origin, name, zip(patterns, typed, strict=True), self._model, self._shapes)

    def _split(self, origin: Origin, pattern: str, layer: ExpertLayer) -> list[tuple[Source, ...]]:
        """For one pattern, the sources of every expert of a layer: tensors of its own, or its row of a common one."""
        entries = [self._index[key] for key in origin.sources[pattern]]
        if len(entries) == 1 and "*" not in pattern:
            return [(source,) for source in self._rows(pattern, entries[0], layer)]
        num_wanted = layer.num_experts * origin.num_targets
        if len(entries) != num_wanted:
            raise CheckpointError(f"{self._folder}: {_what_is_missing(entries, num_wanted, layer)}; {_WAY_OUT}")
        whole = [self._source(pattern, entry, entry.shape, 0, entry.num_bytes) for entry in entries]
        return [tuple(whole[expert :: layer.num_experts]) for expert in range(layer.num_experts)]

    def _rows(self, pattern: str, entry: TensorEntry, layer: ExpertLayer) -> list[Source]:
        if entry.shape[:1] != (layer.num_experts,):
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name!r} of shape {list(entry.shape)} does not hold the "
                f"{layer.num_experts} experts of {layer.prefix}; {_WAY_OUT}"
            )
        stride = entry.num_bytes // layer.num_experts
        shape = (1, *entry.shape[1:])
        return [self._source(pattern, entry, shape, row * stride, stride) for row in range(layer.num_experts)]

    def _source(self, pattern: str, entry: TensorEntry, shape: tuple[int, ...], start: int, num_bytes: int) -> Source:
        if entry.dtype is None or not entry.dtype.is_floating_point:
            raise CheckpointError(
                f"{entry.file}: expert tensor {entry.name!r} is not of a floating-point dtype that torch has; "
                "use the checkpoint in bfloat16, float16 or float32"
            )
        return Source(
            entry.name, pattern, self._file_numbers[entry.file], entry.offset + start, num_bytes, shape, entry.dtype
        )

    def _is_raw(self, origin: Origin, parameter: ExpertParameter, sources: Sequence[Source]) -> bool:
        if not origin.is_concatenation() or any(source.dtype != parameter.dtype for source in sources):
            return False
        shapes = [source.shape[len(source.shape) - len(parameter.shape) :] for source in sources]
        if len(shapes) == 1:
            return shapes[0] == parameter.shape
        if any(len(shape) != len(parameter.shape) or shape[1:] != parameter.shape[1:] for shape in shapes):
            return False
        return sum(shape[0] for shape in shapes) == parameter.shape[0]

    def _check_conversion(self, part: Part, name: str) -> None:
        """Try the conversion of one expert without data, so that weights of another shape are refused now."""
        tensors = [torch.empty(source.shape, dtype=source.dtype, device="meta") for source in part.sources]
        what = f"{self._folder}: {name!r} cannot be made of {', '.join(source.name for source in part.sources)}"
        try:
            shape = tuple(part.convert(tensors).shape)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise CheckpointError(f"{what} ({error}); {_WAY_OUT}") from error
        wanted = part.parameter.shape
        if shape not in (wanted, (1, *wanted)):
            found = list(shape[len(shape) - len(wanted) :])
            raise CheckpointError(
                f"{what}: that gives one expert the shape {found} instead of {list(wanted)}; {_WAY_OUT}"
            )


def _what_is_missing(entries: Sequence[TensorEntry], num_wanted: int, layer: ExpertLayer) -> str:
    """Name the first tensor that a gap in the experts' numbers gives away."""
    for number, entry in enumerate(entries):
        head, found, tail = _expert_number(entry.name)
        if found != number:
            return f"tensor '{head}{number}{tail}' is missing"
    head, _, tail = _expert_number(entries[-1].name)
    if len(entries) < num_wanted:
        return f"tensor '{head}{len(entries)}{tail}' is missing"
    return f"{layer.prefix} wants {num_wanted} tensors like {entries[-1].name!r}, the files hold {len(entries)}"


def _expert_number(name: str) -> tuple[str, int, str]:
    """The last number among the dotted parts of a name (-1 without one), with what is before and after it."""
    parts = name.split(".")
    for at in reversed(range(len(parts))):
        if parts[at].isdigit():
            return ".".join([*parts[:at], ""]), int(parts[at]), ".".join(["", *parts[at + 1 :]])
    return name, -1, ""
