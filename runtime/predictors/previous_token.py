"""`previous_token`: every layer will choose what it chose in the pass before. The baseline of temporal locality."""

from __future__ import annotations

import numpy as np

from runtime.predictors.base import Forecast, Observation, Predictor


class PreviousToken(Predictor):
    """Args: MoE layers of the pool, experts per layer."""

    sees_next_pass = True

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._forecast: Forecast = np.zeros((num_layers, num_experts), np.float32)

    def observe(self, layer: int, observation: Observation) -> None:
        """Keep the layer's choice for the next pass; layers to come still hold that of the pass before."""
        num_experts = self._forecast.shape[1]
        counts = np.bincount(observation.experts.reshape(-1), minlength=num_experts)[:num_experts]
        self._forecast[layer] = counts / len(observation.experts)

    def forecast(self, layer: int) -> Forecast:
        """Share of the tokens of the pass before that chose each expert: expected tokens, for a pass of one."""
        return self._forecast
