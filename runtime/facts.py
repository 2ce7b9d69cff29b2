"""What can be said before weights are loaded: facts of a checkpoint, and how many slots its memory holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from runtime import machine
from runtime.devices import CPU, free_bytes, is_gpu
from runtime.model import LoadedModel, meta_model
from runtime.profile import ModelIdentity, Profile
from runtime.transfer.store import ExpertLayer


@dataclass(frozen=True)
class ModelFacts:
    """What can be said of a checkpoint without loading its weights. Bytes are those of the dtype it is computed in."""

    identity: ModelIdentity
    config: PreTrainedConfig
    num_experts_total: int
    num_pools: int
    top_k: int
    expert_bytes: int
    slot_bytes: int
    dense_bytes: int
    dtype: torch.dtype

    @property
    def model_bytes(self) -> int:
        """All of its weights."""
        return self.dense_bytes + self.num_experts_total * self.expert_bytes


def describe(model: str | Path, *, dtype: torch.dtype | str = "auto") -> ModelFacts:
    """Facts of a checkpoint folder or hub id; raises what loading it would raise for a model that cannot be served."""
    loaded = meta_model(str(model), dtype=dtype)
    return facts_of(loaded)


def facts_of(loaded: LoadedModel) -> ModelFacts:
    """Of a model whose class is known and whose weights may be anywhere."""
    layers, config = loaded.layers, loaded.model.config
    expert_bytes = max(layer.expert_bytes for layer in layers)
    dense = {id(p): p.numel() * p.element_size() for p in loaded.model.parameters()}
    top_k = top_k_of(config) or 1
    identity = ModelIdentity(
        architecture=type(loaded.model).__name__,
        layers=len(layers),
        experts=layers[0].num_experts,
        top_k=top_k,
        expert_bytes=expert_bytes,
        dtype=str(layers[0].parameters[0].dtype).removeprefix("torch."),
    )
    return ModelFacts(
        identity=identity,
        config=config,
        num_experts_total=sum(layer.num_experts for layer in layers),
        num_pools=len(pool_layers(layers)),
        top_k=top_k,
        expert_bytes=expert_bytes,
        slot_bytes=max(layer.slot_bytes for layer in layers),
        dense_bytes=sum(dense.values()),
        dtype=layers[0].parameters[0].dtype,
    )


def top_k_of(config: PreTrainedConfig) -> int | None:
    """Experts per token, by the names that transformers' configurations use."""
    text = config.get_text_config()
    for name in ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k"):
        value = getattr(text, name, None)
        if value is not None:
            return int(max(value) if isinstance(value, (list, tuple)) else value)
    return None


def pool_layers(layers: Sequence[ExpertLayer]) -> list[list[int]]:
    """The layers (indices) of each pool: those whose experts have the same parameters share slots."""
    members: dict[Any, list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        members[layer.parameters].append(index)
    return list(members.values())


def resolve(profile: Profile, facts: ModelFacts, device: torch.device = CPU) -> tuple[Profile, list[str]]:
    """The profile with its number of slots settled against the memory that is free now, and notes on what was changed.

    Raises:
        BudgetError: not even one slot fits.
    """
    wanted = wanted_slots(profile.cache.slots, facts.num_experts_total)
    if is_gpu(device):
        buffer_bytes, limit = cuda_buffer_bytes(facts, planned_context(profile)), free_bytes(device)
    else:
        buffer_bytes = machine.resident_bytes() + BUFFER_BYTES
        limit = machine.resident_bytes() + machine.available_memory_bytes()
    why, most = "what is free now", profile.max_memory_bytes
    if most is not None and most <= limit:
        limit, why = most, "limits.max_memory_bytes"
    fit = machine.slots_that_fit(
        limit,
        dense_bytes=facts.dense_bytes,
        slot_bytes=facts.slot_bytes,
        kv_bytes=_kv_bytes(profile, facts),
        buffer_bytes=buffer_bytes,
    )
    wanted = min(wanted, facts.num_experts_total)
    slots = min(wanted, fit)
    notes = []
    if slots < wanted and profile.cache.slots is not None:
        total = machine.format_bytes(limit)
        notes.append(f"{wanted} slots asked for, {slots} fit the memory: {total} in all, by {why}")
    return profile.with_overrides({"cache.slots": slots}), notes


# Activations, the tokenizer, prepared matrix products (`machine.limit_matmul_caches`), and what loading takes for a
# moment beside the weights (measured, results/LOG.md).
BUFFER_BYTES = 164 << 20
# Of a GPU, the least: activations and the libraries' workspaces and kernels. What CUDA itself takes is not in the
# memory that is free.
CUDA_BUFFER_BYTES = 512 << 20
_CUDA_LIBRARY_BYTES = 256 << 20  # of these, whatever the prompt
_ROWS_PER_TOKEN = 8  # of the hidden size, beside one for each expert of a token: residual stream, attention, sums
RESIDENT_FACTOR = 1.3  # of a model's bytes, to load and run it whole
DEFAULT_CONTEXT = 4096  # tokens of KV cache that are allowed for where the profile does not say


def cuda_buffer_bytes(facts: ModelFacts, context: int) -> int:
    """What is set aside of a GPU beside weights, slots and KV cache, for prompts of up to `context` tokens.

    A prompt is computed whole: its rows, one for each token and expert (`kernels.rows`), are its largest activation.
    """
    row_bytes = (getattr(facts.config.get_text_config(), "hidden_size", None) or 0) * facts.dtype.itemsize
    return max(CUDA_BUFFER_BYTES, _CUDA_LIBRARY_BYTES + context * (facts.top_k + _ROWS_PER_TOKEN) * row_bytes)


def planned_context(profile: Profile) -> int:
    """Tokens of a sequence that the profile is for; where it does not say, `DEFAULT_CONTEXT`."""
    return (profile.workload.context if profile.workload is not None else None) or DEFAULT_CONTEXT


def _kv_bytes(profile: Profile, facts: ModelFacts) -> int:
    """What the profile sets aside, else the upper bound for its context and the sequences under way."""
    if profile.cache.kv_bytes is not None:
        return profile.cache.kv_bytes
    sequences = profile.scheduler.num_sequences
    return machine.kv_cache_bytes(facts.config, planned_context(profile), sequences, dtype_bytes=facts.dtype.itemsize)


def wanted_slots(slots: int | str | None, num_experts: int) -> int:
    """What `cache.slots` asks for; None: all."""
    if slots is None:
        return num_experts
    if isinstance(slots, str):
        return max(1, round(num_experts * float(slots.rstrip("%")) / 100))
    return slots
