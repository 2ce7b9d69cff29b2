"""The closed loop and the replay, against a fake clock and against plain forward passes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from harness.measure.runner import replay
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
    result = replay(model, _requests(2), group=1, concurrency=1, clock=model.clock)
    assert [(r.arrival_s, r.first_token_s, r.finish_s) for r in result.requests] == [(0, 1, 3), (3, 4, 6)]
    assert (result.latency_ms_p50, result.ttft_ms_p50, result.tpot_ms_p50) == (1000, 1000, 1000)
    assert result.tokens_per_s == 1.0


def test_waiting_counts_in_latency_and_grouping_shortens_it() -> None:
    alone, together = Ticking(), Ticking()
    single = replay(alone, _requests(4), group=1, concurrency=4, clock=alone.clock)
    grouped = replay(together, _requests(4), group=2, concurrency=4, clock=together.clock)
    assert [r.finish_s - r.arrival_s for r in single.requests] == [3, 6, 9, 12]
    assert [r.finish_s - r.arrival_s for r in grouped.requests] == [3, 3, 6, 6]
    assert together.batches[0] == (2, 2) and single.predicted_ids == grouped.predicted_ids


def test_a_new_request_arrives_when_one_finishes() -> None:
    model = Ticking()
    result = replay(model, _requests(3), group=1, concurrency=2, clock=model.clock)
    assert [r.arrival_s for r in result.requests] == [0, 0, 3]


def test_the_real_token_is_fed_whatever_was_predicted() -> None:
    model = Ticking()
    result = replay(model, _requests(1), group=1, concurrency=1, clock=model.clock)
    assert result.predicted_ids == ((2, 101, 102),)  # prompt ends in 1; then 100 and 101 are fed


def test_each_request_of_a_group_has_its_own_end() -> None:
    model = Ticking()
    mixed = [_requests(1, output=2)[0], _requests(2, output=4)[1]]
    result = replay(model, mixed, group=2, concurrency=2, clock=model.clock)
    assert [(r.num_tokens, r.finish_s) for r in result.requests] == [(2, 2), (4, 4)]


def test_a_single_token_has_no_time_per_output_token() -> None:
    model = Ticking()
    assert replay(model, _requests(1, output=1), group=1, concurrency=1, clock=model.clock).tpot_ms_p50 is None


def test_the_hook_runs_between_prefill_and_decode() -> None:
    model, seen = Ticking(), []
    replay(model, _requests(2), group=1, concurrency=1, clock=model.clock, on_decode=lambda: seen.append(model.now))
    assert seen == [1, 4]


@pytest.mark.parametrize("options", [{"group": 0, "concurrency": 1}, {"group": 1, "concurrency": 0}])
def test_nothing_to_run_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="nothing to run"):
        replay(Ticking(), _requests(1), **options)


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize("group", [1, 3])
def test_predictions_are_those_of_one_forward_over_the_whole_text(model: Qwen3MoeForCausalLM, group: int) -> None:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(64, (length + 5,), generator=generator).tolist() for length in (4, 7, 6)]  # unequal: padded
    requests = [TokenRequest(str(i), "t", tuple(text[:-5]), tuple(text[-5:])) for i, text in enumerate(texts)]
    result = replay(model, requests, group=group, concurrency=3)
    with torch.inference_mode():
        whole = [model(torch.tensor([text])).logits[0, -6:-1].argmax(-1).tolist() for text in texts]
    assert [list(ids) for ids in result.predicted_ids] == whole


def test_the_digest_tells_predictions_apart(model: Qwen3MoeForCausalLM) -> None:
    first, other = ([TokenRequest("a", "t", ids, (1, 2, 3))] for ids in ((5, 6), (9, 33)))
    digests = [replay(model, requests, group=1, concurrency=1).sha256 for requests in (first, first, other)]
    assert digests[0] == digests[1] != digests[2]
