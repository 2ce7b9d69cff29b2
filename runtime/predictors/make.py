"""Predictors by name, for the engine and replays; `gate_lookahead`, which needs a model or a recording, is theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.errors import UsageError
from runtime.predictors.artifact import Artifact, RoutingShape, read_artifact
from runtime.predictors.base import NoPredictor, Predictor
from runtime.predictors.params import TRAINED, ActivationMatrixParams, PeriodicParams, RoutingPathParams
from runtime.predictors.previous_token import PreviousToken


@dataclass(frozen=True)
class PredictorSpec:
    """Which predictor to make: a profile's `predictor` section, its artefact's path made absolute.

    Attributes:
        every, every_unit: prompts or steps between two predictions; acted on here only by `periodic`.
        model: name of the model, where the artefact must be for exactly that.
    """

    kind: str
    artifact: Path | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    every: int = 1
    every_unit: str = "step"
    model: str | None = None


def make_predictor(spec: PredictorSpec, shape: RoutingShape) -> Predictor:
    """The predictor for a model of `shape`, its artefact loaded. Torch is imported only by those that need it.

    Raises:
        ArtifactError: see `read_artifact`.
        UsageError: a predictor that cannot do without an artefact has none.
    """
    artifact = None
    if spec.artifact is not None:
        artifact = read_artifact(spec.artifact, kind=spec.kind, shape=shape, model=spec.model)
    elif TRAINED.get(spec.kind):
        raise UsageError(f"predictor {spec.kind!r} needs an artefact; train one: python -m harness.fit {spec.kind}")
    return _MAKERS[spec.kind](spec, shape, artifact)


def _activation_matrix(spec: PredictorSpec, shape: RoutingShape, artifact: Artifact | None) -> Predictor:
    from runtime.predictors.activation_matrix import ActivationMatrix

    return ActivationMatrix(shape, ActivationMatrixParams.model_validate(spec.params), artifact)


def _routing_path(spec: PredictorSpec, shape: RoutingShape, artifact: Artifact | None) -> Predictor:
    from runtime.predictors.routing_path import RoutingPath

    assert artifact is not None
    return RoutingPath(artifact, RoutingPathParams.model_validate(spec.params))


def _periodic(spec: PredictorSpec, shape: RoutingShape, artifact: Artifact | None) -> Predictor:
    from runtime.predictors.periodic import Periodic

    params = PeriodicParams.model_validate(spec.params)
    return Periodic(shape, params, artifact, every=spec.every, every_unit=spec.every_unit)


def _sequence(spec: PredictorSpec, shape: RoutingShape, artifact: Artifact | None) -> Predictor:
    from runtime.predictors.sequence import SequencePredictor

    assert artifact is not None
    return SequencePredictor(artifact)


_MAKERS: dict[str, Callable[[PredictorSpec, RoutingShape, Artifact | None], Predictor]] = {
    "none": lambda spec, shape, artifact: NoPredictor(),
    "previous_token": lambda spec, shape, artifact: PreviousToken(shape.layers, shape.experts),
    "activation_matrix": _activation_matrix,
    "routing_path": _routing_path,
    "periodic": _periodic,
    "sequence": _sequence,
}
