"""Where the bytes of each expert lie at rest. Only the headers of the files are read here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.transfer.layout import ExpertLayer, ExpertParameter, Recipe, align, lay_out
from runtime.transfer.safetensors_index import read_index
from runtime.transfer.slots import PAGE_BYTES, TensorPlace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ExpertLayer", "ExpertParameter", "ExpertStore"]


@dataclass(frozen=True)
class ExpertStore:
    """The experts of layers of one shape. An expert is `layer * num_experts + index`, `layer` counted from 0 here.

    Attributes:
        files: the checkpoint's files, as `Segment.file` numbers them.
        prefixes: module paths of the layers, in their order.
        num_experts: experts of the largest layer. expert_bytes: payload. slot_bytes: a multiple of 4096.
    """

    files: tuple[Path, ...]
    prefixes: tuple[str, ...]
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
        # Brings transformers, seconds to import; reading experts needs none of it.
        from runtime.transfer.sources import PartFinder

        if len({layer.parameters for layer in layers}) != 1:
            raise ValueError("a store holds layers with the same parameters; open one store for each shape")
        finder = PartFinder(model, files, read_index(files), layers)
        num_experts = max(layer.num_experts for layer in layers)
        recipes: dict[int, Recipe] = {}
        places: dict[int, tuple[TensorPlace, ...]] = {}
        slot_bytes = 0
        for number, layer in enumerate(layers):
            for expert, parts in enumerate(finder.parts(layer), number * num_experts):
                recipes[expert], places[expert], end = lay_out(parts)
                slot_bytes = max(slot_bytes, align(end, PAGE_BYTES))
        prefixes = tuple(layer.prefix for layer in layers)
        expert_bytes = layers[0].expert_bytes
        return cls(tuple(files), prefixes, num_experts, expert_bytes, slot_bytes, recipes, places)

    @property
    def num_layers(self) -> int:
        """Layers of the store."""
        return len(self.prefixes)

    @property
    def experts(self) -> tuple[int, ...]:
        """Every expert that there is, ascending; layers may have fewer than `num_experts`."""
        return tuple(self._recipes)

    def tensors(self, expert: int) -> tuple[TensorPlace, ...]:
        """Places of the expert's tensors in its slot, in the order of the layer's parameters; they vary by expert."""
        return self._places[expert]

    def recipe(self, expert: int) -> Recipe:
        """What to read for `expert`. Raises KeyError when there is no such expert."""
        return self._recipes[expert]

    def describe(self, expert: int) -> str:
        """The expert by layer and index, for messages."""
        layer, index = divmod(expert, self.num_experts)
        return f"expert {index} of MoE layer {layer}"
