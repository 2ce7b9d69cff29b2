"""The peers that a profile is measured against: plain transformers, and accelerate's disk offload."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from runtime.errors import UsageError


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold routed experts, by name, in the order of their layers."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "num_experts")
    }


def decoder_layers(model: nn.Module) -> list[str]:
    """Names of all decoder layers: the members of every module list that holds experts somewhere below."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = {
        min((name for name in lists if experts.startswith(f"{name}.")), key=len) for experts in experts_modules(model)
    }
    return [f"{name}.{index}" for name in sorted(outermost) for index in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]


def disk_device_map(model: nn.Module, on_disk: Collection[str]) -> dict[str, str]:
    """A device map that leaves the modules `on_disk` there and everything else on the CPU."""

    def visit(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
        if name in on_disk:
            yield name, "disk"
        elif not any(other.startswith(f"{name}." if name else "") for other in on_disk):
            yield name, "cpu"
        else:
            prefix = f"{name}." if name else ""
            for own, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                yield prefix + own, "cpu"
            for child, submodule in module.named_children():
                yield from visit(prefix + child, submodule)

    return dict(visit("", model))


def own_weights(model: nn.Module) -> None:
    """Copy every weight into memory of its own: as loaded, some are views of a mapped checkpoint, which then stays."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def load_plain(model: str, implementation: str | None) -> Any:
    """The whole model in memory, as transformers loads it; `implementation` None is its default for experts."""
    options = {} if implementation is None else {"experts_implementation": implementation}
    return AutoModelForCausalLM.from_pretrained(model, dtype="auto", **options).eval()


def load_accelerate(model: str, meta: nn.Module, *, whole_layers: bool, implementation: str, folder: Path) -> Any:
    """A model of which accelerate keeps the experts, or whole decoder layers, on disk; it computes on the CPU.

    Args:
        model: a checkpoint in the fused layout, which is read in place; of another, what goes to disk is written again.
        meta: the same model on the meta device.
        folder: where accelerate may write.
    """
    on_disk = decoder_layers(meta) if whole_layers else list(experts_modules(meta))
    return AutoModelForCausalLM.from_pretrained(
        model,
        dtype="auto",
        device_map=disk_device_map(meta, on_disk),
        offload_folder=str(folder),
        experts_implementation=implementation,
    ).eval()


def fused_copy(model: str, cache: Path) -> Path:
    """The checkpoint in the fused layout, written once and kept in `cache`; takes the whole model's memory meanwhile.

    Raises:
        UsageError: there is not enough room on the disk.
    """
    files = sorted(Path(model).glob("*.safetensors"))
    state = repr([(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]) or model
    out = cache / f"fused-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
    if out.exists():
        return out
    cache.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(path.stat().st_size for path in files)
    if shutil.disk_usage(cache).free < 1.1 * num_bytes:
        raise UsageError(f"accelerate's copy of the checkpoint needs {num_bytes} bytes in {cache}; free some")
    temporary = tempfile.mkdtemp(dir=cache, prefix=f".{out.name}.")
    try:
        load_plain(model, None).save_pretrained(temporary, save_original_format=False)
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def memory_bytes_per_s(num_bytes: int = 256 << 20) -> float:
    """Best rate of five at which this process reads a large buffer, with as many threads as torch uses."""
    buffer = torch.ones(num_bytes // 4, dtype=torch.float32)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum()
        rates.append(num_bytes / (time.perf_counter() - start))
    return max(rates)
