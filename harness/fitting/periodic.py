"""Trains the sequence model of `periodic` on the prompts of a trace, in the order in which they came."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from harness.fitting.base import FitOptions, FitResult, model_name, routing_shape
from harness.fitting.training import copied_weights, settings_of_torch
from runtime.errors import TraceError
from runtime.predictors.artifact import RoutingShape
from runtime.predictors.base import Forecast
from runtime.predictors.expert_frequencies import HISTORY, Frequencies, PastPrompt, PromptModel, decayed_frequencies
from runtime.predictors.expert_sequence import ExpertSequence, Question, Sizes
from runtime.predictors.periodic import KIND
from runtime.trace import RoutingTrace

SIZES = Sizes(hidden=64, window=32)
PERIODS = (1, 5, 20, 40)
"""Prompts between two predictions that it is trained and judged for; 40 is the paper's choice."""
LEAST_PROMPTS = 8

_BATCH = 4  # prompts, each asked about once per length of period
_AT_ONCE = 64  # questions, where nothing is learned
_LEARNING_RATE = 3e-4
_WEIGHT_DECAY = 1e-2
_STOPPING_SHARE = 0.2  # of the training prompts, the last ones: they decide when to stop and are not trained on
_UNKNOWN_SHARE = 0.2  # of the questions in training do not say the task, for the sake of tasks that come later
_MAX_TASKS = 256


def fit(trace: RoutingTrace, options: FitOptions, *, quiet: bool) -> FitResult:
    """See `harness.fitting.base.Fit`. The last requests are held out: what is to be predicted is what comes next.

    The figures are `recalls` of the held-out requests, beside those of baselines and of what no prediction per prompt
    can surpass: the request's own frequencies, known beforehand.

    Raises:
        TraceError: fewer than 8 requests.
    """
    numbers, prompts = prompts_of(trace)
    if len(prompts) < LEAST_PROMPTS:
        raise TraceError(
            f"request: {KIND} learns from the order of requests; {LEAST_PROMPTS} are needed, this has {len(prompts)}"
        )
    num_past = len(prompts) - max(1, round(len(prompts) * options.validation_share))
    with settings_of_torch(options):
        network = _trained(prompts[:num_past], routing_shape(trace), options, quiet)
        artifact = network.artifact(model_name(trace), validation_requests=sorted(numbers[num_past:]))
        figures = _compared(ExpertSequence.of(artifact).predict, prompts, num_past, network.shape)
    return FitResult(artifact, figures)


def prompts_of(trace: RoutingTrace) -> tuple[list[int], list[PastPrompt]]:
    """The requests of a trace by arrival: their numbers, and all that each used."""
    found, first = np.unique(trace.request, return_index=True)
    numbers = found[np.argsort(first)].tolist()
    offsets = np.arange(trace.num_layers)[:, None] * trace.num_experts
    cells = (trace.num_layers, trace.num_experts)
    prompts = []
    for number in numbers:
        experts = trace.experts[trace.request == number].astype(np.int64)
        counts = np.bincount((experts + offsets).reshape(-1), minlength=cells[0] * cells[1])
        prompts.append(PastPrompt(trace.task(number), counts.reshape(cells).astype(np.float32), len(experts)))
    return numbers, prompts


def recalls(
    model: PromptModel, prompts: Sequence[PastPrompt], first: int, top_k: int, periods: Sequence[int]
) -> list[float]:
    """Recall@k of the tokens of `prompts[first:]`, for each number of prompts between two predictions.

    A prompt is equally often the first, second, … of a period: the mean over these is taken.
    """
    found = []
    for period in periods:
        starts = range(max(1, first - period + 1), len(prompts))
        predicted = {start: model(prompts[max(0, start - HISTORY) : start], period) for start in starts}
        right = num_chosen = 0.0
        for place in range(first, len(prompts)):
            prompt = prompts[place]
            for start in range(max(1, place - period + 1), place + 1):
                shares = predicted[start].get(prompt.task, predicted[start][None])
                right += _num_right(shares, prompt, top_k)
                num_chosen += float(prompt.counts.sum())
        found.append(right / num_chosen)
    return found


def _num_right(shares: Forecast, prompt: PastPrompt, top_k: int) -> float:
    """Choices of the prompt's tokens that are among the top_k of their layer."""
    top = np.argsort(-shares, axis=1, kind="stable")[:, :top_k]
    return float(np.take_along_axis(prompt.counts, top, axis=1).sum())


def _previous_prompt(past: Sequence[PastPrompt], period: int) -> Frequencies:
    return {None: past[-1].counts}


