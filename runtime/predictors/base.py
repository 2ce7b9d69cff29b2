"""The contract of a predictor, and the null member of the family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.vocabulary import Pass

Forecast = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Observation:
    """What one MoE layer saw and chose in one pass.

    Attributes:
        passing: the forward pass.
        experts: int64 [tokens, top_k], the router's choice (indices within the layer), as the router ordered them.
        hidden: the router's input [tokens, hidden], a tensor on the compute device; None where nobody asks for it,
        as in
            a replay.
    """

    passing: Pass
    experts: npt.NDArray[np.int64]
    hidden: Any | None = None


class Predictor(ABC):
    """Forecasts which experts the coming layers of a pass will need.

    The coordinator calls `begin` once per forward pass, then `observe` and `forecast` for each MoE layer in
    execution order. A predictor owns its state and mutates nothing that it is given. `observe` may be skipped for
    passes (predictor frequency); `forecast` then answers from what is known.
    """

    def begin(self, passing: Pass) -> None:  # noqa: B027 -- optional: most predictors only need `observe`
        """A forward pass starts."""

    @abstractmethod
    def observe(self, layer: int, observation: Observation) -> None:
        """Layer `layer` (index in the pool) has been routed."""

    @abstractmethod
    def forecast(self, layer: int) -> Forecast | None:
        """Expected tokens per expert, float32 [layers, experts]; rows up to `layer` mean nothing. None: no forecast."""


class NoPredictor(Predictor):
    """Forecasts nothing: the floor that every predictor must beat."""

    def observe(self, layer: int, observation: Observation) -> None:
        """Ignored."""

    def forecast(self, layer: int) -> None:
        """Always None."""
        return None
