"""An open loop: requests of several kinds arrive at random, each with a deadline; how many are complete in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.measure.workload import TokenRequest
from runtime.prompts import PromptRequest


@dataclass(frozen=True)
class Kind:
    """What the requests of a task are like: tokens of the prompt, and of the answer on average."""

    prompt_tokens: int
    output_tokens: int


KINDS = (Kind(32, 8), Kind(64, 24), Kind(160, 48))
"""Tasks take turns in being of one of these kinds."""
SPREAD = 0.25
"""Answers differ from their mean length by up to this share."""
MOST_TOKENS = round(max(kind.output_tokens for kind in KINDS) * (1 + SPREAD))
"""Of an answer; what a scheduler is told of every request's length, so that it has to learn the rest."""
TEXT_TOKENS = (max(kind.prompt_tokens for kind in KINDS), MOST_TOKENS)
"""Prompt and answer tokens that a text must have to become a request of any kind."""


@dataclass(frozen=True)
class Idle:
    """What a kind of request takes when nothing else runs."""

    ttft_s: float
    tpot_s: float

    def latency_s(self, num_tokens: int) -> float:
        """Of an answer of that many tokens."""
        return self.ttft_s + (num_tokens - 1) * self.tpot_s


def kinds_of(texts: Sequence[TokenRequest]) -> dict[str, Kind]:
    """The kind of every task."""
    tasks = sorted({text.task for text in texts})
    return {task: KINDS[place % len(KINDS)] for place, task in enumerate(tasks)}


def alone(texts: Sequence[TokenRequest], kind: Kind) -> PromptRequest:
    """A request of that kind, to see what it takes alone: of the first text of such a task."""
    kinds = kinds_of(texts)
    text = next((text for text in texts if kinds[text.task] == kind), texts[0])
    return _request(text, kind, kind.output_tokens)


def idle_of(sample: Mapping[str, Any]) -> Idle:
    """What the only request of a run took."""
    (one,) = sample["requests"]
    decoding_s = one["finish_s"] - one["first_token_s"]
    return Idle(one["first_token_s"] - one["arrival_s"], decoding_s / (one["num_tokens"] - 1))


def mixed(texts: Sequence[TokenRequest], seed: Sequence[int]) -> list[PromptRequest]:
    """Requests of the kinds that their tasks have, in random order and of random lengths, without deadlines."""
    generator, kinds = np.random.default_rng(seed), kinds_of(texts)
    lengths = generator.uniform(1 - SPREAD, 1 + SPREAD, len(texts))
    requests = [
        _request(text, kinds[text.task], round(kinds[text.task].output_tokens * length))
        for text, length in zip(texts, lengths, strict=True)
    ]
    return [requests[place] for place in generator.permutation(len(requests))]


def stream(
    texts: Sequence[TokenRequest],
    idle: Mapping[Kind, Idle],
    requests_per_s: float,
    factors: Sequence[float],
    seed: Sequence[int],
) -> list[PromptRequest]:
    """Requests that arrive as a Poisson process; each SLO is its idle latency times one of `factors`.

    Args:
        idle: what each kind takes alone.
        seed: of lengths, order, arrivals and factors; part of the ids, so that no two streams share one.
    """
    generator, kinds = np.random.default_rng([*seed, 1]), kinds_of(texts)
    arrivals_s = generator.exponential(1 / requests_per_s, len(texts)).cumsum()
    found = []
    for request, arrival_s in zip(mixed(texts, seed), arrivals_s.tolist(), strict=True):
        factor = float(generator.choice(factors))
        slo_s = factor * idle[kinds[request.task]].latency_s(request.max_output_tokens)
        name = f"{request.id}@{'.'.join(map(str, seed))}x{factor:g}"
        found.append(_with(request, id=name, arrival_s=arrival_s, slo_s=slo_s))
    return found


def share_in_time(requests: Sequence[PromptRequest], sample: Mapping[str, Any]) -> float:
    """Share of the requests that were complete within their SLO."""
    slos = {request.id: request.slo_s for request in requests}
    in_time = [bool(one["finish_s"] - one["arrival_s"] <= slos[one["id"]]) for one in sample["requests"]]
    return sum(in_time) / len(in_time)


def _request(text: TokenRequest, kind: Kind, num_tokens: int) -> PromptRequest:
    return PromptRequest(
        text.id,
        text.prompt_ids[: kind.prompt_tokens],
        max_new_tokens=MOST_TOKENS,
        task=text.task,
        output_ids=text.output_ids[:num_tokens],
    )


def _with(request: PromptRequest, **changed: Any) -> PromptRequest:
    return PromptRequest(**{**vars(request), **changed})
