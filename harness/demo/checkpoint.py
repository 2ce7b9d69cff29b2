"""Safetensors checkpoints of the Qwen3-MoE shape: read by name and by expert, write shards with aligned data."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from runtime.errors import CheckpointError, UnsupportedModelError

PAGE_BYTES = 4096
MATRICES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class TensorSpec:
    """A bf16 tensor to be written. `parts` makes its rows in order, when needed; a group stays in one shard."""

    name: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[torch.Tensor]]
    group: str | None = None

    @property
    def num_bytes(self) -> int:
        return 2 * math.prod(self.shape)


class Checkpoint:
    """A checkpoint folder, memory-mapped. Raises CheckpointError where a file is missing or broken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} is not a checkpoint: config.json: {error}") from error
        self._files = ExitStack()
        self._by_name = {name: file for file in self._open() for name in file.keys()}  # noqa: SIM118
        self.hidden_size = int(self.config["hidden_size"])
        self.intermediate_size = int(self.config["moe_intermediate_size"])
        self.num_experts = int(self.config.get("num_experts") or self.config["num_local_experts"])
        self.tied = bool(self.config.get("tie_word_embeddings"))

    def _open(self) -> Iterator[Any]:
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{self.folder} is not a checkpoint: it has no .safetensors file")
        for path in paths:
            try:
                yield self._files.enter_context(safe_open(path, "pt"))
            except SafetensorError as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, which must be bf16."""
        return self._bf16(name, self._file(name).get_tensor(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(name).get_shape())

    def _file(self, name: str) -> Any:
        if name not in self._by_name:
            raise CheckpointError(
                f"{self.folder} has no tensor {name}: a shard is missing, or it is not a qwen3_moe model"
            )
        return self._by_name[name]

    def _bf16(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.bfloat16:
            raise UnsupportedModelError(
                f"tensor {name} of {self.folder} is {tensor.dtype}: only bf16 checkpoints are widened"
            )
        return tensor

    @cached_property
    def sparse_layers(self) -> list[int]:
        return sorted({int(name.split(".")[2]) for name in self._by_name if ".mlp.experts." in name})

    @cached_property
    def dense_names(self) -> list[str]:
        names = sorted(name for name in self._by_name if ".mlp.experts." not in name)
        return [name for name in names if not (self.tied and name == "lm_head.weight")]

    def expert_matrix(self, layer: int, expert: int, name: str) -> torch.Tensor:
        """gate_proj or up_proj [I, H] or down_proj [H, I] of one expert, from either layout."""
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.gate_up_proj" not in self._by_name:
            return self.tensor(f"{prefix}.{expert}.{name}.weight")
        if name == "down_proj":
            return self._fused(f"{prefix}.down_proj", expert)
        return self._fused(f"{prefix}.gate_up_proj", expert).chunk(2)[MATRICES.index(name)]

    def _fused(self, name: str, expert: int) -> torch.Tensor:
        return self._bf16(name, self._file(name).get_slice(name)[expert])


def plan_shards(specs: Iterable[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Specs in order, cut into shards of at most `shard_bytes` (more only where one group is larger)."""
    shards: list[list[TensorSpec]] = [[]]
    groups: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.group or spec.name, []).append(spec)
    filled = 0
    for group in groups.values():
        size = sum(spec.num_bytes for spec in group)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    return shards


def header(specs: list[TensorSpec]) -> bytes:
    """Length and JSON of a safetensors header, padded with spaces (the format allows it): data starts on a page."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in specs:
        entries[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": [at, at + spec.num_bytes]}
        at += spec.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE_BYTES)
    return struct.pack("<Q", len(text)) + text


def _write_shard(path: Path, specs: list[TensorSpec]) -> None:
    with path.open("wb") as file:
        file.write(header(specs))
        for spec in specs:
            before = file.tell()
            for part in spec.parts():
                file.write(part.contiguous().view(torch.uint8).numpy().data)
            assert file.tell() - before == spec.num_bytes, spec.name


def write_shards(specs: list[TensorSpec], folder: Path, shard_bytes: int) -> None:
    """One file, or numbered shards and their index; one part of one tensor is in memory at a time."""
    shards = plan_shards(specs, shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard)
    if len(shards) > 1:
        where = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        total = sum(spec.num_bytes for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
