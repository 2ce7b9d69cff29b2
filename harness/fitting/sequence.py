"""Trains `sequence` on the routes of a trace: which experts the next token selects, and what each next use is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from harness.fitting.base import FitOptions, FitResult, model_name, routing_shape, rows_of, split
from harness.fitting.figures import compared, rows_by_request
from harness.fitting.training import copied_weights, settings_of_torch
from harness.measure.prediction import MORE, in_request_order, ranked
from runtime.predictors.artifact import Artifact, RoutingShape
from runtime.predictors.sequence import FREQUENCY_FLOOR, KIND, SequencePredictor, Weights
from runtime.trace import RoutingTrace

ALPHAS = (1.0, 0.6, 0.25, 0.08, 0.02, 0.002)
DISCOUNT = 0.85
"""A use so many tokens ahead that its slot will have changed hands by then should not count; from 0.75 to 0.9 the loads
of a cache differ little, without a discount they are clearly more."""
CONTEXT, SAID, INNER = 128, 8, 32
MAX_TOKENS = 131_072
"""Of a longer trace the requests that come first are trained on, so that training takes minutes and memory anyway."""

_SEGMENT = 16  # consecutive tokens of an example
_BATCH = 8  # examples
_LEARNING_RATE = 6e-3
_HALVED_AFTER = 100  # steps, or an epoch where that is more
_WEIGHT_DECAY = 1e-2
_DROPOUT = 0.2  # of the context
_LEAST_GAIN = 1e-4  # of the validation loss, a share: the falling rate would go on with gains that are none
_VALIDATION_SEGMENTS = 256  # for early stopping; the figures are of all

Floats = npt.NDArray[np.float32]


def fit(trace: RoutingTrace, options: FitOptions, *, quiet: bool) -> FitResult:
    """See `harness.fitting.base.Fit`. Requests are read one after the other, tokens of prefill and decode alike.

    The figures are `validation_loss` (the two binary cross entropies per expert) and those of
    `harness.fitting.figures.compared`, of forecasts one token ahead.

    Raises:
        TraceError: fewer than two requests.
    """
    train, held = split(trace, options)
    with settings_of_torch(options):
        network = Network(routing_shape(trace))
        loss = _train(network, Tape(train), Tape(held), options, quiet)
        artifact = network.artifact(model_name(trace), np.unique(held.request).tolist())
    with tqdm(total=held.num_tokens, unit="tok", desc="judging", disable=quiet) as bar:
        predictor = SequencePredictor(artifact)
        ranks = ranked(in_request_order(held), predictor, 1, held.top_k + MORE, on_token=bar.update)
    return FitResult(artifact, {"validation_loss": loss, **compared(ranks, train, held)})


class Examples(NamedTuple):
    """Some segments: frequencies [segments, 1 + tokens, layers, experts, scales] before and after each token; whether
    the layer's next token selects each expert, and what its next use is worth: [segments, tokens, layers, experts]."""

    frequencies: torch.Tensor
    is_next: torch.Tensor
    worth: torch.Tensor


