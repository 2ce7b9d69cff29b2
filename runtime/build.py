"""The composition root: a profile becomes an engine. The only place that names concrete classes, together with
`build_tiers` (where experts rest) and `build_predictors` (what is known of them before their routers speak)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from runtime import machine
from runtime.build_predictors import build_predictor, build_substitutions, ranked_lookahead
from runtime.build_tiers import Tier, cpu_tier, gpu_tier, plan_host_tier
from runtime.cache.coordinator import Coordinator
from runtime.cache.governor import Governor
from runtime.cache.miss import Misses, MissSplit
from runtime.cache.residency import Residency
from runtime.devices import in_turn, is_gpu
from runtime.engine import Engine
from runtime.errors import BudgetError
from runtime.experts import IMPLEMENTATION, ExpertSource, LayerRunner, ResidentSource, register
from runtime.facts import ModelFacts, pool_layers, resolve, wanted_slots
from runtime.host_experts import HostLayer
from runtime.kernels import KERNELS, Kernel
from runtime.loading import choose
from runtime.miss_rates import rates_of
from runtime.model import LoadedModel, load_offloaded, load_resident
from runtime.passes import PassTracker
from runtime.pool import OffloadedSource, Pool
from runtime.predictors.base import NoPredictor, Predictor
from runtime.profile import LOSSY, Profile
from runtime.readback import Reader, reader_for
from runtime.transfer.store import ExpertStore
from runtime.vocabulary import Load, Phase


def load(
    source: str | Path | Profile,
    model: str | Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    record_loads: bool = False,
    strict: bool = False,
    probe: bool | float = False,
) -> Engine:
    """Load a model with its experts offloaded.

    Args:
        source: a profile (a .yaml file by its path, by its name or id where profiles are looked up, or a `Profile`), or
            a checkpoint (folder or hub id), which then runs with the best profile found for it, else the default.
        model: the checkpoint, where `source` is a profile that was tuned on a copy elsewhere.
        overrides: dotted profile keys and their values, such as {"cache.slots": "25%"}.
        dtype: as in `from_pretrained`.
        device: where it computes, such as "cuda:0"; experts then rest in host memory. None: the GPU that the profile
            was tuned on, else the CPU, with experts left on disk.
        record_loads: keep `Engine.needed_loads`.
        strict: refuse a profile that is stale or for something else; else `Engine.notes` says so, and its fallback
            runs instead of one that is for something else.
        probe: measure the bandwidth at expert size first, for two seconds or as many as are given, and hold it against
            the profile's: from the disk, or to a GPU from pinned host memory.

    Raises:
        ExpertFlowError: one of its kinds, saying what is wrong and the way out.
    """
    machine.return_freed_memory()
    machine.limit_matmul_caches()
    chosen = choose(source, model, overrides=overrides, dtype=dtype, device=device, strict=strict, probe=probe)
    checkpoint, facts, place = chosen.checkpoint, chosen.facts, chosen.device
    torch.set_num_threads(chosen.profile.compute.threads)
    profile, changed = for_device(chosen.profile, place)
    try:
        profile, clamped = resolve(profile, facts, place)
    except BudgetError as error:  # the limit may be that of a profile which its user did not name
        raise BudgetError("; ".join([str(error), *chosen.notes])) from error
    loaded = load_offloaded(checkpoint, dtype=dtype, device=place)
    passes = PassTracker()
    passes.attach(loaded.model)
    if place.type == "cuda":
        passes.listeners.append(in_turn(place))
    needed: list[Load] | None = [] if record_loads else None
    read = reader_for(place)
    pools, sources, pool_notes = _build_pools(loaded, profile, facts, passes, needed, place, asks_ahead=read.waits)
    runners, kernels = _install(loaded, sources, profile, passes, read)
    for runner, served_from in zip(runners, sources, strict=True):
        runner.substitution, runner.host = served_from.substitution, served_from.host
    notes = [*chosen.notes, *changed, *clamped, *pool_notes, *_inexact_notes(profile)]
    engine = Engine(
        loaded.model, profile, checkpoint, runners, kernels, passes, pools, notes, needed, **_for_traces(loaded, read)
    )
    engine.match = chosen.match
    return engine


def load_reference(
    source: str | Path | Profile,
    model: str | Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
) -> Engine:
    """The whole model in the memory of the device, through the same kernels and threads: what `load` must equal to the
    bit."""
    machine.limit_matmul_caches()  # costs the same time in both
    chosen = choose(source, model, overrides=overrides, dtype=dtype, device=device)
    checkpoint, place = chosen.checkpoint, chosen.device
    torch.set_num_threads(chosen.profile.compute.threads)
    profile, _ = for_device(chosen.profile, place)
    loaded = load_resident(checkpoint, dtype=dtype, device=place)
    passes = PassTracker()
    passes.attach(loaded.model)
    sources = [
        ResidentSource(module, [parameter.name for parameter in layer.parameters])
        for module, layer in zip(loaded.modules, loaded.layers, strict=True)
    ]
    read = reader_for(place)
    runners, kernels = _install(loaded, sources, profile, passes, read)
    return Engine(loaded.model, profile, checkpoint, runners, kernels, passes, **_for_traces(loaded, read))


def for_device(profile: Profile, device: torch.device) -> tuple[Profile, list[str]]:
    """The profile with what runs on `device`, and notes on what was changed."""
    changed: dict[str, Any] = {}
    notes: list[str] = []
    if is_gpu(device):
        if profile.compute.decode == "gemv":
            changed["compute.decode"] = _GPU_DECODE
            notes.append(f"decode kernel gemv is for the CPU: {_GPU_DECODE} on {device}")
        return profile.with_overrides(changed), notes
    if profile.miss != "copy":
        changed["miss"] = "copy"
        notes.append(f"miss {profile.miss} is for a GPU: on the CPU misses are loaded, and results are exact")
    if profile.tiers is not None and profile.tiers.host_bytes is not None:
        notes.append("tiers.host_bytes is for a GPU: on the CPU experts come from disk into cache.slots")
    return profile.with_overrides(changed), notes


# One product of cuBLAS per matrix, which reads it once.
_GPU_DECODE = "eager"


def _install(
    loaded: LoadedModel, sources: Sequence[ExpertSource], profile: Profile, passes: PassTracker, read: Reader
) -> tuple[list[LayerRunner], dict[Phase, type[Kernel]]]:
    """Give every experts module its runner and switch the model to our implementation."""
    kernels = {Phase.PREFILL: KERNELS[profile.compute.prefill], Phase.DECODE: KERNELS[profile.compute.decode]}
    register()
    runners = []
    for module, source in zip(loaded.modules, sources, strict=True):
        module._expertflow = LayerRunner(module, source, lambda: kernels[passes.current.phase], read)
        runners.append(module._expertflow)
    loaded.model.set_experts_implementation(IMPLEMENTATION)
    if (generation := getattr(loaded.model, "generation_config", None)) is not None:  # token classifiers have none
        # On a GPU with a static cache `generate` would compile what looks at the host for every layer.
        generation.disable_compile = True
    return runners, kernels


def _build_pools(
    loaded: LoadedModel,
    profile: Profile,
    facts: ModelFacts,
    passes: PassTracker,
    needed: list[Load] | None,
    device: torch.device,
    *,
    asks_ahead: bool,
) -> tuple[list[Pool], list[OffloadedSource], list[str]]:
    """One pool per expert shape, its slots in proportion to its experts; the source of every layer; notes."""
    pools: list[Pool] = []
    sources: dict[int, OffloadedSource] = {}
    notes: list[str] = []
    total = wanted_slots(profile.cache.slots, facts.num_experts_total)
    members = pool_layers(loaded.layers)
    stores = [ExpertStore.open(loaded.model, loaded.files, [loaded.layers[i] for i in layers]) for layers in members]
    if total < len(members):
        raise BudgetError(f"{total} slots for {len(members)} shapes of experts: each needs at least 1; raise the limit")
    plan = plan_host_tier(stores, profile, facts, device) if is_gpu(device) else None
    if plan is not None:
        notes.append(plan.describe())
    for number, (layers, store) in enumerate(zip(members, stores, strict=True)):
        share = sum(loaded.layers[i].num_experts for i in layers) / facts.num_experts_total
        predictor, inputs, note = build_predictor(loaded, layers, profile)
        num_slots = max(1, int(total * share))
        if plan is None:
            tier = cpu_tier(store, num_slots, profile)
        else:
            tier = gpu_tier(store, num_slots, profile, facts, device, plan, number)
        pool = _build_pool(tier, len(layers), predictor, profile, facts, needed)
        hosts, miss_notes = _build_hosts(loaded, layers, pool, profile, device)
        note += tier.notes + miss_notes
        passes.listeners.append(pool.coordinator.begin)
        substitutions = build_substitutions(loaded, layers, pool, profile, passes)
        for turn, (index, router_input, substitution) in enumerate(zip(layers, inputs, substitutions, strict=True)):
            sources[index] = OffloadedSource(
                pool, turn, lambda: passes.current, router_input, substitution, hosts[turn], asks_ahead=asks_ahead
            )
        pools.append(pool)
        notes.extend(note)
    return pools, [sources[index] for index in range(len(loaded.layers))], notes


def _build_hosts(
    loaded: LoadedModel, layers: list[int], pool: Pool, profile: Profile, device: torch.device
) -> tuple[list[HostLayer | None], list[str]]:
    """What computes each layer's share of the misses on the host, where the profile wants that, and the split between
    that and copies; notes."""
    if pool.host is None:
        return [None] * len(layers), []
    # They are asked in passes, when `misses` is there: it goes by rates that are measured with them.
    hosts = [HostLayer(loaded.modules[index], lambda num_routes: misses.may_compute(num_routes)) for index in layers]
    rates = rates_of(pool, hosts, device)
    split = MissSplit(rates, 1.0 if profile.miss == "compute" else profile.compute.host_share)
    pool.coordinator.misses = misses = Misses(split, pool.host, pool.coordinator.residency.num_experts)
    threads = f"{profile.compute.threads} CPU thread{'' if profile.compute.threads == 1 else 's'}"
    note = (
        f"a miss takes {1e3 * rates.copy_s:.3g} ms to copy and {1e3 * rates.compute_s(1):.3g} ms to compute on "
        f"{threads}, at the same time: of 8 misses in a layer, {split.num_copies([1] * 8)} are copied"
    )
    return list(hosts), [note]


def _build_pool(
    tier: Tier,
    num_layers: int,
    predictor: Predictor,
    profile: Profile,
    facts: ModelFacts,
    needed: list[Load] | None,
) -> Pool:
    num_experts, num_slots = tier.places.num_experts, tier.slots.num_slots
    residency = Residency(num_layers, num_experts, num_slots, facts.top_k, profile.cache.policy)
    coordinator = Coordinator(
        residency,
        tier.transfer,
        predictor,
        governor=_governor(predictor, profile),
        prefetch_count=profile.prefetch.count,
        predict_every=profile.predictor.every if profile.predictor.kind != "periodic" else 1,
        refreshes=profile.numerics in LOSSY,
        streams=not tier.slots.is_on_host,
        needed_loads=needed,
    )
    return Pool(tier.places, tier.slots, coordinator, tier.host)


def _governor(predictor: Predictor, profile: Profile) -> Governor:
    section = profile.prefetch
    depth = 0 if isinstance(predictor, NoPredictor) else section.depth
    # Where a miss is not loaded, a decode step is always faster without prefetch, and worse for every one.
    on_trial = section.on_trial and profile.numerics not in LOSSY
    return Governor(depth, adaptive=section.adaptive, on_trial=on_trial)


def _inexact_notes(profile: Profile) -> list[str]:
    if profile.numerics not in LOSSY and profile.miss == "copy":
        return []
    evidence = profile.evidence
    if evidence is None or evidence.kl_nats is None:
        known = "by how much was not measured; python -m harness.quality does, and --write puts it into a profile"
    else:
        error = evidence.max_logit_error
        logits = "" if error is None else f" and up to {error:.3g} in a logit"
        known = f"by {evidence.kl_nats:.4g} nats of KL divergence per token{logits}, as measured"
    return [f"numerics {profile.numerics}: results differ from the exact model's, {known}"]


def _for_traces(loaded: LoadedModel, read: Reader) -> dict[str, Any]:
    """What an engine needs beside itself to record a trace."""
    return {
        "expert_bytes": max(layer.expert_bytes for layer in loaded.layers),
        "ranked_lookahead": partial(ranked_lookahead, loaded),
        "read": read,
    }
