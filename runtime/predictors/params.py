"""What a profile may say in `predictor.params`, per kind of predictor."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NoParams(_Params):
    """The predictor has none."""


class ActivationMatrixParams(_Params):
    """Of `activation_matrix`."""

    capacity: Annotated[int, Field(ge=1)] = 120
    """Activation matrices that the collection holds for each phase."""
    matches: Annotated[int, Field(ge=1)] = 1
    """Nearest matrices that are summed into a forecast."""


class RoutingPathParams(_Params):
    """Of `routing_path`."""

    context: Annotated[int, Field(ge=1)] = 128
    """Tokens before the one at hand that the encoder reads."""


class PeriodicParams(_Params):
    """Of `periodic`."""

    model: str = "sequence"
    """`sequence`: the trained model of the artefact; `frequency`: decayed frequencies of past prompts, no training."""
    skip_insensitive: bool = True
    """Forecast nothing for layers whose routing does not matter to the running tasks, as the artefact measured."""


PREDICTOR_PARAMS: dict[str, type[_Params]] = {
    "none": NoParams,
    "previous_token": NoParams,
    "gate_lookahead": NoParams,
    "activation_matrix": ActivationMatrixParams,
    "routing_path": RoutingPathParams,
    "periodic": PeriodicParams,
}

TRAINED: dict[str, bool] = {"activation_matrix": False, "routing_path": True, "periodic": False}
"""Predictors that load an artefact, and whether they cannot do without."""
