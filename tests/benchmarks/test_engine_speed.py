"""How fast the engine is on the bundled demo model. `--benchmark-enable` measures; else each runs once.

Every run does the same work. `python -m harness.check --base REF` runs this file on older code too: it keeps to what
has long been there, and takes the model and the text that lie beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import runtime
from harness.measure.runner import Decoder
from harness.measure.workload import TokenRequest, Workload, cut, load_workload
from runtime.engine import Engine
from runtime.profile import Profile
from runtime.prompts import PromptRequest
from runtime.serving import run_batch

pytestmark = [pytest.mark.slow, pytest.mark.paired]

DEMO = Path(__file__).parents[2] / "harness" / "demo"
MODEL, TEXT = DEMO / "model", DEMO / "heldout.jsonl"
LAYERS = 8
STEADY = {"prefetch.on_trial": False}  # else the engine tries, as time goes, how decoding does without prefetch
SETTLED = 4  # runs after which a policy that learns from the same text again and again has little left to learn

Open = Callable[..., Engine]


@pytest.fixture(autouse=True)
def no_progress_bar() -> None:
    disable_progress_bar()


@pytest.fixture
def load() -> Iterator[Open]:
    """`load("25%")` loads the model with so many slots; other profile keys may follow."""
    with ExitStack() as stack:
        yield lambda slots, **others: stack.enter_context(
            runtime.load(Profile.default(), MODEL, overrides={"cache.slots": slots, **STEADY, **others})
        )


@cache
def source() -> tuple[Any, Workload]:
    """The tokenizer, and the first of the text: all of it would take longer to read than to measure."""
    workload = load_workload(TEXT)
    return AutoTokenizer.from_pretrained(MODEL), replace(workload, requests=workload.requests[:12])


def texts(prompt_tokens: int, output_tokens: int, number: int) -> tuple[TokenRequest, ...]:
    tokenizer, workload = source()
    sizes = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "num_requests": number}
    return cut(workload, tokenizer, **sizes, part="confirm")


def computed(benchmark: Any, engine: Engine, tokens: Sequence[Any]) -> None:
    """Keep what was computed, and by which kernels: a faster head must still compute the same."""
    benchmark.extra_info["tokens"] = hashlib.sha256(repr(tokens).encode()).hexdigest()
    compute = engine.profile.compute
    benchmark.extra_info["kernels"] = {"prefill": str(compute.prefill), "decode": str(compute.decode)}


def replay_decode(engine: Engine, request: TokenRequest, measure: Callable[..., Any]) -> list[int]:
    """Measure the decode of `request`, whose prompt is computed before."""

    def prefill() -> tuple[Decoder]:
        decoder = Decoder(engine.model)
        decoder.step(request.prompt_ids)
        return (decoder,)

    with torch.inference_mode():
        predicted: list[int] = measure(
            lambda decoder: [decoder.step([token]) for token in request.output_ids], setup=prefill
        )
    assert len(predicted) == len(request.output_ids)
    return predicted


def test_decode(load: Open, rate: Any, benchmark: Any) -> None:
    """A quarter of the experts resident: lookups, loads, evictions, prefetch, compute."""
    engine = load("25%")
    (request,) = texts(64, 24, 1)
    predicted = replay_decode(engine, request, lambda run, setup: rate("tokens", 24, run, setup, SETTLED))
    assert 0 < engine.stats().as_dict()["num_hits"] < engine.stats().as_dict()["num_lookups"]
    computed(benchmark, engine, predicted)


def test_decode_resident(load: Open, rate: Any, benchmark: Any) -> None:
    """Every expert resident: what a layer step costs beside the loads."""
    engine = load("100%")
    (request,) = texts(64, 40, 1)
    predicted = replay_decode(engine, request, lambda run, setup: rate("layer_steps", 40 * LAYERS, run, setup))
    computed(benchmark, engine, predicted)


def test_prefill(load: Open, rate: Any, benchmark: Any) -> None:
    """Prompts of 512 tokens, which need nearly all experts of every layer: served in waves."""
    engine = load("25%")
    prompts = [request.prompt_ids for request in texts(512, 1, 3)]
    with torch.inference_mode():
        predicted = rate("tokens", 3 * 512, lambda: [Decoder(engine.model).step(prompt) for prompt in prompts])
    computed(benchmark, engine, predicted)


def test_batch(load: Open, rate: Any, benchmark: Any) -> None:
    """Continuous batching, four requests at a time."""
    engine = load("25%", **{"scheduler.group": 4})
    requests = [
        PromptRequest(request.id, request.prompt_ids, output_ids=request.output_ids) for request in texts(32, 6, 4)
    ]
    result = rate("tokens", 4 * 6, lambda: run_batch(engine, requests, concurrency=4))
    assert result.num_decode_passes < 4 * 6  # batched
    computed(benchmark, engine, [request.predicted_ids for request in result.requests])


def test_load(rate: Any) -> None:
    """From a folder to an engine that can run."""

    def load_and_close() -> None:
        for _ in range(4):
            runtime.load(Profile.default(), MODEL, overrides={"cache.slots": "25%"}).close()

    rate("loads", 4, load_and_close)
