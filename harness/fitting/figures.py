"""What a trained predictor reached on held-out requests, beside the baselines that it must beat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from harness.measure.prediction import Judge, Ranks, popularity_in, ratios
from runtime.trace import NO_PREDICTION, RoutingTrace

_TOGETHER = 8  # requests of a batch


def compared(ranks: Ranks, train: RoutingTrace, held: RoutingTrace) -> dict[str, float]:
    """Figures (`harness.measure.prediction.ratios`) of forecasts, of previous token and of popularity.

    Args:
        ranks: what was forecast for the tokens of `held`.
        train: the requests that popularity is of.
    """
    popularity = popularity_in(train)
    judge = Judge(held, popularity, min(_TOGETHER, len(np.unique(held.request))))
    own, previous, popular = (
        ratios(judge.counts(of).sum().to_frame().T).iloc[0]
        for of in (ranks, _previous(held), _popular(popularity, held))
    )
    figures = {
        "recall_at_k": own["recall_at_k"],
        "recall_at_k_of_previous_token": previous["recall_at_k"],
        "recall_at_k_of_popularity": popular["recall_at_k"],
        "recall_at_k_plus_3": own["recall_at_k_plus_3"],
        "batch_recall": own["batch_recall"],
        "batch_recall_of_popularity": own["batch_recall_of_popularity"],
        "batch_recall_of_previous_token": previous["batch_recall"],
        "batch_precision": own["batch_precision"],
        "batch_precision_of_all_experts": own["batch_needed"] / held.num_experts,
    }
    return {name: float(value) for name, value in figures.items()}


def rows_by_request(trace: RoutingTrace) -> list[npt.NDArray[np.int64]]:
    """The places of each request's tokens in the trace."""
    order = np.argsort(trace.request, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(trace.request[order])) + 1)


def _previous(trace: RoutingTrace) -> Ranks:
    """What the token before in the same request chose; the first one has none."""
    ranks = np.full(trace.experts.shape, NO_PREDICTION, np.uint16)
    for rows in rows_by_request(trace):
        ranks[rows[1:]] = trace.experts[rows[:-1]]
    return ranks


def _popular(popularity: npt.NDArray[np.float32], trace: RoutingTrace) -> Ranks:
    order = np.argsort(-popularity, axis=1, kind="stable")[:, : trace.top_k]
    return np.broadcast_to(order.astype(np.uint16), trace.experts.shape)
