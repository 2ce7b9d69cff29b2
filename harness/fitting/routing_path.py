"""Trains `routing_path`, ExpertFlow's routing path predictor, on the token ids and routes of a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from harness.fitting.base import FitOptions, FitResult, model_name, routing_shape, split
from harness.fitting.figures import compared, rows_by_request
from harness.fitting.training import copied_weights, settings_of_torch
from harness.measure.prediction import MORE
from runtime.errors import TraceError
from runtime.predictors.artifact import Artifact
from runtime.predictors.params import RoutingPathParams
from runtime.predictors.routing_path import Integers, RoutingPathNetwork, Sizes, Window, windows_of
from runtime.trace import RoutingTrace

# The paper's grid search ended at hidden 32, feed-forward 2048. On the demo model's routing, after equal CPU time, that
# gives recall@4 .78 and this .83: 32 numbers per token are too few to tell all heads which token it is.
SIZES = Sizes(hidden=128, feed_forward=256, heads=4, head_size=32, encoder_layers=1, decoder_layers=2, window=64)
MAX_IDS = 16_384
EPOCH_TOKENS = 65_536
"""Tokens of an epoch at most; of a longer trace each epoch draws so many, so that training takes minutes anyway."""

_CONTEXT = RoutingPathParams().context
_BATCH = 8  # windows; with 32 the same number of tokens teaches far less
_LEARNING_RATE = 3e-3  # from scratch; the paper fine-tunes with 2e-4
_WEIGHT_DECAY = 1e-4
_WARM_UP_STEPS = 100
_EMBEDDING_STD = 0.1  # T5's own 1 drowns everything else for the first epochs
_VALIDATION_WINDOWS = 512  # for early stopping; the figures are of all


def fit(trace: RoutingTrace, options: FitOptions, *, quiet: bool) -> FitResult:
    """See `harness.fitting.base.Fit`. An epoch has `EPOCH_TOKENS` tokens at most; prefill and decode count alike.

    The figures are the artefact's: `validation_loss` (binary cross entropy per expert) and those of
    `harness.measure.prediction.ratios` over all held-out tokens, beside their baselines.

    Raises:
        TraceError: the trace has no token ids, or fewer than two requests.
    """
    if trace.token_ids is None:
        raise TraceError(
            "token_ids is missing, and routing_path learns from nothing else: record a trace that has them"
        )
    train, held = split(trace, options)
    with settings_of_torch(options):
        network = _new_network(train)
        validation = _validation_examples(_requests(network, held))
        sample = np.random.default_rng(options.seed).permutation(len(validation))[:_VALIDATION_WINDOWS]
        _train(network, _requests(network, train), [validation[i] for i in sample], options, quiet)
        artifact = network.artifact(model_name(trace), validation_requests=np.unique(held.request).tolist())
        figures = evaluate(artifact, train, held)
    return FitResult(artifact, figures)


@torch.inference_mode()
def evaluate(artifact: Artifact, train: RoutingTrace, held: RoutingTrace) -> dict[str, float]:
    """Figures of a trained predictor on `held`, and of baselines that know `train`."""
    network = RoutingPathNetwork.of(artifact)
    loss, num_ranks = 0.0, min(held.top_k + MORE, held.num_experts)
    ranks = np.empty((held.num_tokens, held.num_layers, num_ranks), np.uint16)
    for some in _batches(_validation_examples(_requests(network, held))):
        logits = _logits(network, some)
        loss += _loss(logits, some).item() * len(logits) / held.num_tokens
        ranks[np.concatenate([example.places for example in some])] = logits.topk(num_ranks, dim=-1).indices.numpy()
    return {"validation_loss": loss, **compared(ranks, train, held)}


class _Request(NamedTuple):
    """One request: its tokens' places in the trace, rows of the embedding, and experts [tokens, layers, top_k]."""

    places: Integers
    rows: Integers
    experts: Integers


class _Example(NamedTuple):
    """A window, and of the tokens that it is asked about: where they are in the trace, their experts."""

    window: Window
    places: Integers
    experts: Integers


def _requests(network: RoutingPathNetwork, trace: RoutingTrace) -> list[_Request]:
    assert trace.token_ids is not None
    rows, experts = network.rows(trace.token_ids.astype(np.int64)), trace.experts
    return [_Request(places, rows[places], experts[places].astype(np.int64)) for places in rows_by_request(trace)]


