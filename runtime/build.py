"""The composition root: a profile becomes an engine. The only place that names concrete classes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from runtime import machine
from runtime.cache.coordinator import Coordinator
from runtime.cache.residency import Residency
from runtime.engine import Engine
from runtime.errors import BudgetError, ProfileError
from runtime.experts import IMPLEMENTATION, KERNELS, LayerRunner, ResidentSource, register
from runtime.model import LoadedModel, load_offloaded, load_resident, meta_model, read_config
from runtime.passes import PassTracker
from runtime.pool import OffloadedSource, Pool
from runtime.predictors.base import NoPredictor, Predictor
from runtime.predictors.gate_lookahead import GateLookahead, LookaheadRouter, lookahead_router
from runtime.profile import ModelIdentity, Profile, load_profile
from runtime.transfer.disk import DiskTransfer
from runtime.transfer.slots import SlotArena
from runtime.transfer.store import ExpertLayer, ExpertStore
from runtime.vocabulary import Load, Phase


@dataclass(frozen=True)
class ModelFacts:
    """What can be said of a checkpoint without loading its weights. Bytes are those of the dtype it is computed in."""

    identity: ModelIdentity
    config: PreTrainedConfig
    num_experts_total: int
    top_k: int
    expert_bytes: int
    slot_bytes: int
    dense_bytes: int


def describe(model: str | Path, *, dtype: torch.dtype | str = "auto") -> ModelFacts:
    """Facts of a checkpoint folder or hub id; raises what loading it would raise for a model that cannot be served."""
    loaded = meta_model(str(model), dtype=dtype)
    return _facts(loaded)


def _facts(loaded: LoadedModel) -> ModelFacts:
    layers, config = loaded.layers, loaded.model.config
    expert_bytes = max(layer.expert_bytes for layer in layers)
    dense = {id(p): p.numel() * p.element_size() for p in loaded.model.parameters()}
    top_k = top_k_of(config)
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
        top_k=top_k,
        expert_bytes=expert_bytes,
        slot_bytes=max(layer.slot_bytes for layer in layers),
        dense_bytes=sum(dense.values()),
    )


def top_k_of(config: PreTrainedConfig) -> int:
    """Experts per token, by the names that transformers' configurations use; 1 where none of them is there."""
    text = config.get_text_config()
    for name in ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k"):
        value = getattr(text, name, None)
        if value is not None:
            return int(max(value) if isinstance(value, (list, tuple)) else value)
    return 1


def load(
    source: str | Path | Profile,
    model: str | Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = "auto",
    record_loads: bool = False,
) -> Engine:
    """Load a model with its experts offloaded.

    Args:
        source: a profile (path of a .yaml file, or a `Profile`), or a checkpoint (folder or hub id), which then runs with
            the default profile.
        model: the checkpoint, where `source` is a profile that was tuned on a copy elsewhere.
        overrides: dotted profile keys and their values, such as {"cache.slots": "25%"}.
        dtype: as in `from_pretrained`.
        record_loads: keep `Engine.needed_loads`.

    Raises:
        ExpertFlowError: one of its kinds, saying what is wrong and the way out.
    """
    profile, checkpoint = _profile_and_checkpoint(source, model)
    profile = profile.with_overrides(overrides or {})
    torch.set_num_threads(profile.compute.threads)
    facts = describe(checkpoint, dtype=dtype)
    notes = list(_match(profile, facts))
    profile, clamped = resolve(profile, facts)
    loaded = load_offloaded(checkpoint, dtype=dtype)
    passes = PassTracker()
    passes.attach(loaded.model)
    needed: list[Load] | None = [] if record_loads else None
    pools, predictor_notes = _build_pools(loaded, profile, facts, passes, needed)
    _install(loaded, _offloaded_sources(loaded, pools, passes), profile, passes)
    return Engine(loaded.model, profile, pools, passes, checkpoint, [*notes, *clamped, *predictor_notes], needed)


def load_reference(
    source: str | Path | Profile,
    model: str | Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = "auto",
) -> Engine:
    """The whole model in memory, through the same kernels and threads: what an offloaded engine must equal to the bit."""
    profile, checkpoint = _profile_and_checkpoint(source, model)
    profile = profile.with_overrides(overrides or {})
    torch.set_num_threads(profile.compute.threads)
    loaded = load_resident(checkpoint, dtype=dtype)
    passes = PassTracker()
    passes.attach(loaded.model)
    sources = [
        ResidentSource(module, [parameter.name for parameter in layer.parameters])
        for module, layer in zip(loaded.modules, loaded.layers, strict=True)
    ]
    _install(loaded, sources, profile, passes)
    return Engine(loaded.model, profile, (), passes, checkpoint)


def resolve(profile: Profile, facts: ModelFacts) -> tuple[Profile, list[str]]:
    """The profile with its number of slots settled against the memory that is free now, and notes on what was changed.

    Raises:
        BudgetError: not even one slot fits.
    """
    wanted = _wanted_slots(profile.cache.slots, facts.num_experts_total)
    limit = machine.resident_bytes() + machine.available_memory_bytes()
    if profile.limits is not None and profile.limits.max_memory_bytes is not None:
        limit = min(limit, profile.limits.max_memory_bytes)
    fit = machine.slots_that_fit(
        limit,
        dense_bytes=facts.dense_bytes,
        slot_bytes=facts.slot_bytes,
        kv_bytes=profile.cache.kv_bytes or 0,
        buffer_bytes=machine.resident_bytes() + BUFFER_BYTES,
    )
    slots = min(wanted, fit, facts.num_experts_total)
    notes = []
    if slots < wanted and profile.cache.slots is not None:
        notes.append(f"{wanted} slots asked for, {slots} fit the memory: {machine.format_bytes(limit)} in all")
    return profile.with_overrides({"cache.slots": slots}), notes


