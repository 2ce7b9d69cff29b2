"""What a predictor wants loaded ahead, for all steps of a schedule at once.

A predictor sees routing and never the cache, so that it is asked once for all configurations that it is part of.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from harness.measure.schedule import Integers, Schedule
from runtime.predictors.base import BEFORE_FIRST_LAYER, Observation, Predictor
from runtime.vocabulary import Phase


class Foresight:
    """The forecasts of one predictor at every step of a schedule, ranked; before the first layer of a pass, too.

    Args:
        predictor: new; not one that ranks by likelihood over layers (`Predictor.by_likelihood`).
        every: decode passes for which a forecast is reused.
        depth: layers ahead that are asked about at most.
    """

    def __init__(self, schedule: Schedule, predictor: Predictor, every: int, depth: int) -> None:
        trace = schedule.trace
        num_asks = len(schedule.passes) * (trace.num_layers + 1)
        self._num_layers, self._num_experts = trace.num_layers, trace.num_experts
        self._sizes = np.array([len(rows) for rows in schedule.passes])
        # Experts by descending forecast, and how many of them are forecast at all.
        self._ranks = np.zeros((num_asks, depth, trace.num_experts), np.uint16)
        self._num_known = np.zeros((num_asks, depth), np.int64)
        self._fill(schedule, predictor, every)

    def _fill(self, schedule: Schedule, predictor: Predictor, every: int) -> None:
        trace, ask = schedule.trace, 0
        for step, rows in enumerate(schedule.passes):
            passing = schedule.passing(step)
            is_observed = passing.phase is Phase.PREFILL or passing.step % every == 0
            predictor.begin(passing)
            for layer in range(BEFORE_FIRST_LAYER, trace.num_layers):
                if layer != BEFORE_FIRST_LAYER and is_observed:
                    predictor.observe(layer, Observation(passing, trace.experts[rows, layer].astype(np.int64)))
                self._keep(ask, layer, predictor.forecast(layer))
                ask += 1

    def _keep(self, ask: int, layer: int, forecast: npt.NDArray[np.float32] | None) -> None:
        coming = None if forecast is None else forecast[layer + 1 : layer + 1 + self._ranks.shape[1]]
        if coming is not None and len(coming):
            self._ranks[ask, : len(coming)] = np.argsort(-coming, axis=1, kind="stable")
            self._num_known[ask, : len(coming)] = (coming > 0).sum(axis=1)

    def wanted(self, depth: int, count: int) -> tuple[Integers, Integers, Integers]:
        """What a coordinator would prefetch for: `wanted_starts`, `wanted` and `steps_ahead` of `timeline.Steps`."""
        asks_per_pass = self._num_layers + 1
        most = np.repeat(np.minimum(count * self._sizes, self._num_experts), asks_per_pass)
        width = int(most.max(initial=0))
        num_chosen = np.minimum(self._num_known[:, :depth], most[:, None])
        is_chosen = np.arange(width) < num_chosen[:, :, None]
        ask, ahead, rank = np.nonzero(is_chosen)
        layer = ask % asks_per_pass - 1
        experts = (layer + ahead + 1) * self._num_experts + self._ranks[ask, ahead, rank]
        starts = np.concatenate([[0], np.cumsum(num_chosen.sum(axis=1))])
        return starts, experts.astype(np.int64), ahead + 1
