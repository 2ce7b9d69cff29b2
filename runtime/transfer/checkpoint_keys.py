"""Which tensors of a checkpoint make up which parameter of the model, by transformers' own key conversion."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Origin:
    """What one parameter is made of: checkpoint keys by source pattern, in transformers' order, and the converter.

    `converter` is None when one checkpoint tensor is the parameter. `renamed` is the name that transformers files the
    sources under: the parameter's own, or that of the first of several parameters that one converter makes.
    """

    renamed: str
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_targets(self) -> int:
        """How many parameters the converter makes of these sources."""
        return len(self.converter.target_patterns) if self.converter is not None else 1

    def is_concatenation(self) -> bool:
        """True when, for a single expert, the conversion does no more than put its sources one after the other."""
        if self.converter is None:
            return True
        return self.num_targets == 1 and all(_keeps_bytes(op) for op in self.converter.operations)

    @property
    def missing(self) -> list[str]:
        """Source patterns of a concatenation for which nothing was found."""
        if self.converter is None or not self.is_concatenation():
            return []
        return [pattern for pattern in self.converter.source_patterns if pattern not in self.sources]

    def patterns(self) -> list[str]:
        """The source patterns that were found, in the order in which the converter concatenates them."""
        if self.converter is None:
            return list(self.sources)
        return [pattern for pattern in self.converter.source_patterns if pattern in self.sources]


def find_origins(model: PreTrainedModel, keys: Iterable[str], parameters: Collection[str]) -> dict[str, Origin]:
    """Origin of each of `parameters` (full names) that some of the checkpoint's `keys` make up.

    `model` is asked for its names and its conversion mapping; it may lack `parameters` (stripped) or be on meta.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = dict.fromkeys(model.state_dict(), True) | dict.fromkeys(parameters, True)
    prefix = model.base_model_prefix
    origins: dict[str, Origin] = {}
    for key in sorted(keys, key=dot_natural_key):
        renamed, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if renamed not in known and key in known:  # already the model's own name, as transformers decides it
            renamed, pattern = rename_source_key(key, [], [], prefix, known)
        converter = by_pattern[pattern] if pattern is not None else None
        for target in _targets(renamed, converter):
            if target in parameters:
                origin = origins.setdefault(target, Origin(renamed, converter))
                origin.sources.setdefault(pattern or key, []).append(key)
    return origins


def convert(
    origin: Origin,
    target: str,
    sources: Iterable[tuple[str, torch.Tensor]],
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
) -> torch.Tensor:
    """Run transformers' conversion for one expert; (pattern, tensor) pairs in, the expert's parameter out.

    `shapes` are the parameters' shapes with one expert, for the operations that ask the model for them.
    """
    if origin.converter is None:
        return next(iter(sources))[1]
    converter = copy.deepcopy(origin.converter)
    for pattern, tensor in sources:
        # Annotated for futures only; tensors are what saving passes.
        converter.add_tensor(origin.renamed, pattern, pattern, cast(Any, tensor))
    one_expert = SimpleNamespace(get_parameter=lambda name: torch.empty(shapes[name], device="meta"))
    converted: dict[str, Any] = converter.convert(origin.renamed, model=one_expert, config=model.config)
    result = converted[target]
    return cast(torch.Tensor, result[0] if isinstance(result, list) else result)


def _targets(renamed: str, converter: WeightConverter | None) -> list[str]:
    if converter is None:
        return [renamed]
    first = converter.target_patterns[0]
    return [renamed.replace(first, pattern) for pattern in converter.target_patterns]


def _keeps_bytes(operation: Any) -> bool:
    """Along dimension 1 of `[1, rows, ...]`, concatenation appends bytes; a checked transpose may turn out to be none.

    Whether it does the caller sees by comparing shapes.
    """
    if type(operation) is MergeModulelist:
        return operation.dim == 0
    if type(operation) is Concatenate:
        return operation.dim == 1
    return type(operation) is Transpose and operation.check_dims