def _compared(
    network: PromptModel, prompts: Sequence[PastPrompt], num_past: int, shape: RoutingShape
) -> dict[str, float]:
    popularity = sum((prompt.counts for prompt in prompts[1:num_past]), prompts[0].counts)
    models: dict[str, PromptModel] = {
        "": network,
        "_of_frequency": lambda past, period: decayed_frequencies(past, shape),
        "_of_previous_prompt": _previous_prompt,
    }
    figures = {
        f"recall_at_k_every_{period}{name}": recall
        for name, model in models.items()
        for period, recall in zip(PERIODS, recalls(model, prompts, num_past, shape.top_k, PERIODS), strict=True)
    }
    held = prompts[num_past:]
    num_chosen = sum(float(prompt.counts.sum()) for prompt in held)
    figures["recall_at_k_of_popularity"] = sum(_num_right(popularity, p, shape.top_k) for p in held) / num_chosen
    figures["recall_at_k_of_own_frequencies"] = sum(_num_right(p.counts, p, shape.top_k) for p in held) / num_chosen
    return figures


class _Example(NamedTuple):
    """A question, and the answer of one prompt: the shares of its tokens that chose each expert, [layers, experts]."""

    question: Question
    shares: Forecast


def _trained(prompts: Sequence[PastPrompt], shape: RoutingShape, options: FitOptions, quiet: bool) -> ExpertSequence:
    """The network of the epoch with the lowest loss on the last of `prompts`; before the first it is the frequency
    model."""
    end = len(prompts) - max(1, round(len(prompts) * _STOPPING_SHARE))
    seen = Counter(prompt.task for prompt in prompts[:end])
    network = ExpertSequence(SIZES, shape, [task for task, count in seen.most_common(_MAX_TASKS) if count > 1])
    generator = np.random.default_rng(options.seed)
    stopping = [
        example for place in range(end, len(prompts)) for example in _examples(prompts, place, shape, generator)
    ]
    optimizer = torch.optim.AdamW(network.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    best, best_loss, waited = copied_weights(network), _mean_loss(network, stopping), 0
    with tqdm(total=options.epochs, unit="epoch", desc="training", disable=quiet) as bar:
        for _ in range(options.epochs):
            _epoch(network, optimizer, prompts[:end], generator)
            loss = _mean_loss(network, stopping)
            bar.update()
            bar.set_postfix_str(f"validation loss {loss:.4f}")
            if loss < best_loss:
                best, best_loss, waited = copied_weights(network), loss, 0
            elif (waited := waited + 1) >= options.patience:
                break
    network.load_state_dict(best)
    return network


def _epoch(
    network: ExpertSequence,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[PastPrompt],
    generator: np.random.Generator,
) -> None:
    """Every prompt but the first is asked about a few times, each time from elsewhere in its past."""
    order = generator.permutation(np.arange(1, len(prompts))).tolist()
    for some in (order[start : start + _BATCH] for start in range(0, len(order), _BATCH)):
        examples = [
            example
            for place in some
            for example in _examples(prompts, place, network.shape, generator, unknown_share=_UNKNOWN_SHARE)
        ]
        optimizer.zero_grad()
        _loss(network, examples).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


def _examples(
    prompts: Sequence[PastPrompt],
    place: int,
    shape: RoutingShape,
    generator: np.random.Generator,
    unknown_share: float = 0.0,
) -> Iterator[_Example]:
    """What prompt `place` will use, asked at the beginning of a period of each length that it may fall into."""
    prompt = prompts[place]
    shares = prompt.counts / np.float32(prompt.tokens)
    for period in PERIODS:
        start = max(1, place - int(generator.integers(period)))
        task = None if generator.random() < unknown_share else prompt.task
        past = prompts[max(0, start - HISTORY) : start]
        base = decayed_frequencies(past, shape, [prompt.task])[task]
        yield _Example(Question(past, task, period, base), shares)


def _loss(network: ExpertSequence, examples: Sequence[_Example]) -> torch.Tensor:
    """Binary cross entropy of the shares, the mean over examples, layers and experts."""
    shares = torch.from_numpy(np.stack([example.shares for example in examples]))
    logits = network([example.question for example in examples])
    return nn.functional.binary_cross_entropy_with_logits(logits, shares)


@torch.inference_mode()
def _mean_loss(network: ExpertSequence, examples: Sequence[_Example]) -> float:
    batches = [examples[start : start + _AT_ONCE] for start in range(0, len(examples), _AT_ONCE)]
    return sum(_loss(network, some).item() * len(some) for some in batches) / len(examples)
