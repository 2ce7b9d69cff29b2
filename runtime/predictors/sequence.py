"""`sequence`: a small network that reads which experts the tokens so far chose, and looks several tokens ahead.

After SeqMoE (arXiv 2609.12978), which forecasts the activations of the whole layer stack from those of the tokens so
far, and evicts what is needed farthest ahead. Its state-space layer has a counterpart here: frequencies of every expert
decayed at several rates, a diagonal linear recurrence. All layers' frequencies are read into one context. It says,
together with an expert's own, whether the next token of the layer selects the expert, and what its next use is worth:
G = E[discount ** (tokens until then - 1)]. That is one number for all tokens ahead, where SeqMoE rolls out eight.

Requests decoded together are followed one by one. The network runs compiled: its layers are so small that calling a
library for each would cost more than they do.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from numba import njit

from runtime.errors import ArtifactError
from runtime.predictors.artifact import Artifact, RoutingShape
from runtime.predictors.base import Forecast, Observation, Predictor
from runtime.vocabulary import Pass

KIND = "sequence"
FREQUENCY_FLOOR = 3e-3  # below it the logarithm of a frequency says nothing

_MAX_REQUESTS = 64  # whose state is kept; those that ran last
_FORGOTTEN = 1e-20  # frequencies below it are 0; sums with denormal numbers take many times longer
_UNNAMED = -1  # stands for the request where a pass does not say whose its tokens are

Floats = npt.NDArray[np.float32]


class Weights(NamedTuple):
    """Of the network. `features` are the logarithms of the frequencies, between -2 and 1, and what the context says of
    the expert.

    Attributes:
        alphas: [scales], of the decayed frequencies: the weight of the last token.
        context: [layers, experts * scales, context], reads frequencies.
        layer: [layers, context], added to the context.
        spread: [layers, context, experts * said], what the context says of each expert of a layer.
        inner, inner_bias: [features, inner], [inner], a layer that all experts share.
        outer, direct: [inner, 2], [features, 2], to the two logits: selected by the next token; worth of the next use.
        bias: [layers, experts, 2], of the logits.
    """

    alphas: Floats
    context: Floats
    layer: Floats
    spread: Floats
    inner: Floats
    inner_bias: Floats
    outer: Floats
    direct: Floats
    bias: Floats

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """Those in an artefact.

        Raises:
            ArtifactError: arrays are missing, do not fit each other or the model, or are not finite.
        """
        try:
            weights = cls(**{name: np.asarray(artifact.arrays[name], np.float32) for name in cls._fields})
            sizes = weights.alphas.shape + weights.layer.shape[1:] + weights.inner.shape
            fits = {name: array.shape for name, array in weights._asdict().items()} == _shapes(artifact.shape, *sizes)
        except (KeyError, ValueError, TypeError):
            fits = False
        if not fits or not all(np.isfinite(array).all() for array in weights):
            raise ArtifactError("the sequence predictor's arrays are damaged; train it again: python -m harness.fit")
        return weights


def _shapes(model: RoutingShape, scales: int, context: int, features: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Of all arrays by name."""
    layers, experts, _ = model
    return {
        "alphas": (scales,),
        "context": (layers, experts * scales, context),
        "layer": (layers, context),
        "spread": (layers, context, experts * (features - scales)),
        "inner": (features, inner),
        "inner_bias": (inner,),
        "outer": (inner, 2),
        "direct": (features, 2),
        "bias": (layers, experts, 2),
    }


@dataclass
class _Request:
    """What is known of one request.

    Attributes:
        frequencies: [layers, experts, scales], decayed.
        parts: [layers, context], what each layer's frequencies add to the context.
        soon: [layers, experts], P(the next token of the layer selects the expert).
        idle: [layers, experts], P(no use) per token of a steady expert whose next use is worth as much.
    """

    frequencies: Floats
    parts: Floats
    soon: Floats
    idle: Floats

    def copy(self) -> _Request:
        return _Request(self.frequencies.copy(), self.parts.copy(), self.soon.copy(), self.idle.copy())


