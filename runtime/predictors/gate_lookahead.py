"""`gate_lookahead`: ask the next layers' routers now, with this layer's hidden state.

The residual stream changes little from layer to layer, so router `l + d` applied to what layer `l` sees predicts its
choice (Eliseev and Mazur 2023, "Fast Inference of Mixture-of-Experts Language Models with Offloading", section 3.2).
The hidden state is corrected for the norms in between: divided by the gain of this layer's norm, multiplied by the next
one's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from runtime.predictors.base import Forecast, Observation, Predictor


@dataclass(frozen=True)
class LookaheadRouter:
    """A router that can be asked about a hidden state: its module, and the gain [hidden] of the norm before it, if
    known."""

    module: nn.Module
    gain: torch.Tensor | None


class RouterInput:
    """Keeps what a router was last given, flattened to [tokens, hidden], until it is asked for.

    No longer: the hidden states of a long prompt, kept for every layer, are more than many a slot.
    """

    def __init__(self, router: nn.Module) -> None:
        self._last: torch.Tensor | None = None
        router.register_forward_pre_hook(self._keep)

    def __call__(self) -> torch.Tensor | None:
        """The last input; None before the first and when it has been taken."""
        last, self._last = self._last, None
        return last

    def _keep(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args:
            self._last = args[0].detach().reshape(-1, args[0].shape[-1])


class GateLookahead(Predictor):
    """Args: routers of the pool's layers in execution order; num_experts per layer; depth in layers ahead (>= 1)."""

    def __init__(self, routers: Sequence[LookaheadRouter], num_experts: int, depth: int) -> None:
        self._routers, self._depth = routers, depth
        self._corrections: dict[tuple[int, int], torch.Tensor | None] = {}
        self._forecast: Forecast = np.zeros((len(routers), num_experts), np.float32)

    @torch.inference_mode()
    def observe(self, layer: int, observation: Observation) -> None:
        """Forecast the next `depth` layers from `observation.hidden`."""
        if observation.hidden is None:
            return
        for ahead in range(layer + 1, min(layer + self._depth, len(self._routers) - 1) + 1):
            gain = self._correction(layer, ahead)
            hidden = observation.hidden if gain is None else observation.hidden * gain
            self._forecast[ahead] = _ask(self._routers[ahead].module, hidden)

    def forecast(self, layer: int) -> Forecast:
        """Expected tokens per expert: mean of "is chosen" and min(1, k * router probability), summed over tokens."""
        return self._forecast

    def _correction(self, layer: int, ahead: int) -> torch.Tensor | None:
        """What turns the input of one layer's router into that of a later one, as far as the norms' gains differ."""
        if (layer, ahead) not in self._corrections:
            own, other = self._routers[layer].gain, self._routers[ahead].gain
            known = None if own is None or other is None else (other.float() / own.float()).to(own.dtype)
            self._corrections[layer, ahead] = known
        return self._corrections[layer, ahead]


def _ask(router: nn.Module, hidden: torch.Tensor) -> Forecast:
    # `forward`, not `__call__`: hooks on routers record router logits for the user and must not see guesses.
    answer = router.forward(hidden)
    logits, chosen = answer[0].float().cpu().numpy(), answer[2].cpu().numpy()
    likely = np.exp(logits - logits.max(axis=1, keepdims=True))
    likely *= chosen.shape[1] / likely.sum(axis=1, keepdims=True)
    np.minimum(likely, 1.0, out=likely)
    likely[np.arange(len(chosen))[:, None], chosen] += 1.0
    expected: Forecast = 0.5 * likely.sum(axis=0)
    return expected


def lookahead_router(router: nn.Module, norm: nn.Module | None, hidden_size: int) -> LookaheadRouter | str:
    """The router ready to be asked, or the reason why it cannot be: it needs more than the hidden state."""
    # An argument with a default counts too: routers that take a bias have None there and fail on it.
    names = [
        name for name, p in inspect.signature(router.forward).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if len(names) != 1:
        return f"router {type(router).__name__} needs {', '.join(names)}, of which only the hidden state is at hand"
    if not _answers(router):
        return f"router {type(router).__name__} does not answer (logits, weights, indices)"
    return LookaheadRouter(router, None if norm is None else _gain(norm, hidden_size))


@torch.inference_mode()
def _answers(router: nn.Module) -> bool:
    """Whether the router gives logits [tokens, experts], weights and expert indices [tokens, k] for hidden states."""
    weight = next(p for p in router.parameters(recurse=False) if p.ndim == 2)
    answer = router.forward(torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device))
    return (
        isinstance(answer, tuple)
        and len(answer) >= 3
        and answer[0].shape == (1, weight.shape[0])
        and not answer[2].is_floating_point()
    )


@torch.inference_mode()
def _gain(norm: nn.Module, hidden_size: int) -> torch.Tensor | None:
    """Gain of an RMS norm, however it stores it (w or 1 + w): what it makes of a vector of ones. None for other
    norms."""
    weight = next(norm.parameters(), None)
    if weight is None or weight.shape != (hidden_size,):
        return None
    gain = norm.forward(torch.ones(1, hidden_size, dtype=weight.dtype, device=weight.device))[0]
    return gain.clone() if bool((gain.abs() > 1e-6).all()) else None
