"""Run a workload through a model by replaying its text, in a closed loop, and keep the time of every request.

Replay (teacher forcing) feeds the next real token instead of the predicted one, so that routing is that of real text.
Closed loop: a fixed number of requests is outstanding; the next one arrives when one finishes.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from harness.measure.stats import median
from harness.measure.workload import TokenRequest

Clock = Callable[[], float]


@dataclass(frozen=True)
class RequestResult:
    """One request: seconds on the run's clock, and what the model predicted at each step."""

    id: str
    arrival_s: float
    first_token_s: float
    finish_s: float
    predicted_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Output tokens."""
        return len(self.predicted_ids)

    @property
    def latency_ms(self) -> float:
        """(finish - arrival) / output tokens: what a client sees, waiting included."""
        return 1e3 * (self.finish_s - self.arrival_s) / self.num_tokens

    @property
    def ttft_ms(self) -> float:
        """Time to first token, waiting included."""
        return 1e3 * (self.first_token_s - self.arrival_s)

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first; None for a request of one token."""
        return 1e3 * (self.finish_s - self.first_token_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None


@dataclass(frozen=True)
class RunResult:
    """All requests of a run, in the order of the workload."""

    requests: tuple[RequestResult, ...]

    @property
    def latency_ms_p50(self) -> float:
        """Median over requests of `latency_ms`."""
        return median([request.latency_ms for request in self.requests])

    @property
    def ttft_ms_p50(self) -> float:
        """Median over requests of `ttft_ms`."""
        return median([request.ttft_ms for request in self.requests])

    @property
    def tpot_ms_p50(self) -> float | None:
        """Median over requests of `tpot_ms`; None when no request has a second token."""
        known = [request.tpot_ms for request in self.requests if request.tpot_ms is not None]
        return median(known) if known else None

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all requests per second of the whole run, prefill included."""
        span_s = max(r.finish_s for r in self.requests) - min(r.arrival_s for r in self.requests)
        return sum(request.num_tokens for request in self.requests) / span_s

    @property
    def predicted_ids(self) -> tuple[tuple[int, ...], ...]:
        """The most likely token at every step, per request."""
        return tuple(request.predicted_ids for request in self.requests)

    @property
    def sha256(self) -> str:
        """Digest of `predicted_ids`: equal for two configurations that compute the same."""
        return hashlib.sha256(repr(self.predicted_ids).encode()).hexdigest()


def replay(
    model: Any,
    requests: Sequence[TokenRequest],
    *,
    group: int,
    concurrency: int,
    clock: Clock = time.perf_counter,
    on_decode: Callable[[], None] | None = None,
) -> RunResult:
    """Decode `requests` and time them.

    Args:
        model: a transformers causal language model in eval mode; requests go to its device.
        requests: each with at least one prompt and one output token.
        group: prompts decoded together as one left-padded batch, at least 1.
        concurrency: requests outstanding at any time, at least 1; a group never holds more than that.
        clock: seconds, monotonic.
        on_decode: called once per group, between its prefill and its first decode step.

    Raises:
        ValueError: no requests, or `group` or `concurrency` below 1.
    """
    if not requests or group < 1 or concurrency < 1:
        raise ValueError(f"nothing to run: {len(requests)} requests, group {group}, concurrency {concurrency}")
    start = clock()
    coming = deque(enumerate(requests))
    waiting = deque((start, *coming.popleft()) for _ in range(min(concurrency, len(coming))))
    results: dict[int, RequestResult] = {}
    while waiting:
        batch = [waiting.popleft() for _ in range(min(group, len(waiting)))]
        served = _serve([request for _, _, request in batch], _Decoder(model), clock, on_decode)
        for (arrival, position, request), (first, finish, predicted) in zip(batch, served, strict=True):
            results[position] = RequestResult(request.id, arrival - start, first - start, finish - start, predicted)
            if coming:
                waiting.append((finish, *coming.popleft()))
    return RunResult(tuple(results[position] for position in range(len(requests))))


class _Decoder:
    """One left-padded batch of a model and its KV cache."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, None
        self._mask: torch.Tensor | None = None
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._options["logits_to_keep"] = 1

    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Most likely next tokens, int64 [B]. Prompts of one length need no padding, hence no mask."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        if min(map(len, prompts)) < longest:
            self._mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        return self._forward(ids)

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Most likely next tokens after one more real token per sequence, int64 [B]."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(torch.tensor(tokens).unsqueeze(1))

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        device, padding = self._model.device, {}
        if self._mask is not None:
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            padding = {"attention_mask": self._mask.to(device), "position_ids": positions.to(device)}
        output = self._model(ids.to(device), past_key_values=self._cache, **padding, **self._options)
        self._cache = output.past_key_values  # a DynamicCache, or what the architecture needs
        predicted: torch.Tensor = output.logits[:, -1].argmax(-1)
        return predicted


@torch.inference_mode()
def _serve(
    requests: Sequence[TokenRequest], decoder: _Decoder, clock: Clock, on_decode: Callable[[], None] | None
) -> list[tuple[float, float, tuple[int, ...]]]:
    """First-token time, finish time and predictions of each request of a group.

    A request that is done before the longest one of its group goes on with its last token, which nobody counts.
    """
    lengths = [len(request.output_ids) for request in requests]
    predicted = [decoder.prefill([request.prompt_ids for request in requests]).cpu()]
    times = [clock()]
    if on_decode is not None:
        on_decode()
    for step in range(max(lengths) - 1):
        fed = [request.output_ids[min(step, len(request.output_ids) - 1)] for request in requests]
        predicted.append(decoder.step(fed).cpu())
        times.append(clock())
    table = np.stack([row.numpy() for row in predicted], axis=1)
    return [(times[0], times[n - 1], tuple(row[:n].tolist())) for n, row in zip(lengths, table, strict=True)]
