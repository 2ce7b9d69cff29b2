"""Widen a Qwen3-MoE checkpoint to any expert and hidden width without changing what it computes.

An expert's intermediate unit repeated r times, its `down_proj` columns divided by r, adds up to the unit itself. The
hidden size is widened by repeating every hidden unit R times: RMSNorm is invariant, and every weight that reads the
hidden state is divided by R. All divisors are powers of two, so bf16 weights stay exact and the function changes by
summation order only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.demo import DEFAULT_SHARD_BYTES, LAYOUTS
from harness.demo.checkpoint import MATRICES, PAGE_BYTES, Checkpoint, TensorSpec, write_shards
from runtime.errors import BudgetError, ExpertFlowError, UnsupportedModelError
from runtime.profile import checkpoint_cache


@dataclass(frozen=True)
class Shape:
    """Widths of a widened model and the repeats that give them: one R for hidden units, an r per intermediate unit."""

    hidden_size: int
    intermediate_size: int
    hidden_repeat: int
    unit_repeats: tuple[int, ...]

    @property
    def expert_bytes(self) -> int:
        """bf16 bytes of gate_proj, up_proj and down_proj of one expert."""
        return 6 * self.hidden_size * self.intermediate_size


def unit_repeats(source: int, target: int) -> tuple[int, ...]:
    """`source` powers of two that sum to `target`, as even as they can be: 64 -> 768 gives 32 x 16 and 32 x 8."""
    if target < source:
        raise BudgetError(f"intermediate size {target} is below the source model's {source}: ask for larger experts")
    parts = [1 << bit for bit in range(target.bit_length()) if target >> bit & 1]
    while len(parts) < source:
        parts.sort()
        largest = parts.pop()
        parts += [largest // 2, largest // 2]
    return tuple(sorted(parts, reverse=True))


def _intermediate_size(expert_bytes: int, hidden: int) -> int:
    """Largest width at or below `expert_bytes` whose bf16 expert is whole pages, and whose rows grouped_mm takes.

    `torch.nn.functional.grouped_mm` refuses rows that are no multiple of 16 bytes.
    """
    step = math.lcm(PAGE_BYTES // math.gcd(6 * hidden, PAGE_BYTES), 8)
    return expert_bytes // (6 * hidden * step) * step


def _hidden_choices(source: int, hidden_size: int | None) -> list[int]:
    choices = [source << doubling for doubling in range(10)]
    if hidden_size is None:
        return choices
    if hidden_size not in choices:
        listed = ", ".join(map(str, choices))
        raise BudgetError(f"hidden size {hidden_size} is not {source} times a power of two: choose one of {listed}")
    return [hidden_size]


def choose_shape(
    source_hidden: int, source_intermediate: int, expert_bytes: int, hidden_size: int | None = None
) -> Shape:
    """The most balanced shape among those within 1 % of the largest at or below `expert_bytes`.

    Raises BudgetError naming the smallest size where none is wide enough.
    """
    choices = _hidden_choices(source_hidden, hidden_size)
    widths = [(hidden, _intermediate_size(expert_bytes, hidden)) for hidden in choices]
    widths = [(hidden, width) for hidden, width in widths if width >= source_intermediate]
    if not widths:
        smallest = 6 * choices[0] * source_intermediate
        raise BudgetError(f"{expert_bytes} bytes an expert is less than the source model's: ask for {smallest} or more")
    largest = max(hidden * width for hidden, width in widths)
    near = [(hidden, width) for hidden, width in widths if hidden * width >= 0.99 * largest]
    hidden, width = min(near, key=lambda pair: abs(math.log(pair[0] / pair[1])))
    return Shape(hidden, width, hidden // source_hidden, unit_repeats(source_intermediate, width))


def _wide_input(weight: torch.Tensor, repeat: int) -> torch.Tensor:
    """[out, hidden] -> [out, hidden * repeat] / repeat: its product with a repeated hidden state is unchanged."""
    return weight.repeat_interleave(repeat, dim=1) / repeat


def widen_dense(name: str, tensor: torch.Tensor, repeat: int, tied: bool) -> torch.Tensor:
    """A tensor outside the experts, by its role: reads the hidden state, writes it, scales it, or does not touch it."""
    if name.endswith("model.norm.weight") and tied:
        return tensor.repeat_interleave(repeat) / repeat  # the tied embedding also writes the state
    if name.endswith(("layernorm.weight", "model.norm.weight", "o_proj.bias")):
        return tensor.repeat_interleave(repeat)
    if name.endswith(("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias")):
        return tensor
    if name.endswith("embed_tokens.weight"):
        return tensor.repeat_interleave(repeat, dim=1)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return tensor.repeat_interleave(repeat, dim=0)
    return _wide_input(tensor, repeat)


def widen_matrix(name: str, matrix: torch.Tensor, shape: Shape) -> torch.Tensor:
    """An expert's gate_proj or up_proj [I, H] or its down_proj [H, I], at the widths of `shape`."""
    repeats = torch.tensor(shape.unit_repeats)
    if name == "down_proj":
        columns = (matrix / repeats.to(matrix.dtype)).repeat_interleave(repeats, dim=1)
        return columns.repeat_interleave(shape.hidden_repeat, dim=0)
    return _wide_input(matrix.repeat_interleave(repeats, dim=0), shape.hidden_repeat)


