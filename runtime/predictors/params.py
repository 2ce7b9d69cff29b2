"""What a profile may say in `predictor.params`, per kind of predictor."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NoParams(_Params):
    """The predictor has none."""


class ActivationMatrixParams(_Params):
    """Of `activation_matrix`."""

    capacity: Annotated[int, Field(ge=1)] = 120
    """Activation matrices that the collection holds for each phase."""
    matches: Annotated[int, Field(ge=1)] = 3
    """Nearest matrices that are summed into a forecast."""


class RoutingPathParams(_Params):
    """Of `routing_path`."""

    context: Annotated[int, Field(ge=1)] = 128
    """Tokens before the one at hand that the encoder reads."""


class PeriodicParams(_Params):
    """Of `periodic`."""

    model: Literal["auto", "sequence", "frequency"] = "auto"
    """`sequence`: the trained model of the artefact; `frequency`: decayed frequencies of past prompts, no training;
    `auto`: the first where there is an artefact, else the second."""
    skip_insensitive: bool = True
    """Forecast nothing for layers whose routing does not matter to the running tasks, as the artefact measured."""


PREDICTOR_PARAMS: dict[str, type[_Params]] = {
    "none": NoParams,
    "previous_token": NoParams,
    "gate_lookahead": NoParams,
    "activation_matrix": ActivationMatrixParams,
    "routing_path": RoutingPathParams,
    "periodic": PeriodicParams,
    "sequence": NoParams,
}

_PERIODS: dict[str, tuple[int, str]] = {"periodic": (40, "prompt")}


def default_period(kind: str) -> tuple[int, str]:
    """How often a predictor predicts where nobody says, and the unit: `every` and `every_unit` of a profile."""
    return _PERIODS.get(kind, (1, "step"))


TRAINED: dict[str, bool] = {"activation_matrix": False, "routing_path": True, "periodic": False, "sequence": True}
"""Predictors that load an artefact, and whether they cannot do without."""

LEARNING = frozenset({"activation_matrix"})
"""Predictors whose artefact the engine itself writes (`Engine.save_predictor`): at the first start it is not there."""