class SequencePredictor(Predictor):
    """Args: the trained predictor (`python -m harness.fit sequence`).

    A new request goes on from the state of the one that ran last, as in training: what is popular outlives requests.

    Raises:
        ArtifactError: it is damaged.
    """

    sees_next_pass = True

    def __init__(self, artifact: Artifact) -> None:
        self._weights, self._shape = Weights.of(artifact), artifact.shape
        discount = artifact.params.get("discount")
        if not isinstance(discount, float) or not 0.0 < discount < 1.0:
            raise ArtifactError("the sequence predictor's discount is damaged; train it again: python -m harness.fit")
        self._discount, self._prior = discount, np.float32(artifact.shape.top_k / artifact.shape.experts)
        (layers, experts, _), scales = artifact.shape, self._weights.alphas.size
        self._latest = _Request(
            frequencies=np.full((layers, experts, scales), self._prior),
            parts=np.zeros((layers, self._weights.layer.shape[1]), np.float32),
            soon=np.full((layers, experts), self._prior),
            idle=np.full((layers, experts), 1 - self._prior),
        )
        self._requests: OrderedDict[int, _Request] = OrderedDict()
        self._running: list[tuple[_Request, list[int]]] = []
        self._num_tokens = 0  # of the running pass
        self._forecast: Forecast = np.zeros((layers, experts), np.float32)
        self._waits: Forecast = np.zeros((layers, experts), np.float32)
        self._has_seen = False

    def begin(self, passing: Pass) -> None:
        """Take up the requests of the pass where they were left."""
        self._num_tokens = passing.num_tokens
        places: dict[int, list[int]] = {}
        for place, request in enumerate(passing.requests or (_UNNAMED,) * passing.num_tokens):
            places.setdefault(request, []).append(place)
        self._running = [(self._request(number), own) for number, own in places.items()]
        while len(self._requests) > max(_MAX_REQUESTS, len(places)):
            self._requests.popitem(last=False)
        self._combine(slice(None))

    def observe(self, layer: int, observation: Observation) -> None:
        """Follow each request's tokens, and forecast the layer's next turn and beyond."""
        if len(observation.experts) != self._num_tokens:
            return  # an encoder beside a decoder: whose these tokens are is not known
        for request, places in self._running:
            _follow(request.frequencies[layer], observation.experts[places], self._weights.alphas)
            arrays = request.frequencies, request.parts, request.soon, request.idle
            _read(layer, self._prior, self._shape.top_k, self._discount, *arrays, *self._weights[1:])
        self._combine(layer)
        self._has_seen = True

    def forecast(self, layer: int) -> Forecast | None:
        """Expected tokens at each layer's next turn; None before anything was seen."""
        return self._forecast if self._has_seen else None

    def waits(self) -> Forecast:
        """Tokens until the next use, each counted `discount` times as much as the one before."""
        return self._waits

    def _request(self, number: int) -> _Request:
        found = self._requests.pop(number, None) or self._latest.copy()
        self._requests[number] = self._latest = found
        return found

    def _combine(self, layers: int | slice) -> None:
        """What the running requests will do together: tokens add up; an expert is idle while all let it be."""
        first, *others = (request for request, _ in self._running)
        soon, idle = first.soon[layers], first.idle[layers]
        for other in others:
            soon, idle = soon + other.soon[layers], idle * other.idle[layers]
        self._forecast[layers] = soon
        self._waits[layers] = idle / (1 - self._discount * idle)


@njit(cache=True)
def _follow(frequencies, experts, alphas):  # type: ignore[no-untyped-def]
    """Decay a layer's frequencies [experts, scales] by each of some tokens, and add their experts [tokens, top_k]."""
    for token in range(len(experts)):
        for expert in range(len(frequencies)):
            for scale in range(alphas.size):
                rest = frequencies[expert, scale] * (1 - alphas[scale])
                frequencies[expert, scale] = rest if rest > _FORGOTTEN else 0
        for expert in experts[token]:
            if expert < len(frequencies):  # past the last expert: none
                for scale in range(alphas.size):
                    frequencies[expert, scale] += alphas[scale]


@njit(inline="always")
def _add(to, factor, row):  # type: ignore[no-untyped-def]
    for i in range(to.size):
        to[i] += factor * row[i]


@njit(inline="always")
def _sigmoid(logit):  # type: ignore[no-untyped-def]
    return 0.5 + 0.5 * np.tanh(0.5 * logit)


@njit(cache=True)
def _read(  # type: ignore[no-untyped-def]
    at, prior, top_k, discount, frequencies, parts, soon, idle,
    context, layer, spread, inner, inner_bias, outer, direct, bias,
):  # fmt: skip
    """The network, of one request once layer `at` has run; writes that layer's rows of `parts`, `soon` and `idle`."""
    experts, scales = frequencies.shape[1:]
    num_said, num_inner = inner.shape[0] - scales, inner.shape[1]
    hidden = np.zeros(parts.shape[1], np.float32)
    said = np.zeros(spread.shape[2], np.float32)
    features, shared = np.empty(inner.shape[0], np.float32), np.empty(num_inner, np.float32)
    parts[at] = 0
    for expert in range(experts):
        for scale in range(scales):
            _add(parts[at], frequencies[at, expert, scale] - prior, context[at, expert * scales + scale])
    _add(hidden, np.float32(1), layer[at])
    for other in range(len(parts)):
        _add(hidden, np.float32(1), parts[other])
    for unit in range(hidden.size):
        if hidden[unit] > 0:
            _add(said, hidden[unit], spread[at, unit])
    total = 0.0
    for expert in range(experts):
        for scale in range(scales):
            features[scale] = 1 + 0.5 * np.log(frequencies[at, expert, scale] + np.float32(FREQUENCY_FLOOR))
        for one in range(num_said):
            features[scales + one] = said[expert * num_said + one]
        next_logit, worth_logit = bias[at, expert]
        shared[:] = inner_bias
        for feature in range(features.size):
            _add(shared, features[feature], inner[feature])
            next_logit += features[feature] * direct[feature, 0]
            worth_logit += features[feature] * direct[feature, 1]
        for unit in range(num_inner):
            if shared[unit] > 0:
                next_logit += shared[unit] * outer[unit, 0]
                worth_logit += shared[unit] * outer[unit, 1]
        soon[at, expert] = _sigmoid(next_logit)
        total += soon[at, expert]
        worth = _sigmoid(worth_logit)
        idle[at, expert] = (1 - worth) / (1 - discount * worth)
    if total > top_k:
        for expert in range(experts):
            soon[at, expert] *= top_k / total