def _matrix_spec(source: Checkpoint, layer: int, expert: int, name: str, shape: Shape) -> TensorSpec:
    prefix = f"model.layers.{layer}.mlp.experts.{expert}"
    size = (shape.intermediate_size, shape.hidden_size)
    return TensorSpec(
        f"{prefix}.{name}.weight",
        size[::-1] if name == "down_proj" else size,
        lambda: iter((widen_matrix(name, source.expert_matrix(layer, expert, name), shape),)),
        group=prefix,
    )


def _fused_spec(source: Checkpoint, layer: int, names: tuple[str, ...], shape: Shape) -> TensorSpec:
    """[experts, 2 I, H] of gate and up, or [experts, H, I] of down."""
    size = (2 * shape.intermediate_size, shape.hidden_size)

    def parts() -> Iterator[torch.Tensor]:
        for expert in range(source.num_experts):
            for name in names:
                yield widen_matrix(name, source.expert_matrix(layer, expert, name), shape)

    last = "down_proj" if names == ("down_proj",) else "gate_up_proj"
    shapes = {"gate_up_proj": size, "down_proj": (shape.hidden_size, shape.intermediate_size)}
    return TensorSpec(f"model.layers.{layer}.mlp.experts.{last}", (source.num_experts, *shapes[last]), parts)


def _expert_specs(source: Checkpoint, layer: int, shape: Shape, layout: str) -> Iterator[TensorSpec]:
    """The tensors of one layer's experts; in the hub layout one expert's matrices lie side by side."""
    if layout == "fused":
        yield _fused_spec(source, layer, MATRICES[:2], shape)
        yield _fused_spec(source, layer, MATRICES[2:], shape)
        return
    for expert in range(source.num_experts):
        for name in MATRICES:
            yield _matrix_spec(source, layer, expert, name, shape)


def _specs(source: Checkpoint, shape: Shape, layout: str) -> Iterator[TensorSpec]:
    """Experts first: their sizes are whole pages, so that all of them start on one when the data section does."""
    for layer in source.sparse_layers:
        yield from _expert_specs(source, layer, shape, layout)
    for name in source.dense_names:
        yield _dense_spec(source, name, shape.hidden_repeat)


def _dense_spec(source: Checkpoint, name: str, repeat: int) -> TensorSpec:
    def parts() -> Iterator[torch.Tensor]:
        yield widen_dense(name, source.tensor(name), repeat, source.tied)

    narrow = torch.empty(source.shape(name), device="meta")
    return TensorSpec(name, tuple(widen_dense(name, narrow, repeat, source.tied).shape), parts)


