"""Run a workload by replaying its text, in a closed loop, and keep the time of every request.

Replay (teacher forcing) feeds the next real token instead of the predicted one, so that routing is that of real text.
Closed loop: a fixed number of requests is outstanding; the next one arrives when one finishes.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from harness.measure.stats import median
from harness.measure.workload import TokenRequest
from runtime.prompts import PromptRequest, RequestResult

if TYPE_CHECKING:
    from runtime.engine import Engine

Clock = Callable[[], float]


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


def serve(
    engine: Engine,
    requests: Sequence[TokenRequest],
    concurrency: int,
    *,
    on_finish: Callable[[RequestResult], None] = lambda result: None,
) -> RunResult:
    """Replay `requests` as the engine's profile would serve them, `concurrency` outstanding at any time.

    A single one is decoded as by `generate`; more go through continuous batching, with the profile's scheduler.

    Args:
        on_finish: told each result as soon as its request is complete.

    Raises:
        ValueError: no requests, or `concurrency` below 1.
    """
    if not requests or concurrency < 1:
        raise ValueError(f"nothing to run: {len(requests)} requests, concurrency {concurrency}")
    if concurrency == 1:
        return replay(engine.model, requests, on_finish=on_finish)
    # Imported late: peers are measured with `replay` too, and this would be in their memory.
    from runtime.serving import run_batch

    replays = [
        PromptRequest(request.id, request.prompt_ids, task=request.task, output_ids=request.output_ids)
        for request in requests
    ]
    return RunResult(run_batch(engine, replays, concurrency=concurrency, on_finish=on_finish).requests)


@torch.inference_mode()
def replay(
    model: Any,
    requests: Sequence[TokenRequest],
    *,
    clock: Clock = time.perf_counter,
    on_decode: Callable[[], None] = lambda: None,
    on_finish: Callable[[RequestResult], None] = lambda result: None,
) -> RunResult:
    """Decode `requests` one after another and time them; each arrives when the one before it finishes.

    Args:
        model: a transformers causal language model in eval mode; requests go to its device.
        requests: each with at least one prompt and one output token.
        clock: seconds, monotonic.
        on_decode: called once per request, between its prefill and its first decode step.
        on_finish: told each result as soon as its request is complete; the next one arrives when it returns.

    Raises:
        ValueError: no requests.
    """
    if not requests:
        raise ValueError("nothing to run: no requests")
    start = arrival = clock()
    results = []
    for request in requests:
        decoder = Decoder(model)
        predicted = [decoder.step(request.prompt_ids)]
        first = finish = clock()
        on_decode()
        for token in request.output_ids[:-1]:
            predicted.append(decoder.step([token]))
            finish = clock()
        times = (arrival - start, first - start, finish - start)
        results.append(RequestResult(request.id, request.task, *times, request.output_ids, tuple(predicted)))
        on_finish(results[-1])
        arrival = clock()
    return RunResult(tuple(results))


class Decoder:
    """One sequence of a transformers causal language model and its KV cache; the caller turns gradients off."""

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, None
        takes = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # its name before transformers 5.24
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in takes:
            self._options["logits_to_keep"] = 1

    def step(self, tokens: Sequence[int]) -> int:
        """The most likely next token after `tokens`."""
        return int(self.logits(tokens).argmax())

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Of the next token after `tokens`, [vocabulary]."""
        ids = torch.tensor([tokens], device=self._model.device)
        output = self._model(ids, **{self._cache_name: self._cache}, **self._options)
        self._cache = getattr(output, self._cache_name)  # a DynamicCache, or what the architecture needs
        logits: torch.Tensor = output.logits[0, -1]
        return logits
