"""How well predictors forecast the routing of a trace: which experts they pick, and what of it was right, by layer.

Every token is forecast by itself, as a pass of one token. What a predictor *picks* for a token and a layer is the
top_k of its forecast, without the experts that it gives nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import pandas as pd

from harness.measure.schedule import Schedule
from runtime.errors import UsageError
from runtime.predictors.base import BEFORE_FIRST_LAYER, Forecast, Observation, Predictor
from runtime.trace import NO_PREDICTION, RoutingTrace

Ranks = npt.NDArray[np.uint16]
"""Experts by descending forecast, [tokens, layers, ranks]; `NO_PREDICTION` where no further one is forecast."""

MORE = 3
"""Ranks beyond top_k that recall is given for as well."""

FIGURES = (
    "recall_at_k",
    "recall_at_k_plus_3",
    "precision",
    "coverage",
    "batch_recall",
    "batch_recall_of_popularity",
    "batch_precision",
    "batch_picked",
    "batch_needed",
)


class Popularity(Predictor):
    """Every token will choose what tokens chose most so far: a static ranking, the baseline of no adaptation.

    Args:
        popularity: share of earlier tokens that chose each expert, [layers, experts].
    """

    sees_next_pass = True

    def __init__(self, popularity: Forecast) -> None:
        self._popularity = popularity

    def observe(self, layer: int, observation: Observation) -> None:
        """Ignored."""

    def forecast(self, layer: int) -> Forecast:
        """The popularity, always."""
        return self._popularity


def popularity_in(trace: RoutingTrace) -> Forecast:
    """Share of the trace's tokens that chose each expert: float32 [layers, experts]."""
    offsets = np.arange(trace.num_layers)[:, None] * trace.num_experts
    counts = np.bincount((trace.experts + offsets).reshape(-1), minlength=trace.num_layers * trace.num_experts)
    return (counts / trace.num_tokens).astype(np.float32).reshape(trace.num_layers, trace.num_experts)


def in_request_order(trace: RoutingTrace) -> Schedule:
    """Each token a pass of its own, one request after the other."""
    return Schedule(trace, batch=1)


def ranked(
    schedule: Schedule,
    predictor: Predictor,
    depth: int,
    num_ranks: int,
    on_token: Callable[[int], object] = lambda num_tokens: None,
) -> Ranks:
    """Walk through the passes as the engine does, and keep what is forecast for every layer.

    Args:
        schedule: passes of one token, all the tokens of its trace.
        depth: layers ahead. What counts for a layer is forecast `depth` layers before it, for the first ones before
            any layer was routed. 0: forecast once the layer itself was routed, which any predictor that keeps what it
            observes gets right; anything else is a shift by a layer or a token.
        on_token: is told of every token.

    Returns:
        In the order of the trace's tokens.
    """
    trace = schedule.trace
    num_ranks = min(num_ranks, trace.num_experts)
    found = np.full((trace.num_tokens, trace.num_layers, num_ranks), NO_PREDICTION, np.uint16)
    for step, rows in enumerate(schedule.passes):
        passing = schedule.passing(step)
        chosen = trace.experts[rows].astype(np.int64)
        known = np.zeros((trace.num_layers, trace.num_experts), np.float32)
        predictor.begin(passing)
        _keep(known, predictor.forecast(BEFORE_FIRST_LAYER), range(min(depth, trace.num_layers)))
        for layer in range(trace.num_layers):
            predictor.observe(layer, Observation(passing, chosen[:, layer]))
            ahead = layer + depth
            _keep(known, predictor.forecast(layer), range(ahead, min(ahead + 1, trace.num_layers)))
        found[rows] = _best(known, num_ranks)
        on_token(len(rows))
    return found


def _keep(known: Forecast, forecast: Forecast | None, layers: Iterable[int]) -> None:
    if forecast is not None:
        for layer in layers:
            known[layer] = forecast[layer]


def _best(forecast: Forecast, num_ranks: int) -> Ranks:
    """[layers, num_ranks]."""
    order = np.argsort(-forecast, axis=1, kind="stable")[:, :num_ranks]
    is_forecast = np.take_along_axis(forecast, order, axis=1) > 0
    return np.where(is_forecast, order, NO_PREDICTION).astype(np.uint16)


def recorded_ranks(trace: RoutingTrace, depth: int, num_ranks: int) -> Ranks:
    """The gate lookahead that was recorded with the trace, as far as its ranks go.

    Raises:
        UsageError: none was recorded, or none that looks so far ahead.
    """
    if trace.predicted is None:
        raise UsageError("the trace has no recorded gate lookahead (field `predicted`); take another predictor")
    if depth > trace.predicted.shape[2]:
        raise UsageError(
            f"depth {depth}: the gate lookahead was recorded for {trace.predicted.shape[2]} layers ahead at most"
        )
    recorded = trace.predicted[:, :, depth - 1, :num_ranks]
    found = np.full_like(recorded, NO_PREDICTION)
    found[:, depth:] = recorded[:, : max(trace.num_layers - depth, 0)]
    return found