# Activations, the tokenizer, and what loading takes for a moment beside the weights (measured, results/LOG.md).
BUFFER_BYTES = 96 << 20


def _wanted_slots(slots: int | str | None, num_experts: int) -> int:
    if slots is None:
        return num_experts
    if isinstance(slots, str):
        return max(1, round(num_experts * float(slots.rstrip("%")) / 100))
    return slots


def _profile_and_checkpoint(source: str | Path | Profile, model: str | Path | None) -> tuple[Profile, str]:
    is_profile = isinstance(source, Profile) or str(source).endswith((".yaml", ".yml"))
    if not is_profile:
        if model is not None:
            raise ProfileError(f"{source} is not a profile (.yaml) but a model is named as well: {model}; give only one")
        return Profile.default(), str(source)
    profile = source if isinstance(source, Profile) else load_profile(Path(source))
    known = profile.provenance.model if profile.provenance is not None else None
    if model is None and known is None:
        raise ProfileError("the profile does not say where its model is; name the checkpoint as well (--model)")
    return profile, str(model if model is not None else known)


def _match(profile: Profile, facts: ModelFacts) -> list[str]:
    result = match_profile(profile, facts.identity, machine_facts())
    if result.level == "rejected":
        raise ProfileError(f"the profile does not fit: {'; '.join(result.reasons)}; tune one: python -m harness.tune")
    return [] if result.level == "exact" or profile.match is None else [f"profile {result.level}: {r}" for r in result.reasons]


def machine_facts() -> MachineFacts:
    """This machine, as profiles match it; the bandwidth is not measured here."""
    return MachineFacts(device="cpu", memory_total_bytes=machine.total_memory_bytes())


def _install(
    loaded: LoadedModel, sources: list[ResidentSource] | list[OffloadedSource], profile: Profile, passes: PassTracker
) -> None:
    """Give every experts module its runner and switch the model to our implementation."""
    kernels = {Phase.PREFILL: KERNELS[profile.compute.prefill], Phase.DECODE: KERNELS[profile.compute.decode]}
    register()
    for module, source in zip(loaded.modules, sources, strict=True):
        module._expertflow = LayerRunner(module, source, lambda: kernels[passes.current.phase])
    loaded.model.set_experts_implementation(IMPLEMENTATION)


def _build_pools(
    loaded: LoadedModel, profile: Profile, facts: ModelFacts, passes: PassTracker, needed: list[Load] | None
) -> tuple[list[Pool], list[str]]:
    """One pool per expert shape; the slots are divided in proportion to their experts."""
    members: dict[Any, list[int]] = defaultdict(list)
    for index, layer in enumerate(loaded.layers):
        members[layer.num_experts, layer.parameters].append(index)
    total = int(profile.cache.slots)
    if total < len(members):
        raise BudgetError(f"{total} slots for {len(members)} shapes of experts: each needs at least 1; raise the limit")
    pools, notes = [], []
    for layers in members.values():
        share = sum(loaded.layers[i].num_experts for i in layers) / facts.num_experts_total
        predictor, note = _build_predictor(loaded, layers, profile)
        pools.append(_build_pool(loaded, layers, max(1, int(total * share)), predictor, profile, facts, needed))
        passes.listeners.append(predictor.begin)
        notes.extend(note)
    return pools, notes


def _build_pool(
    loaded: LoadedModel,
    layers: list[int],
    num_slots: int,
    predictor: Predictor,
    profile: Profile,
    facts: ModelFacts,
    needed: list[Load] | None,
) -> Pool:
    store = ExpertStore.open(loaded.model, loaded.files, [loaded.layers[i] for i in layers])
    arena = SlotArena(num_slots, store.slot_bytes)
    transfer = DiskTransfer(store, arena, io_threads=profile.transfer.io_threads)
    residency = Residency(len(layers), store.num_experts, num_slots, facts.top_k, profile.cache.policy)
    coordinator = Coordinator(
        residency,
        transfer,
        predictor,
        prefetch_depth=0 if isinstance(predictor, NoPredictor) else profile.prefetch.depth,
        prefetch_count=profile.prefetch.count,
        predict_every=profile.predictor.every,
        needed_loads=needed,
    )
    return Pool(store, arena, coordinator)


def _build_predictor(loaded: LoadedModel, layers: list[int], profile: Profile) -> tuple[Predictor, list[str]]:
    if profile.predictor.kind == "none" or profile.prefetch.depth == 0:
        return NoPredictor(), []
    hidden_size = loaded.model.config.get_text_config().hidden_size
    found: list[LookaheadRouter] = []
    pairs = routers_and_norms(loaded)
    for index in layers:
        router, norm = pairs[index]
        asked = "no router beside the experts" if router is None else lookahead_router(router, norm, hidden_size)
        if isinstance(asked, str):
            return NoPredictor(), [f"gate_lookahead is not available for this model, nothing is prefetched: {asked}"]
        found.append(asked)
    return GateLookahead(found, loaded.layers[layers[0]].num_experts, profile.prefetch.depth), []


def _offloaded_sources(loaded: LoadedModel, pools: list[Pool], passes: PassTracker) -> list[OffloadedSource]:
    by_prefix = {
        prefix: OffloadedSource(pool, index, lambda: passes.current)
        for pool in pools
        for index, prefix in enumerate(pool.store.prefixes)
    }
    return [by_prefix[layer.prefix] for layer in loaded.layers]
