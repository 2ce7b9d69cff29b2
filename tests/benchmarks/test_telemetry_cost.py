"""What telemetry costs per event. `--benchmark-enable` measures; else each runs once. No time is asserted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client")  # the paired check collects this file in environments without it

from prometheus_client import CollectorRegistry, generate_latest

import runtime
from harness.measure.runner import replay
from harness.measure.telemetry_cost import event_ns, paired, without_telemetry
from harness.measure.workload import cut, load_workload
from runtime.latency import Histogram
from runtime.metrics import register
from runtime.telemetry import LATENCY_BUCKETS_S
from runtime.vocabulary import Pass, Phase

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parents[2] / "harness" / "demo" / "model"
EVENTS = 10_000
DECODE = Pass(Phase.DECODE, 1, 0, (0,), (0,))

Rate = Callable[[str, int, Callable[[], Any]], Any]


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[runtime.Engine, CollectorRegistry]]:
    registry = CollectorRegistry()
    with runtime.load(MODEL, overrides={"cache.slots": "25%"}) as engine:
        register(engine, registry)
        yield engine, registry


def test_observations(rate: Rate) -> None:
    histogram = Histogram(LATENCY_BUCKETS_S)
    histogram.reset()
    rate("events", EVENTS, lambda: [histogram.observe(0.02) for _ in range(EVENTS)])
    assert histogram.value().num % EVENTS == 0 and histogram.value().num > 0


def test_decode_passes(watched: tuple[runtime.Engine, CollectorRegistry], rate: Rate) -> None:
    engine, _ = watched
    engine.reset_stats()

    def passes() -> None:
        for _ in range(EVENTS):
            engine.latency.begin(DECODE)
            for listener in engine.passes.end_listeners:
                listener(DECODE)

    rate("events", EVENTS, passes)
    assert engine.stats().latency.tpot.num >= EVENTS - 1


def test_scrapes(watched: tuple[runtime.Engine, CollectorRegistry], rate: Rate) -> None:
    _, registry = watched
    text = rate("events", 20, lambda: [generate_latest(registry) for _ in range(20)])[-1]
    assert b"expertflow_passes_total" in text


def test_what_is_measured_is_on_and_off(watched: tuple[runtime.Engine, CollectorRegistry]) -> None:
    """The comparison compares: telemetry hears of the one half of the tokens, and the counters of both."""
    engine, registry = watched
    sizes = {"prompt_tokens": 8, "output_tokens": 5, "num_requests": 2}
    requests = cut(load_workload(), engine.tokenizer, **sizes, part="confirm")
    engine.reset_stats()
    with_it, without = paired(engine, requests)
    stats = engine.stats()
    assert len(with_it) == len(without) == 2
    assert stats.cache.num_passes == 20 and (stats.latency.ttft.num, stats.latency.tpot.num) == (2, 8)
    with without_telemetry(engine):
        replay(engine.model, requests)
    assert engine.stats().latency.tpot.num == 8
    found = event_ns(engine, registry)
    assert all(ns > 0 for ns in found.values())