class Tape:
    """A trace's requests as one sequence of tokens, cut into segments of equal length.

    What lies before and after a segment is kept as the state at its ends: decayed frequencies of experts, and what the
    next use of each expert was worth.
    """

    def __init__(self, trace: RoutingTrace) -> None:
        rows = np.concatenate(rows_by_request(trace))[:MAX_TOKENS]
        self._length = min(_SEGMENT, len(rows))
        self._experts = rows_of(trace, rows[: len(rows) // self._length * self._length]).experts.astype(np.int64)
        self._num_experts = trace.num_experts
        self.num_segments = len(self._experts) // self._length
        prior, cells = trace.top_k / trace.num_experts, (trace.num_layers, trace.num_experts)
        self._before = np.empty((self.num_segments, *cells, len(ALPHAS)), np.float16)
        self._after = np.empty((self.num_segments, *cells), np.float16)
        frequencies = np.full((*cells, len(ALPHAS)), prior, np.float32)
        for segment in range(self.num_segments):
            self._before[segment] = frequencies
            for chosen in self._chosen(segment):
                frequencies = _followed(frequencies, chosen)
        worth = np.full(cells, prior / (1 - DISCOUNT * (1 - prior)), np.float32)
        for segment in reversed(range(self.num_segments)):
            self._after[segment] = worth
            for chosen in self._chosen(segment)[::-1]:
                worth = np.where(chosen > 0, 1, DISCOUNT * worth)

    def _chosen(self, segment: int) -> Floats:
        """1 where a token selected an expert: [tokens, layers, experts]."""
        experts = self._experts[segment * self._length : (segment + 1) * self._length]
        chosen = np.zeros((*experts.shape[:2], self._num_experts), np.float32)
        np.put_along_axis(chosen, experts, 1, axis=2)
        return chosen

    def examples(self, segments: npt.NDArray[np.int64]) -> Examples:
        """Of segments in any order."""
        chosen = np.stack([self._chosen(segment) for segment in segments.tolist()], axis=1)
        frequencies, worth = [self._before[segments].astype(np.float32)], [self._after[segments].astype(np.float32)]
        for token in chosen:
            frequencies.append(_followed(frequencies[-1], token))
        for token in chosen[:0:-1]:
            worth.append(np.where(token > 0, 1, DISCOUNT * worth[-1]).astype(np.float32))
        after = np.stack(worth[::-1], axis=1)
        arrays = np.stack(frequencies, axis=1), (after > DISCOUNT**0.5).astype(np.float32), after
        return Examples(*map(torch.from_numpy, arrays))


def _followed(frequencies: Floats, chosen: Floats) -> Floats:
    """Frequencies [..., scales] after a token that selected `chosen` [...]."""
    found: Floats = frequencies + np.array(ALPHAS, np.float32) * (chosen[..., None] - frequencies)
    return found


class Network(nn.Module):
    """What `runtime.predictors.sequence` computes, for many tokens at once, and trainable; untrained at first."""

    def __init__(self, shape: RoutingShape) -> None:
        super().__init__()
        self.shape, self.prior = shape, shape.top_k / shape.experts
        layers, experts, scales, features = shape.layers, shape.experts, len(ALPHAS), len(ALPHAS) + SAID
        self.context = _normal(layers, experts * scales, CONTEXT, std=0.5 * (layers * scales) ** -0.5)
        self.layer = nn.Parameter(torch.zeros(layers, CONTEXT))
        self.spread = _normal(layers, CONTEXT, experts * SAID, std=0.3 * CONTEXT**-0.5)
        self.inner = _normal(features, INNER, std=0.5 * features**-0.5)
        self.inner_bias = nn.Parameter(torch.zeros(INNER))
        self.outer = _normal(INNER, 2, std=0.5 * INNER**-0.5)
        self.direct = _normal(features, 2, std=0.5 * features**-0.5)
        odds = self.prior / max(1 - self.prior, 1e-3)
        self.bias = nn.Parameter(torch.full((layers, experts, 2), float(np.log(odds))))
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, frequencies: torch.Tensor) -> torch.Tensor:
        """Logits [segments, tokens, layers, experts, 2] after each token, of the examples' frequencies."""
        parts = torch.einsum("stlx,lxc->stlc", (frequencies - self.prior).flatten(3), self.context)
        now, before = parts[:, 1:], parts[:, :-1]
        # When a layer has run, the layers after it have not: theirs is what they said at the token before.
        context = now.cumsum(2) + before.sum(2, keepdim=True) - before.cumsum(2)
        hidden = self.dropout(torch.relu(context + self.layer))
        said = torch.einsum("stlc,lcx->stlx", hidden, self.spread).unflatten(3, (self.shape.experts, SAID))
        features = torch.cat([1 + 0.5 * torch.log(frequencies[:, 1:] + FREQUENCY_FLOOR), said], dim=-1)
        inner = torch.relu(features @ self.inner + self.inner_bias)
        return inner @ self.outer + features @ self.direct + self.bias

    def artifact(self, model: str, validation_requests: Sequence[int]) -> Artifact:
        """What the predictor loads."""
        arrays = {name: weight.detach().numpy() for name, weight in self.named_parameters()}
        arrays["alphas"] = np.array(ALPHAS, np.float32)
        params = {"discount": DISCOUNT, "validation_requests": list(validation_requests)}
        assert arrays.keys() == set(Weights._fields)
        return Artifact(KIND, model, self.shape, params, arrays)


def _normal(*size: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(*size) * std)


def _loss(network: Network, examples: Examples) -> torch.Tensor:
    """Binary cross entropies of the next token's choice and of the worth of the next use, the mean over experts."""
    logits = network(examples.frequencies)
    targets = torch.stack([examples.is_next, examples.worth], dim=-1)
    return 2 * nn.functional.binary_cross_entropy_with_logits(logits, targets)


def _train(network: Network, train: Tape, held: Tape, options: FitOptions, quiet: bool) -> float:
    """Leaves the weights of the epoch with the lowest validation loss, which is returned."""
    generator = np.random.default_rng(options.seed)
    validation = generator.permutation(held.num_segments)[:_VALIDATION_SEGMENTS]
    per_epoch = -(-train.num_segments // _BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    halved_after = max(per_epoch, _HALVED_AFTER)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step / halved_after))
    best, best_loss, waited = copied_weights(network), np.inf, 0
    with tqdm(total=per_epoch * options.epochs, unit="step", desc="training", disable=quiet) as bar:
        for epoch in range(options.epochs):
            for segments in _batches(generator.permutation(train.num_segments)):
                optimizer.zero_grad()
                _loss(network, train.examples(segments)).backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                rate.step()
                bar.update()
            loss = _mean_loss(network, held, validation)
            bar.set_postfix_str(f"epoch {epoch + 1}, validation loss {loss:.4f}")
            waited = 0 if loss < best_loss * (1 - _LEAST_GAIN) else waited + 1
            if loss < best_loss:
                best, best_loss = copied_weights(network), loss
            if waited >= options.patience:
                break
    network.load_state_dict(best)
    return best_loss


def _batches(segments: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    return (segments[start : start + _BATCH] for start in range(0, len(segments), _BATCH))


@torch.inference_mode()
def _mean_loss(network: Network, tape: Tape, segments: npt.NDArray[np.int64]) -> float:
    network.eval()
    total = sum(_loss(network, tape.examples(some)).item() * len(some) for some in _batches(segments))
    network.train()
    return total / len(segments)
