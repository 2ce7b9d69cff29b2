"""What every fit shares: its options, its result, joining traces, and the split by request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.errors import TraceError
from runtime.predictors.artifact import Artifact, RoutingShape
from runtime.trace import RoutingTrace


@dataclass(frozen=True)
class FitOptions:
    """How to train.

    Attributes:
        validation_share: of the requests, held out for early stopping and for the figures that are reported.
        seed: of the split, the initial weights and the order of batches.
        epochs: passes over the training part at most.
        patience: epochs without a better validation loss after which training stops.
        threads: CPU threads.
    """

    validation_share: float = 0.2
    seed: int = 0
    epochs: int = 30
    patience: int = 3
    threads: int = 1


@dataclass(frozen=True)
class FitResult:
    """The predictor with the lowest validation loss, and what it reached on the validation part, by name."""

    artifact: Artifact
    figures: Mapping[str, float]


class Fit(Protocol):
    """Trains one kind of predictor."""

    def __call__(self, trace: RoutingTrace, options: FitOptions, *, quiet: bool) -> FitResult:
        """Train on `trace`, with a progress bar on stderr unless `quiet`.

        Raises:
            TraceError: the trace lacks a field that this predictor needs, or has too few requests to hold some out.
        """
        ...


def split(trace: RoutingTrace, options: FitOptions) -> tuple[RoutingTrace, RoutingTrace]:
    """The training and the validation part: whole requests, drawn by `options.seed`.

    Raises:
        TraceError: fewer than two requests.
    """
    requests = np.unique(trace.request)
    if requests.size < 2:
        raise TraceError(
            "request: a predictor is trained on some requests and judged on others; 2 are needed, this has 1"
        )
    held = np.random.default_rng(options.seed).permutation(requests)
    held = held[: min(max(1, round(requests.size * options.validation_share)), requests.size - 1)]
    is_held = np.isin(trace.request, held)
    return rows_of(trace, ~is_held), rows_of(trace, is_held)


def rows_of(trace: RoutingTrace, rows: np.ndarray) -> RoutingTrace:
    """The tokens that `rows` (a mask or indices) selects, with all that is known of them."""
    names = ("experts", "request", "weights", "token_ids", "step", "phase", "predicted")
    arrays = {name: getattr(trace, name) for name in names}
    return replace(trace, **{name: array[rows] for name, array in arrays.items() if array is not None})


def routing_shape(trace: RoutingTrace) -> RoutingShape:
    """What a predictor of this trace's model must know."""
    return RoutingShape(trace.num_layers, trace.num_experts, trace.top_k)


def model_name(trace: RoutingTrace) -> str:
    """Name of the model that the trace is of; "unknown" where it does not say."""
    return str(trace.meta.get("model") or "unknown")


def joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Several traces of one model as one: their requests and passes renumbered, fields that not all have left out.

    Where nothing was decoded, it is taken as text to be decoded: what routers choose does not depend on that.

    Raises:
        TraceError: they are of different models, or of models of different shapes.
    """
    joint = _joined(traces)
    is_text = joint.phase is not None and not joint.phase.any()
    return replace(joint, phase=None, step=None) if is_text else joint


def _joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    first = traces[0]
    if len(traces) == 1:
        return first
    for trace in traces[1:]:
        one, other = (f"{model_name(of)} ({', '.join(map(str, routing_shape(of)))})" for of in (first, trace))
        if one != other:
            raise TraceError(f"traces of different models cannot be joined: {one} and {other} (layers, experts, top_k)")
    numbers = [np.unique(trace.request, return_inverse=True) for trace in traces]
    tasks = [trace.task(int(old)) for trace, (olds, _) in zip(traces, numbers, strict=True) for old in olds]
    names = ("experts", "weights", "token_ids", "phase", "predicted")
    parts = {name: [array for trace in traces if (array := getattr(trace, name)) is not None] for name in names}
    return RoutingTrace(
        request=_one_after_the_other([new for _, new in numbers]),
        step=_one_after_the_other([np.arange(t.num_tokens) if t.step is None else t.step for t in traces]),
        meta={**first.meta, "tasks": tasks},
        **{name: np.concatenate(arrays) for name, arrays in parts.items() if len(arrays) == len(traces)},
    )


def _one_after_the_other(numbers: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int32]:
    """Each part's numbers after those of the part before."""
    before = np.cumsum([0, *(int(part.max()) + 1 for part in numbers[:-1])])
    return np.concatenate([part + start for part, start in zip(numbers, before, strict=True)]).astype(np.int32)
