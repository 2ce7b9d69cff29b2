"""What is loaded ahead of the routers because a predictor forecasts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.cache.residency import Residency
from runtime.predictors.base import BEFORE_FIRST_LAYER, Forecast, Observation, Predictor
from runtime.transfer.base import Transfer
from runtime.vocabulary import Pass, Phase


class Prefetch:
    """Asks a predictor layer by layer, tells the policy, and loads what the coming layers are forecast to need.

    Args:
        residency: decides. transfer: acts. predictor: forecasts.
        count: experts per token and layer that are loaded at most. every: decode steps for which a forecast is reused.

    Attributes:
        refreshes: `refresh` is called before each pass.
        depth: layers ahead, in the running pass.
    """

    def __init__(
        self, residency: Residency, transfer: Transfer, predictor: Predictor, *, count: int, every: int, refreshes: bool
    ) -> None:
        self._residency, self._transfer, self._predictor = residency, transfer, predictor
        self._count, self._every, self.refreshes, self.depth = count, every, refreshes, 0
        self._forecast: Forecast | None = None
        self._waiting: list[tuple[int, int]] = []  # experts to load that have no slot, and layers until each

    def ask(self, layer: int, passing: Pass, hidden: Any) -> Sequence[Any]:
        """See `Predictor.ask`."""
        return self._predictor.ask(layer, hidden) if self._observes(passing) else ()

    @property
    def _is_asked(self) -> bool:
        """Somebody acts on a forecast: the prefetch or the policy."""
        return self.depth > 0 or self._residency.foresees or self.refreshes

    def _observes(self, passing: Pass) -> bool:
        """The predictor sees the layers of a pass."""
        return self._is_asked and (passing.phase is Phase.PREFILL or passing.step % self._every == 0)

    def observe(self, layer: int, observation: Observation) -> None:
        """The router of `layer` has spoken: let the predictor see it, and forecast anew."""
        if self._observes(observation.passing):
            self._predictor.observe(layer, observation)
        self.foresee(layer)

    def foresee(self, layer: int) -> None:
        """Forecast what comes after `layer`, and let the policy know."""
        self._forecast = self._predictor.forecast(layer) if self._is_asked else None
        if self._forecast is not None and self._residency.foresees:
            first = 0 if self._predictor.sees_next_pass else layer + 1
            self._residency.foresee(self._forecast, first, self._predictor.waits())

    def forget(self) -> None:
        """Load nothing by an earlier forecast."""
        self._forecast, self._waiting = None, []

    def load(self, layer: int, num_tokens: int) -> None:
        """Load what the coming layers are forecast to need."""
        self._waiting = [] if self._forecast is None else self._wanted(layer, self._forecast, num_tokens)
        self.load_waiting(layer)

    def load_waiting(self, layer: int) -> None:
        """Load what is wanted as far as there are slots for it. The rest waits for those that `layer` frees, as in
        ExpertFlow (arXiv 2410.17954v2, figure 5)."""
        if not self._waiting:
            return
        experts, steps_ahead = zip(*self._waiting, strict=True)
        self._transfer.submit(self._residency.plan_prefetch(layer, experts, steps_ahead))
        self._waiting = [one for one in self._waiting if self._residency.slot_of(one[0]) < 0]

    def refresh(self) -> None:
        """Give the slots to the experts that the next pass is forecast to need, as far as there is a forecast."""
        forecast = self._predictor.forecast(BEFORE_FIRST_LAYER)
        if forecast is None:
            return
        if self._residency.foresees:
            self._residency.foresee(forecast, waits=self._predictor.waits())
        self._transfer.submit(self._residency.plan_refresh(forecast))

    def _wanted(self, layer: int, forecast: Forecast, num_tokens: int) -> list[tuple[int, int]]:
        """Experts to have ready for the coming layers with layers until each, most urgent first: those of the nearest
        layer, or those of the highest likelihood x layer proximity."""
        num_layers, num_experts = forecast.shape
        most = min(self._count * num_tokens, num_experts)
        found: list[tuple[float, int, int]] = []
        for ahead in range(1, min(self.depth, num_layers - 1 - layer) + 1):
            row = forecast[layer + ahead]
            likeliest = np.argsort(-row, kind="stable")[:most].tolist()
            base = (layer + ahead) * num_experts
            found.extend((row[index], base + index, ahead) for index in likeliest if row[index] > 0.0)
        if self._predictor.by_likelihood:
            found.sort(key=lambda one: -one[0] * (1.0 - one[2] / num_layers))
        return [(expert, ahead) for _, expert, ahead in found]
