"""What `periodic` predicts from: past prompts, and the model of them that needs no training, decayed frequencies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from runtime.predictors.artifact import RoutingShape
from runtime.predictors.base import Forecast

HISTORY = 64
"""Prompts that are remembered; those that run are besides."""
DECAY = 0.95
"""Weight of a prompt's tokens in a frequency, relative to those of the prompt after it."""
PRIOR_TOKENS = 64.0
"""A task's frequencies start at those of all tasks, those of all tasks at uniform, with the weight of that many."""


class PastPrompt(NamedTuple):
    """What a prompt and its answer used so far: of `tokens` tokens, `counts[l, e]` chose expert e of layer l."""

    task: str
    counts: Forecast
    tokens: int


Frequencies = Mapping[str | None, Forecast]
"""By task, the share of tokens that choose each expert, float32 [layers, experts]; None: tasks not among them."""


class PromptModel(Protocol):
    """Predicts what coming prompts will use."""

    def __call__(self, past: Sequence[PastPrompt], period: int) -> Frequencies:
        """Frequencies in the next `period` prompts after `past`, which is not empty, oldest first."""
        ...


def decayed_frequencies(
    past: Sequence[PastPrompt], shape: RoutingShape, tasks: Iterable[str] | None = None
) -> dict[str | None, Forecast]:
    """The frequency model: shares of the tokens of past prompts, recent prompts counting more. Needs no training.

    Args:
        past: not empty, oldest first.
        tasks: whose frequencies are asked for, beside those of all tasks; None: of those in `past`.
    """
    weights = DECAY ** np.arange(len(past) - 1, -1, -1.0)
    counts = np.stack([prompt.counts for prompt in past]).reshape(len(past), -1)
    uniform = np.full(shape.layers * shape.experts, shape.top_k / shape.experts)
    tokens = weights * [prompt.tokens for prompt in past]
    overall = _shares(weights @ counts, tokens.sum(), uniform)
    found: dict[str | None, Forecast] = {None: overall.reshape(shape[:2])}
    for task in {prompt.task for prompt in past} if tasks is None else tasks:
        own = np.array([prompt.task == task for prompt in past])
        shares = _shares((weights * own) @ counts, tokens[own].sum(), overall)
        found[task] = shares.reshape(shape[:2])
    return found


def _shares(counts: npt.NDArray[Any], tokens: float, prior: npt.NDArray[Any]) -> Forecast:
    return ((counts + PRIOR_TOKENS * prior) / (tokens + PRIOR_TOKENS)).astype(np.float32)