class Judge:
    """Counts what forecasts got right.

    Args:
        trace: the tokens that were forecast.
        popularity: of the experts in other requests, [layers, experts].
        batch: requests decoded together in the batch figures.
    """

    def __init__(self, trace: RoutingTrace, popularity: Forecast, batch: int) -> None:
        self._trace = trace
        # Passes are smaller when requests run out; a union over fewer tokens would be another measure.
        passes = [rows for rows in Schedule(trace, batch=batch).passes if len(rows) == batch]
        self._tokens = np.array(passes, np.int64).reshape(-1)
        self._starts = np.arange(0, self._tokens.size, batch)
        self._place = np.argsort(np.argsort(-popularity, axis=1, kind="stable"), axis=1)

    def counts(self, ranks: Ranks, picks: int | None = None) -> pd.DataFrame:
        """Sums from which `ratios` makes the figures: a row per layer.

        Args:
            ranks: of every token of the trace.
            picks: how many ranks are picked at most; None: top_k.
        """
        layers = range(self._trace.num_layers)
        return pd.DataFrame(
            [self._of_layer(layer, ranks[:, layer], picks or self._trace.top_k) for layer in layers],
            index=pd.Index(layers, name="layer"),
        )

    def _of_layer(self, layer: int, ranks: Ranks, picks: int) -> dict[str, float]:
        num_experts = self._trace.num_experts
        chosen = _as_sets(self._trace.experts[:, layer], num_experts)
        is_forecast = ranks != NO_PREDICTION
        is_right = is_forecast & np.take_along_axis(chosen, np.where(is_forecast, ranks, 0).astype(np.int64), axis=1)
        goes_far = ranks.shape[1] >= min(self._trace.top_k + MORE, num_experts)
        alone = {
            "tokens": len(ranks),
            "needed": chosen.sum(),
            "found": is_right[:, :picks].sum(),
            "found_more": is_right[:, : self._trace.top_k + MORE].sum() if goes_far else np.nan,
            "picked": is_forecast[:, :picks].sum(),
            "covered": is_forecast.any(axis=1).sum(),
        }
        return {**alone, **self._together(layer, chosen, _as_sets(ranks[:, :picks], num_experts))}

    def _together(self, layer: int, chosen: npt.NDArray[np.bool_], picked: npt.NDArray[np.bool_]) -> dict[str, float]:
        """The same of batches: unions over their tokens."""
        needed, guessed = self._unions(chosen), self._unions(picked)
        popular = self._place[layer] < guessed.sum(axis=1, keepdims=True)
        num_needed = np.maximum(needed.sum(axis=1), 1)
        return {
            "passes": len(needed),
            "batch_recalls": ((needed & guessed).sum(axis=1) / num_needed).sum(),
            "popularity_recalls": ((needed & popular).sum(axis=1) / num_needed).sum(),
            "batch_found": (needed & guessed).sum(),
            "batch_picked": guessed.sum(),
            "batch_needed": needed.sum(),
        }

    def _unions(self, sets: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        if not self._starts.size:
            return sets[:0]
        return np.logical_or.reduceat(sets[self._tokens], self._starts, axis=0)


def _as_sets(experts: Ranks, num_experts: int) -> npt.NDArray[np.bool_]:
    """[tokens, experts] of lists of experts; what is no expert is left out."""
    sets = np.zeros((len(experts), num_experts + 1), np.bool_)
    np.put_along_axis(sets, np.minimum(experts, num_experts).astype(np.int64), True, axis=1)
    return sets[:, :num_experts]


def ratios(counts: pd.DataFrame) -> pd.DataFrame:
    """The figures (`FIGURES`) of each row of counts; NaN where there is nothing to count.

    recall_at_k, recall_at_k_plus_3: share of the chosen experts among the top_k (+ 3) forecast ones. Layers without
        a forecast count as wrong: divide by the coverage for the recall of the forecasts that were made.
    precision: share of the picked experts that were chosen.
    coverage: share of the layer steps for which anything was forecast.
    batch_recall: ExpertFlow's B_acc (arXiv 2410.17954): of the experts that any token of a batch chose, the share
        that was picked for any of them; the mean over batches and layers. It is 1 for who picks all experts.
    batch_recall_of_popularity: the same of the most popular experts, as many as were picked.
    batch_precision, batch_picked, batch_needed: what was picked for a batch and layer: the share that was chosen,
        how many, and how many were chosen.
    """
    c = counts
    columns = (
        c["found"] / c["needed"],
        c["found_more"] / c["needed"],
        c["found"] / c["picked"],
        c["covered"] / c["tokens"],
        c["batch_recalls"] / c["passes"],
        c["popularity_recalls"] / c["passes"],
        c["batch_found"] / c["batch_picked"],
        c["batch_picked"] / c["passes"],
        c["batch_needed"] / c["passes"],
    )
    return pd.DataFrame(dict(zip(FIGURES, columns, strict=True)))
