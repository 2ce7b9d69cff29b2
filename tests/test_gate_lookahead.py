"""The lookahead forecast: what it asks which router, and when it says that it cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from runtime.predictors.base import Observation
from runtime.predictors.gate_lookahead import GateLookahead, LookaheadRouter, RouterInput, lookahead_router, plain_top_k
from runtime.vocabulary import Pass, Phase

EXPERTS, HIDDEN, TOP_K = 6, 4, 2


class Router(nn.Module):
    """As transformers' routers are."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden_states.reshape(-1, HIDDEN) @ self.weight.T
        scores, chosen = logits.softmax(-1).topk(TOP_K)
        return logits, scores, chosen


class NeedsTokens(Router):
    """A router that asks for more than the hidden state."""

    def forward(self, hidden_states: torch.Tensor, input_ids: torch.Tensor):  # type: ignore[no-untyped-def,override]
        return super().forward(hidden_states)


class Norm(nn.Module):
    """RMS norm with gain 1 + weight, as some families store it."""

    def __init__(self, gain: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(gain - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.pow(2).mean(-1, keepdim=True).sqrt() * (1 + self.weight)


def _routers(count: int) -> list[Router]:
    generator = torch.Generator().manual_seed(1)
    return [Router(torch.randn(EXPERTS, HIDDEN, generator=generator)) for _ in range(count)]


def _observe(predictor: GateLookahead, hidden: torch.Tensor) -> None:
    """As the first layer."""
    asked = [tensor.numpy() for tensor in predictor.ask(0, hidden)]
    choice = np.zeros((len(hidden), TOP_K), np.int64)
    predictor.observe(0, Observation(Pass(Phase.DECODE, len(hidden), 0), choice, lambda: asked))


def test_forecasts_what_the_next_layers_routers_choose() -> None:
    routers = _routers(4)
    predictor = GateLookahead([LookaheadRouter(router, None) for router in routers], EXPERTS, depth=2)
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    _observe(predictor, hidden)
    forecast = predictor.forecast(0)
    for layer in (1, 2):
        logits, _, chosen = routers[layer](hidden)
        expected = 0.5 * np.bincount(chosen.flatten().numpy(), minlength=EXPERTS)
        expected = expected + 0.5 * (logits.softmax(-1) * TOP_K).clamp(max=1).sum(0).detach().numpy()
        np.testing.assert_allclose(forecast[layer], expected, rtol=1e-5)
    assert not forecast[3].any(), "depth 2 does not reach layer 3"


def test_corrects_for_the_gain_of_the_norms_between() -> None:
    gains = [torch.tensor([1.0, 2.0, 4.0, 0.5]), torch.tensor([3.0, 0.2, 1.0, 5.0])]
    routers = _routers(2)
    asked = [lookahead_router(router, Norm(gain), HIDDEN) for router, gain in zip(routers, gains, strict=True)]
    assert all(isinstance(router, LookaheadRouter) for router in asked)
    direction = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(3))
    corrected = GateLookahead(asked, EXPERTS, depth=1)  # type: ignore[arg-type]
    _observe(corrected, direction * gains[0])
    truth = GateLookahead([LookaheadRouter(router, None) for router in routers], EXPERTS, depth=1)
    _observe(truth, direction * gains[1])
    np.testing.assert_allclose(corrected.forecast(0)[1], truth.forecast(0)[1], rtol=1e-4)


def test_layer_norms_give_no_gain() -> None:
    asked = lookahead_router(_routers(1)[0], nn.LayerNorm(HIDDEN), HIDDEN)
    assert isinstance(asked, LookaheadRouter) and asked.gain is None


def test_a_router_that_needs_more_is_named_with_what_it_needs() -> None:
    reason = lookahead_router(NeedsTokens(torch.zeros(EXPERTS, HIDDEN)), None, HIDDEN)
    assert reason == "router NeedsTokens needs hidden_states, input_ids, of which only the hidden state is at hand"


class LogitsOnly(Router):
    """As some families of older transformers have it."""

    def forward(self, hidden_states: torch.Tensor):  # type: ignore[no-untyped-def,override]
        return super().forward(hidden_states)[0]


def test_a_router_that_answers_otherwise_is_not_asked() -> None:
    reason = lookahead_router(LogitsOnly(torch.zeros(EXPERTS, HIDDEN)), None, HIDDEN)
    assert reason == "router LogitsOnly does not answer (logits, weights, indices)"


def test_asking_leaves_hooks_on_routers_alone() -> None:
    routers = _routers(2)
    seen: list[object] = []
    routers[1].register_forward_hook(lambda *_: seen.append(1))
    tap = RouterInput(routers[0])
    routers[0](torch.ones(2, 3, HIDDEN))
    taken = tap()
    assert taken is not None and taken.shape == (6, HIDDEN)
    assert tap() is None  # nothing of a long prompt stays behind
    predictor = GateLookahead([LookaheadRouter(router, None) for router in routers], EXPERTS, depth=1)
    _observe(predictor, torch.ones(1, HIDDEN))
    assert not seen


class Biased(Router):
    """Chooses by more than the logits, as DeepSeek's routers do."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden_states.reshape(-1, HIDDEN) @ self.weight.T
        scores, chosen = (logits.sigmoid() + torch.linspace(0, 1, EXPERTS)).topk(TOP_K)
        return logits, scores, chosen


class Scaled(Router):
    """Whose logits are not the product alone."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return super().forward(2 * hidden_states)


class Linear(Router):
    """With a bias in the product, as those of gpt-oss."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight)
        self.bias = nn.Parameter(torch.linspace(0, 2, EXPERTS))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = nn.functional.linear(hidden_states.reshape(-1, HIDDEN), self.weight, self.bias)
        scores, chosen = logits.topk(TOP_K)
        return logits, scores, chosen


@pytest.mark.parametrize(("kind", "top_k"), [(Router, TOP_K), (Linear, TOP_K), (Biased, None), (Scaled, None)])
def test_a_router_that_just_takes_the_highest_logits_is_known(kind: type[Router], top_k: int | None) -> None:
    assert plain_top_k(kind(_routers(1)[0].weight.data)) == top_k


@pytest.mark.parametrize("kind", [Router, Linear])
@pytest.mark.parametrize("tokens", [1, 5])
def test_its_choice_is_told_from_the_logits(kind: type[Router], tokens: int) -> None:
    routers = [kind(router.weight.data) for router in _routers(4)]
    hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2))
    found = []
    for top_k in (None, TOP_K):
        predictor = GateLookahead([LookaheadRouter(router, None, top_k) for router in routers], EXPERTS, depth=3)
        assert len(predictor.ask(0, hidden)) == (6 if top_k is None else 3)
        _observe(predictor, hidden)
        found.append(predictor.forecast(0))
    np.testing.assert_allclose(found[1][1:], found[0][1:], rtol=1e-6)
