"""The closed loop and the replay, against a fake clock and against plain forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import runtime
from harness.measure.runner import replay, serve
from harness.measure.workload import TokenRequest


class Ticking:
    """A clock and a model in one: each forward pass takes one second, and predicts last token + 1."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.now, self.batches = 0.0, []

    def __call__(self, ids: torch.Tensor, *, past_key_values: Any, use_cache: bool, **padding: torch.Tensor) -> Any:
        self.now += 1.0
        self.batches.append(tuple(ids.shape))
        logits = torch.nn.functional.one_hot(ids + 1, 256).float()
        return SimpleNamespace(logits=logits, past_key_values="cache")

    forward = __call__

    def clock(self) -> float:
        return self.now


def _requests(number: int, output: int = 3) -> list[TokenRequest]:
    return [TokenRequest(str(i), "t", (10 * i, 10 * i + 1), tuple(range(100, 100 + output))) for i in range(number)]


def test_one_request_at_a_time_waits_for_nobody() -> None:
    model = Ticking()
    result = replay(model, _requests(2), clock=model.clock)
    assert [(r.arrival_s, r.first_token_s, r.finish_s) for r in result.requests] == [(0, 1, 3), (3, 4, 6)]
    assert (result.latency_ms_p50, result.ttft_ms_p50, result.tpot_ms_p50) == (1000, 1000, 1000)
    assert result.tokens_per_s == 1.0


def test_the_real_token_is_fed_whatever_was_predicted() -> None:
    model = Ticking()
    result = replay(model, _requests(1), clock=model.clock)
    assert result.predicted_ids == ((2, 101, 102),)  # prompt ends in 1; then 100 and 101 are fed


def test_a_single_token_has_no_time_per_output_token() -> None:
    model = Ticking()
    assert replay(model, _requests(1, output=1), clock=model.clock).tpot_ms_p50 is None


def test_the_hook_runs_between_prefill_and_decode() -> None:
    model, seen = Ticking(), []
    replay(model, _requests(2), clock=model.clock, on_decode=lambda: seen.append(model.now))
    assert seen == [1, 4]


def test_each_result_is_told_when_its_request_is_complete() -> None:
    model, seen = Ticking(), []

    def slow(result: Any) -> None:
        seen.append((result.id, model.now))
        model.now += 10.0

    result = replay(model, _requests(2), clock=model.clock, on_finish=slow)
    assert seen == [("0", 3.0), ("1", 16.0)]
    assert [(r.arrival_s, r.finish_s) for r in result.requests] == [(0, 3), (13, 16)]  # the listener's time is nobody's


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[runtime.Engine]:
    overrides = {"cache.slots": "50%", "scheduler.group": 2, "scheduler.window": 2}
    with runtime.load(tiny_checkpoint, overrides=overrides, dtype=torch.float32) as engine:
        yield engine


def _texts(*prompts: int) -> list[TokenRequest]:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(4096, (length + 5,), generator=generator).tolist() for length in prompts]
    return [TokenRequest(str(i), "t", tuple(text[:-5]), tuple(text[-5:])) for i, text in enumerate(texts)]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_predictions_are_those_of_one_forward_over_the_whole_text(engine: runtime.Engine, concurrency: int) -> None:
    requests = _texts(4, 7, 6, 3)
    phases: list[tuple[int, ...]] = []
    engine.on_pass(lambda passing: phases.append(passing.requests))
    told: list[Any] = []
    result = serve(engine, requests, concurrency, on_finish=told.append)
    assert sorted(told, key=lambda one: one.id) == list(result.requests)
    assert max(len(set(numbers)) for numbers in phases) == min(concurrency, 2)  # the profile's group
    with torch.inference_mode():
        texts = [torch.tensor([[*request.prompt_ids, *request.output_ids]]) for request in requests]
        whole = [engine.model(text).logits[0, -6:-1].argmax(-1).tolist() for text in texts]
    assert [list(ids) for ids in result.predicted_ids] == whole


@pytest.mark.parametrize("requests, concurrency", [([], 1), (_texts(4), 0)])
def test_nothing_to_run_is_refused(engine: runtime.Engine, requests: list[TokenRequest], concurrency: int) -> None:
    with pytest.raises(ValueError, match="nothing to run"):
        serve(engine, requests, concurrency)


def test_the_digest_tells_predictions_apart(engine: runtime.Engine) -> None:
    first, other = ([TokenRequest("a", "t", ids, (1, 2, 3))] for ids in ((5, 6), (9, 22)))
    digests = [replay(engine.model, requests).sha256 for requests in (first, first, other)]
    assert digests[0] == digests[1] != digests[2]
