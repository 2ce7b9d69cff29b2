"""How fast decisions are: replays of a trace, grouping of requests. `--benchmark-enable` measures; else each runs once.

One core, synthetic routing; nothing is asserted about time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from harness.fitting.base import rows_of
from harness.measure.prediction import in_request_order, ranked
from harness.measure.replay import Setting, Timing, predictor_of, replay
from harness.measure.schedule import Schedule
from runtime.schedulers.partition import distinct_experts, partition
from runtime.trace import RoutingTrace

pytestmark = pytest.mark.slow

TOKENS, LAYERS, EXPERTS, TOP_K, REQUESTS = 5000, 24, 32, 4, 20
TIMING = Timing(load_s=2e-3, expert_s=5e-4, layer_s=1e-3)
SLOTS = LAYERS * EXPERTS // 4

Rate = Callable[[str, int, Callable[[], Any]], Any]


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    """Routing about as local as that of gpt-oss-20b: every request has its taste, and moods that last some tokens."""
    generator = np.random.default_rng(0)
    shape = (LAYERS, EXPERTS)
    request = np.repeat(np.arange(REQUESTS), TOKENS // REQUESTS).astype(np.int32)
    taste = generator.normal(size=(REQUESTS, *shape), scale=1.6)
    mood, chosen = np.zeros(shape), np.zeros((TOKENS, LAYERS, TOP_K), np.uint16)
    for token in range(TOKENS):
        mood = 0.9 * mood + generator.normal(size=shape, scale=0.45)
        scores = taste[request[token]] + mood + generator.gumbel(size=shape)
        chosen[token] = np.argsort(-scores, axis=1)[:, :TOP_K]
    found = Schedule(RoutingTrace(chosen, request, {"num_experts": EXPERTS}))
    assert found.demands.experts.size == TOKENS * LAYERS * TOP_K  # computed here, outside of what is timed
    return found


@pytest.mark.parametrize("policy", ["lru", "lfru", "next_use", "td_next_use", "plec"])
def test_compiled_replay(schedule: Schedule, rate: Rate, policy: str) -> None:
    result = rate("layer_events", TOKENS * LAYERS, lambda: replay(schedule, Setting(policy, SLOTS), TIMING))
    assert result.cache.num_hits + result.cache.num_misses == TOKENS * LAYERS * TOP_K


@pytest.mark.paired
def test_replay_through_the_coordinator(schedule: Schedule, rate: Rate) -> None:
    tokens = 250
    part = Schedule(schedule.trace, max_tokens=tokens)
    setting = Setting("next_use", SLOTS, "previous_token", depth=1, count=2)
    result = rate("layer_events", tokens * LAYERS, lambda: replay(part, setting, TIMING))
    assert result.cache.num_layer_steps == tokens * LAYERS and result.cache.num_prefetch_issued > 0


def test_queries_of_the_activation_matrices(schedule: Schedule, rate: Rate) -> None:
    """With a collection that past requests have filled: a forecast after every layer."""
    pytest.importorskip("runtime.predictors.activation_matrix")
    tokens, short = 200, replace(schedule.trace, request=np.arange(TOKENS, dtype=np.int32) // 40)
    predictor = predictor_of(Setting("lru", 1, "activation_matrix"), schedule)
    ranked(in_request_order(short), predictor, 1, TOP_K)
    part = in_request_order(rows_of(short, np.arange(tokens)))
    found = rate("layer_events", tokens * LAYERS, lambda: ranked(part, predictor, 1, TOP_K))
    assert (found < EXPERTS).any()


def test_partition(rate: Rate) -> None:
    """64 requests into batches of 8, 48 layers x 128 experts top-8."""
    generator = np.random.default_rng(0)
    taste = generator.normal(size=(8, 48, 128))
    scores = taste[np.arange(64) % 8] + generator.gumbel(size=(64, 48, 128))
    routes = scores >= np.sort(scores, axis=2)[:, :, -8:-7]
    batches = rate("requests", 64, lambda: partition(routes, group=8))
    in_turn = [list(range(start, start + 8)) for start in range(0, 64, 8)]
    assert distinct_experts(routes, batches) <= distinct_experts(routes, in_turn)