def _validation_examples(requests: Sequence[_Request]) -> list[_Example]:
    """Every token once, in the windows that the predictor would use."""
    found = []
    for request in requests:
        end = 0
        for window in windows_of(request.rows, 0, offset=0, context=_CONTEXT, stride=SIZES.stride):
            start, end = end, end + len(window.tokens) - window.asked
            found.append(_Example(window, request.places[start:end], request.experts[start:end]))
    return found


def _training_examples(requests: Sequence[_Request], generator: np.random.Generator) -> list[_Example]:
    """An epoch: every token once, cut elsewhere each time; of a long trace some windows only."""
    cuts = []
    for number, request in enumerate(requests):
        for start in range(-int(generator.integers(SIZES.window)), len(request.rows), SIZES.window):
            cuts.append((number, max(start, 0), start + SIZES.window))
    found = []
    for place in generator.permutation(len(cuts))[: EPOCH_TOKENS // SIZES.window]:
        number, start, end = cuts[place]
        request = requests[number]
        window = Window(request.rows[max(start - _CONTEXT, 0) : start], request.rows[start:end], 0)
        found.append(_Example(window, request.places[start:end], request.experts[start:end]))
    return found


def _batches(examples: Sequence[_Example], size: int = _BATCH) -> Iterator[Sequence[_Example]]:
    return (examples[i : i + size] for i in range(0, len(examples), size))


def _logits(network: RoutingPathNetwork, examples: Sequence[_Example]) -> torch.Tensor:
    """[tokens, layers, experts] of the tokens that are asked about."""
    windows = [example.window for example in examples]
    hidden = network.decode(
        [window.tokens for window in windows], network.encode([window.context for window in windows])
    )
    asked = [states[window.asked : len(window.tokens)] for states, window in zip(hidden, windows, strict=True)]
    return network.logits(torch.cat(asked))


def _loss(logits: torch.Tensor, examples: Sequence[_Example]) -> torch.Tensor:
    """ExpertFlow's multi-label binary cross entropy, the mean over tokens, layers and experts."""
    chosen = torch.from_numpy(np.concatenate([example.experts for example in examples]))
    return nn.functional.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits).scatter_(-1, chosen, 1.0))


def _new_network(train: RoutingTrace) -> RoutingPathNetwork:
    """Untrained. Ids seen once share the embedding of those never seen, so that it is trained too."""
    assert train.token_ids is not None
    ids, counts = np.unique(train.token_ids, return_counts=True)
    often = np.argsort(-counts, kind="stable")[:MAX_IDS]
    known = np.sort(ids[often][counts[often] > 1]).astype(np.int64)
    network = RoutingPathNetwork(SIZES, routing_shape(train), known)
    nn.init.normal_(network.t5.shared.weight, std=_EMBEDDING_STD)
    share = train.top_k / train.num_experts
    nn.init.constant_(network.heads.bias, np.log(share / max(1 - share, 1e-3)))
    return network


def _train(
    network: RoutingPathNetwork,
    requests: Sequence[_Request],
    validation: Sequence[_Example],
    options: FitOptions,
    quiet: bool,
) -> None:
    """Leaves the weights of the epoch with the lowest validation loss."""
    generator = np.random.default_rng(options.seed)
    per_epoch = -(-len(_training_examples(requests, generator)) // _BATCH)
    optimizer, schedule = _optimizer(network, per_epoch * options.epochs)
    best, best_loss, waited = copied_weights(network), np.inf, 0
    with tqdm(total=per_epoch * options.epochs, unit="step", desc="training", disable=quiet) as bar:
        for epoch in range(options.epochs):
            for some in _batches(_training_examples(requests, generator)):
                optimizer.zero_grad()
                _loss(_logits(network, some), some).backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
            loss = _mean_loss(network, validation)
            bar.set_postfix_str(f"epoch {epoch + 1}, validation loss {loss:.4f}")
            if loss < best_loss:
                best, best_loss, waited = copied_weights(network), loss, 0
            elif (waited := waited + 1) >= options.patience:
                break
    network.load_state_dict(best)


def _optimizer(
    network: nn.Module, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW; the rate rises linearly, then falls linearly to nothing at the last step."""
    optimizer = torch.optim.AdamW(network.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    warm_up = min(_WARM_UP_STEPS, 1 + num_steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1.0) * max(1.0 - step / num_steps, 0.0)
    )
    return optimizer, rate


@torch.inference_mode()
def _mean_loss(network: RoutingPathNetwork, examples: Sequence[_Example]) -> float:
    losses = [(_loss(_logits(network, some), some).item(), sum(map(_num_asked, some))) for some in _batches(examples)]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def _num_asked(example: _Example) -> int:
    return len(example.places)