def _check_disk(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + 64 * 2**20:
        raise BudgetError(
            f"the widened model needs {needed_bytes / 2**20:.0f} MiB and {folder} has {free / 2**20:.0f} MiB free: "
            "free some, choose another folder, or a smaller --expert-bytes"
        )


def _write_folder(source: Checkpoint, folder: Path, shape: Shape, shard_bytes: int, layout: str) -> None:
    specs = list(_specs(source, shape, layout))
    _check_disk(folder, sum(spec.num_bytes for spec in specs))
    write_shards(specs, folder, shard_bytes)
    config = dict(source.config, hidden_size=shape.hidden_size, moe_intermediate_size=shape.intermediate_size)
    config.setdefault("head_dim", source.config["hidden_size"] // source.config["num_attention_heads"])
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    kept = {path.name for path in folder.iterdir()}
    for path in source.folder.iterdir():
        is_text = path.suffix in {".json", ".jinja", ".model", ".txt"} and not path.name.endswith(".index.json")
        if is_text and path.name not in kept:
            shutil.copy(path, folder)


def widen(
    source: Path,
    out: Path,
    *,
    expert_bytes: int,
    hidden_size: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    layout: str = "hub",
) -> Path:
    """Write `source` (bf16 Qwen3-MoE folder, hub or fused layout) widened to `out` and return `out`.

    `expert_bytes` is an upper limit: the expert is the nearest whole number of pages that the widths can make. `layout`
    "hub" stores one tensor per expert and matrix, "fused" one per layer. The folder is built beside `out` and renamed
    when it is whole. Raises BudgetError (size not reachable, disk full), UnsupportedModelError (not Qwen3-MoE, not
    bf16), CheckpointError, ExpertFlowError (`out` exists).
    """
    if layout not in LAYOUTS:
        raise ExpertFlowError(f"layout {layout!r} is unknown: choose one of {', '.join(LAYOUTS)}")
    if out.exists():
        raise ExpertFlowError(f"{out} exists already: remove it or choose another --out")
    checkpoint = Checkpoint(source)
    if checkpoint.config.get("model_type") != "qwen3_moe":
        raise UnsupportedModelError(
            f"{source} is {checkpoint.config.get('model_type')!r}: only qwen3_moe can be widened"
        )
    shape = choose_shape(checkpoint.hidden_size, checkpoint.intermediate_size, expert_bytes, hidden_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        _write_folder(checkpoint, temporary, shape, shard_bytes, layout)
        temporary.chmod(0o755)
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def bundled_model() -> Path:
    """Folder of the demo checkpoint that comes with the package."""
    return Path(__file__).parent / "model"


def _name(source: Path, shape: Shape, shard_bytes: int, layout: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(source.glob("*.safetensors")):
        digest.update(path.read_bytes())
    shards = "" if shard_bytes == DEFAULT_SHARD_BYTES else f"-shard{shard_bytes}"
    return f"demo-{digest.hexdigest()[:8]}-hidden{shape.hidden_size}-expert{shape.expert_bytes}-{layout}{shards}"


def command_of(folder: Path) -> str | None:
    """The command that makes a folder of `widened`, by its name; None: it is none."""
    found = re.fullmatch(r"demo-\w{8}-hidden(\d+)-expert(\d+)-(\w+?)(?:-shard(\d+))?", folder.name)
    if found is None:
        return None
    hidden_size, expert_bytes, layout, shard_bytes = found.groups()
    command = f"python -m harness.demo --expert-bytes {expert_bytes} --hidden-size {hidden_size} --layout {layout}"
    return command if shard_bytes is None else f"{command} --shard-bytes {shard_bytes}"


def widened(
    expert_bytes: int,
    cache_dir: Path | None = None,
    *,
    hidden_size: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    layout: str = "hub",
) -> Path:
    """The bundled model widened to `expert_bytes`, made once and kept in the cache under its digest."""
    source = bundled_model()
    checkpoint = Checkpoint(source)
    shape = choose_shape(checkpoint.hidden_size, checkpoint.intermediate_size, expert_bytes, hidden_size)
    out = (cache_dir or checkpoint_cache()) / _name(source, shape, shard_bytes, layout)
    if out.exists():
        return out
    try:
        return widen(
            source, out, expert_bytes=expert_bytes, hidden_size=hidden_size, shard_bytes=shard_bytes, layout=layout
        )
    except (ExpertFlowError, OSError):
        if out.exists():  # another process finished the same model first
            return out
        raise
