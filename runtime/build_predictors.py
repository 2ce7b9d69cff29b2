"""What is known of experts before their routers speak, and what goes by it. Part of the composition root."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from runtime.cache.policies import FORESEEING
from runtime.engine import Engine
from runtime.errors import UnsupportedModelError
from runtime.facts import top_k_of
from runtime.model import LoadedModel, routers_and_norms
from runtime.passes import PassTracker
from runtime.pool import Pool
from runtime.predictors.artifact import RoutingShape
from runtime.predictors.base import NoPredictor, Predictor, RoutePredictor
from runtime.predictors.gate_lookahead import (
    GateLookahead,
    LookaheadRouter,
    RankedLookahead,
    RouterInput,
    lookahead_router,
)
from runtime.predictors.make import PredictorSpec, make_predictor
from runtime.predictors.params import LEARNING
from runtime.profile import LOSSY, Profile
from runtime.substitute import PHASES, Substitution, substitution_of


def build_routes(engine: Engine) -> RoutePredictor | None:
    """What predicts routes for a token scheduler: the trained `routing_path` of the engine's profile, if it has one."""
    section = engine.profile.predictor
    if section.kind != "routing_path" or section.artifact is None or engine.num_pools > 1:
        return None
    return route_predictor(engine, Path(section.artifact), section.params)


def route_predictor(engine: Engine, artifact: Path, params: Mapping[str, Any] | None = None) -> RoutePredictor:
    """A new routing path predictor: a scheduler's is asked in another thread than the one that prefetching goes by.

    Raises:
        ArtifactError: see `read_artifact`.
    """
    shape = RoutingShape(*engine.routing_shape, top_k_of(engine.model.config) or 1)
    found = make_predictor(PredictorSpec("routing_path", artifact, params or {}), shape)
    assert isinstance(found, RoutePredictor)
    return found


def build_predictor(
    loaded: LoadedModel, layers: list[int], profile: Profile
) -> tuple[Predictor, list[Callable[[], torch.Tensor | None]], list[str]]:
    """The predictor of a pool, what to show it of each layer, and notes."""
    nothing: list[Callable[[], torch.Tensor | None]] = [lambda: None] * len(layers)
    section, num_experts = profile.predictor, loaded.layers[layers[0]].num_experts
    is_asked = profile.prefetch.depth > 0 or profile.cache.policy in FORESEEING or profile.numerics in LOSSY
    if section.kind == "none" or not is_asked:
        return NoPredictor(), nothing, []
    if section.kind != "gate_lookahead":
        if section.artifact is not None and len(layers) < len(loaded.layers):
            return NoPredictor(), nothing, [f"{section.kind} is not available for a model with several expert shapes"]
        artifact, notes = None if section.artifact is None else Path(section.artifact), []
        if artifact is not None and section.kind in LEARNING and not os.path.exists(artifact):
            notes.append(f"{artifact} is not there yet: {section.kind} starts with nothing learned")
            artifact = None
        shape = RoutingShape(len(layers), num_experts, top_k_of(loaded.model.config) or 1)
        spec = PredictorSpec(section.kind, artifact, section.params, section.every, section.every_unit)
        return make_predictor(spec, shape), nothing, notes
    found = _lookahead_routers(loaded, layers)
    if isinstance(found, str):
        why = f"gate_lookahead is not available for this model, nothing is prefetched: {found}"
        return NoPredictor(), nothing, [why]
    predictor = GateLookahead(found, num_experts, max(profile.prefetch.depth, 1))
    return predictor, [RouterInput(router.module) for router in found], []


def _lookahead_routers(loaded: LoadedModel, layers: Sequence[int]) -> list[LookaheadRouter] | str:
    """The routers of `layers`, ready to be asked; else the reason why one of them cannot be."""
    hidden_size = loaded.model.config.get_text_config().hidden_size
    found: list[LookaheadRouter] = []
    pairs = routers_and_norms(loaded)
    for index in layers:
        router, norm = pairs[index]
        asked = "no router beside the experts" if router is None else lookahead_router(router, norm, hidden_size)
        if isinstance(asked, str):
            return asked
        found.append(asked)
    return found


def ranked_lookahead(loaded: LoadedModel, depth: int) -> RankedLookahead | str:
    """The lookahead that traces record, over all MoE layers of the model, whatever their pools."""
    routers = _lookahead_routers(loaded, range(len(loaded.layers)))
    return routers if isinstance(routers, str) else RankedLookahead(routers, depth)


def build_substitutions(
    loaded: LoadedModel, layers: list[int], pool: Pool, profile: Profile, passes: PassTracker
) -> list[Substitution | None]:
    """What reroutes each layer of a pool: nothing, unless the profile asks for it.

    Raises:
        UnsupportedModelError: its routers do not say what it takes.
    """
    if profile.numerics not in LOSSY:
        return [None] * len(layers)
    routers = _lookahead_routers(loaded, layers)
    if isinstance(routers, str):
        family = loaded.model.config.model_type
        raise UnsupportedModelError(
            f"numerics {profile.numerics} cannot be had for {family}: {routers}; set numerics: exact"
        )
    residency, phases = pool.coordinator.residency, PHASES[profile.numerics]
    return [
        substitution_of(router.module, residency, turn, lambda: passes.current.phase in phases)
        for turn, router in enumerate(routers)
    ]
