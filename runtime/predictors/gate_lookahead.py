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
    known.

    `top_k`: where given, it just chooses so many experts of the highest logits, and is asked for these alone: each call
    takes the host of a GPU longer than the device.
    """

    module: nn.Module
    gain: torch.Tensor | None
    top_k: int | None = None

    def ask(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits [tokens, experts], and its choice [tokens, top_k] unless that is told from them."""
        if self.top_k is not None:
            return (_logits(self.module, hidden),)
        # `forward`, not `__call__`: hooks on routers record router logits for the user and must not see guesses.
        answer = self.module.forward(hidden)
        return answer[0].float(), answer[2]

    def read(self, answers: Iterator[npt.NDArray[Any]]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Logits and choice of the next answers, which are those to `ask`."""
        logits = next(answers)
        if self.top_k is None:
            return logits, next(answers)
        return logits, np.argpartition(-logits, self.top_k - 1, axis=1)[:, : self.top_k]


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
        """What each later layer's router answers to `hidden`, the input of the router of `layer`."""
        found = list[torch.Tensor]()
        for later in self._later(layer):
            factor = self._factor(layer, later)
            found += self._routers[later].ask(hidden if factor is None else hidden * factor)
        return found

    def read(
        self, layer: int, answers: Sequence[npt.NDArray[Any]]
    ) -> Iterator[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
        """Of each later layer the logits [tokens, experts] and the choice [tokens, top_k]; nothing without answers."""
        turn = iter(answers)
        return ((later, *self._routers[later].read(turn)) for later in self._later(layer) if answers)

    def _later(self, layer: int) -> range:
        return range(layer + 1, min(layer + self._depth, len(self._routers) - 1) + 1)

    def _factor(self, layer: int, later: int) -> torch.Tensor | None:
        if (layer, later) not in self._factors:
            own, other = self._routers[layer].gain, self._routers[later].gain
            known = None if own is None or other is None else (other.float() / own.float()).to(own.dtype)
            self._factors[layer, later] = known
        return self._factors[layer, later]


class GateLookahead(Predictor):
    """Args: routers of the pool's layers in execution order; num_experts per layer; depth in layers ahead (>= 1)."""

    reads_hidden = True

    def __init__(self, routers: Sequence[LookaheadRouter], num_experts: int, depth: int) -> None:
        self._later = _LaterRouters(routers, depth)
        self._forecast: Forecast = np.zeros((len(routers), num_experts), np.float32)

    def ask(self, layer: int, hidden: torch.Tensor) -> list[torch.Tensor]:
        """The routers of the next `depth` layers."""
        return self._later.ask(layer, hidden)

    def observe(self, layer: int, observation: Observation) -> None:
        """Forecast the next `depth` layers from what their routers answered."""
        for later, logits, chosen in self._later.read(layer, observation.answers()):
            self._forecast[later] = _expected(logits, chosen)

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

    def ranked(
        self, layer: int, answers: Sequence[npt.NDArray[Any]], num_tokens: int, k: int
    ) -> npt.NDArray[np.uint16]:
        """The likeliest `k` experts for each of the next layers, uint16 [tokens, depth, k], best first;
        `NO_PREDICTION` for layers beyond the last."""
        found = np.full((num_tokens, self._depth, k), NO_PREDICTION, np.uint16)
        for later, logits, chosen in self._later.read(layer, answers):
            best = ranked(logits, chosen, k)
            found[:, later - layer - 1, : best.shape[1]] = best
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
    # On a CPU the router's own forward costs little more than its product.
    top_k = plain_top_k(router) if next(router.parameters()).device.type != "cpu" else None
    return LookaheadRouter(router, None if norm is None else _gain(norm, hidden_size), top_k)


_NUM_PROBES = 64  # hidden states that a router is asked about
_TOLERANCE = 0.02  # of the largest logit, in bfloat16


@torch.inference_mode()
def plain_top_k(router: nn.Module) -> int | None:
    """How many experts a router chooses, if they are those of the highest logits and these its weight's product with
    the hidden state; told from its answers to random ones. None: it does something else."""
    weight = _weight(router)
    random = torch.randn(_NUM_PROBES, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    answered, _, chosen = router.forward(random)[:3]
    own = _logits(router, random).float()
    is_product = bool((own - answered.float()).abs().max() <= _TOLERANCE * own.abs().max())
    top_k = int(chosen.shape[1])
    best = answered.topk(top_k, dim=1).values.sort(dim=1).values
    is_best = torch.equal(answered.gather(1, chosen).sort(dim=1).values, best)
    return top_k if is_product and is_best else None


def _logits(router: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    weight = _weight(router)
    return nn.functional.linear(hidden.to(weight.dtype), weight, getattr(router, "bias", None))


def _weight(router: nn.Module) -> nn.Parameter:
    """[experts, hidden]."""
    return next(p for p in router.parameters(recurse=False) if p.ndim == 2)


@torch.inference_mode()
def _answers(router: nn.Module) -> bool:
    """Whether the router gives logits [tokens, experts], weights and expert indices [tokens, k] for hidden states."""
    weight = _weight(router)
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
