"""The contract of a predictor, and the null member of the family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from runtime.predictors.artifact import Artifact
from runtime.vocabulary import Pass

Forecast = npt.NDArray[np.float32]

BEFORE_FIRST_LAYER = -1
"""The `layer` of a forecast that is asked for after `begin` and before any layer has been routed."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What one MoE layer saw and chose in one pass.

    Attributes:
        passing: the forward pass.
        experts: int64 [tokens, top_k], the router's choice (indices within the layer), as the router ordered them;
            indices past the last expert mean none.
        answers: gives what the predictor's `ask` named, on the host; nothing where there is no model, as in a replay.
    """

    passing: Pass
    experts: npt.NDArray[np.int64]
    answers: Callable[[], Sequence[npt.NDArray[Any]]] = tuple


class Predictor(ABC):
    """Forecasts which experts the coming layers of a pass will need.

    The coordinator calls `begin` once per forward pass and `forecast(BEFORE_FIRST_LAYER)`, then `observe` and
    `forecast` for each MoE layer in execution order. A predictor owns its state and mutates nothing that it is given.
    `observe` may be skipped for passes (predictor frequency); `forecast` then answers from what is known. What
    `forecast` returns belongs to the predictor and may change with its next call. `ask` comes before each `observe`,
    which finds its answers in the observation: a device may need time for them, and brings them with what else the
    host has to know of the layer.

    Attributes:
        by_likelihood: experts are to be prefetched in descending order of the forecast times the layer's proximity, 1
            less layers ahead over layers in all (MoE-Infinity), instead of layer by layer in execution order.
        sees_next_pass: rows of the forecast up to the layer just routed are about the next pass; otherwise they mean
            nothing.
        reads_hidden: `observe` computes with the router's input, and learns nothing from it that outlasts the pass.
    """

    by_likelihood: bool = False
    sees_next_pass: bool = False
    reads_hidden: bool = False

    def begin(self, passing: Pass) -> None:  # noqa: B027 -- optional: most predictors only need `observe`
        """A forward pass starts; the one before it, if any, is complete."""

    def ask(self, layer: int, hidden: Any) -> Sequence[Any]:
        """Tensors on the compute device that `observe` wants to see on the host; they need not be computed yet.

        Args:
            hidden: the input of the router of `layer`, [tokens, hidden], a tensor on the compute device.
        """
        return ()

    @abstractmethod
    def observe(self, layer: int, observation: Observation) -> None:
        """Layer `layer` (index in the pool) has been routed."""

    @abstractmethod
    def forecast(self, layer: int) -> Forecast | None:
        """Expected tokens per expert, float32 [layers, experts], when `layer` has just been routed.

        Rows after `layer` are about this pass; for the others see `sees_next_pass`. None: no forecast (yet).
        """

    def waits(self) -> Forecast | None:
        """How long eviction may let go of each expert, float32 [layers, experts]; asked for after `forecast`.

        Tokens expected until it is used again, counted from its layer's next turn: 0 where that turn will use it. Those
        far ahead may count for less. Of requests decoded together, until any of them uses it. None: not known.
        """
        return None

    def artifact(self, model: str) -> Artifact | None:
        """What it has learned while running, to be made from again after a restart; None: it learns nothing to keep.

        Called between passes, and changes nothing. `model` is the name of the model that runs.
        """
        return None


class NoPredictor(Predictor):
    """Forecasts nothing: the floor that every predictor must beat."""

    def observe(self, layer: int, observation: Observation) -> None:
        """Ignored."""

    def forecast(self, layer: int) -> None:
        """Always None."""
        return None


@runtime_checkable
class RoutePredictor(Protocol):
    """Knows the route of tokens before they are computed; what token schedulers ask."""

    def routes(self, contexts: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
        """Predicted route of the last token of each context: bool [contexts, layers, experts], top_k true per layer.

        Args:
            contexts: token ids of each request so far, its next token to be computed last; none is empty.
        """
        ...
