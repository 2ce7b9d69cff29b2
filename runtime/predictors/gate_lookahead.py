"""`gate_lookahead`: ask the next layers' routers now, with this layer's hidden state.

The residual stream changes little from layer to layer, so router `l + d` applied to what layer `l` sees predicts its
choice (Eliseev and Mazur 2023, "Fast Inference of Mixture-of-Experts Language Models with Offloading", section 3.2).
The hidden state is corrected for the norms in between: divided by the gain of this layer's norm, multiplied by the next
one's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from runtime.predictors.base import BEFORE_FIRST_LAYER, Forecast, Observation, Predictor
from runtime.trace import NO_PREDICTION


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
        self._hook = router.register_forward_pre_hook(self._keep)

    def __call__(self) -> torch.Tensor | None:
        """The last input; None before the first and when it has been taken."""
        last, self._last = self._last, None
        return last

    def close(self) -> None:
        """Keep nothing any more."""
        self._hook.remove()
        self._last = None

    def _keep(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args:
            self._last = args[0].detach().reshape(-1, args[0].shape[-1])


class _LaterRouters:
    """Asks the routers of the next `depth` layers about a hidden state, corrected as far as the norms' gains differ."""

    def __init__(self, routers: Sequence[LookaheadRouter], depth: int) -> None:
        self._routers, self._depth = routers, depth
        self._factors: dict[tuple[int, int], torch.Tensor | None] = {}

    @torch.inference_mode()
    def ask(self, layer: int, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Logits, float32 [tokens, experts], and choice, int64 [tokens, top_k], by turns, of each later layer's router
        for `hidden`, the input of the router of `layer`."""
        found = []
        for later in range(layer + 1, min(layer + self._depth, len(self._routers) - 1) + 1):
            factor = self._factor(layer, later)
            # `forward`, not `__call__`: hooks on routers record router logits for the user and must not see guesses.
            answer = self._routers[later].module.forward(hidden if factor is None else hidden * factor)
            found += [answer[0].float(), answer[2]]
        return found

    def _factor(self, layer: int, later: int) -> torch.Tensor | None:
        if (layer, later) not in self._factors:
            own, other = self._routers[layer].gain, self._routers[later].gain
            known = None if own is None or other is None else (other.float() / own.float()).to(own.dtype)
            self._factors[layer, later] = known
        return self._factors[layer, later]


class GateLookahead(Predictor):
    """Args: routers of the pool's layers in execution order; num_experts per layer; depth in layers ahead (>= 1)."""

    def __init__(self, routers: Sequence[LookaheadRouter], num_experts: int, depth: int) -> None:
        self._later = _LaterRouters(routers, depth)
        self._forecast: Forecast = np.zeros((len(routers), num_experts), np.float32)

    def ask(self, layer: int, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Logits [tokens, experts] and choice [tokens, top_k] of the routers of the next `depth` layers."""
        return self._later.ask(layer, hidden)

    def observe(self, layer: int, observation: Observation) -> None:
        """Forecast the next `depth` layers from what their routers answered."""
        for ahead, (logits, chosen) in enumerate(_by_turns(observation.answers()), start=1):
            self._forecast[layer + ahead] = _expected(logits, chosen)

    def forecast(self, layer: int) -> Forecast | None:
        """Expected tokens per expert: mean of "is chosen" and min(1, k * router probability), summed over tokens."""
        return None if layer == BEFORE_FIRST_LAYER else self._forecast


class RankedLookahead:
    """The same forecasts token by token, as traces hold them.

    Args: routers of the model's MoE layers in execution order, whose inputs are kept until they are asked for; depth in
    layers ahead (>= 1).
    """

    def __init__(self, routers: Sequence[LookaheadRouter], depth: int) -> None:
        self._later, self._depth = _LaterRouters(routers, depth), depth
        self._inputs = [RouterInput(router.module) for router in routers]

    def ask(self, layer: int) -> list[torch.Tensor] | None:
        """What `ranked` needs on the host of `layer`, which has just been routed. None: its router was not called with
        a hidden state since it was asked about last."""
        hidden = self._inputs[layer]()
        return None if hidden is None else self._later.ask(layer, hidden)

    def ranked(self, answers: Sequence[npt.NDArray[Any]], num_tokens: int, k: int) -> npt.NDArray[np.uint16]:
        """The likeliest `k` experts for each of the next layers, uint16 [tokens, depth, k], best first;
        `NO_PREDICTION` for layers beyond the last."""
        found = np.full((num_tokens, self._depth, k), NO_PREDICTION, np.uint16)
        for ahead, (logits, chosen) in enumerate(_by_turns(answers)):
            best = ranked(logits, chosen, k)
            found[:, ahead, : best.shape[1]] = best
        return found

    def close(self) -> None:
        """Let go of the routers."""
        for router_input in self._inputs:
            router_input.close()


def ranked(logits: npt.NDArray[np.float32], chosen: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.int64]:
    """The experts of each token, int64 [tokens, min(k, experts)]: those that its router chooses by descending logit,
    then the others likewise."""
    is_other = np.ones(logits.shape, np.bool_)
    np.put_along_axis(is_other, chosen, False, axis=1)
    return np.lexsort((-logits, is_other), axis=1)[:, :k]


def _expected(logits: npt.NDArray[np.float32], chosen: npt.NDArray[np.int64]) -> Forecast:
    likely = np.exp(logits - logits.max(axis=1, keepdims=True))
    likely *= chosen.shape[1] / likely.sum(axis=1, keepdims=True)
    np.minimum(likely, 1.0, out=likely)
    likely[np.arange(len(chosen))[:, None], chosen] += 1.0
    expected: Forecast = 0.5 * likely.sum(axis=0)
    return expected


def _by_turns(answers: Sequence[npt.NDArray[Any]]) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    return zip(answers[::2], answers[1::2], strict=True)


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
