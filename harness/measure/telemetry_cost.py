"""What telemetry costs: nanoseconds of each event, and their share of the time per output token.

Two ways that must agree: the events of one token, timed alone, over TPOT; and decoding with and without telemetry in
turns. `python -m harness.measure.telemetry_cost` measures both on the bundled demo model, as it is and widened, and
writes `results/telemetry/DATE.json`.
"""

from __future__ import annotations

import json
import os
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.measure.provenance import provenance
from harness.measure.runner import replay
from harness.measure.stats import exact_ratio, median
from harness.measure.workload import TokenRequest, cut, load_workload
from runtime.files import write_atomic
from runtime.latency import Histogram
from runtime.metrics import register
from runtime.telemetry import LATENCY_BUCKETS_S
from runtime.vocabulary import Pass, Phase

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from runtime.engine import Engine

FOLDER = Path(__file__).parents[2] / "results" / "telemetry"
SLOTS = "25%"
PROMPT_TOKENS, OUTPUT_TOKENS = 16, 33
NUM_PAIRS = 60
SCRAPE_EVERY_S = 15.0
"""How often Prometheus usually asks."""
WIDENED_BYTES = 1 << 20


def event_ns(engine: Engine, registry: CollectorRegistry) -> dict[str, float]:
    """Nanoseconds of each event of an engine whose metrics `registry` has: the fastest of several rounds.

    `decode_pass` is all that a decode pass of one sequence adds; the engine must not run meanwhile.
    """
    from prometheus_client import generate_latest

    engine.reset_stats()
    passing = Pass(Phase.DECODE, 1, 0, (0,), (0,))
    ended, histogram = engine.passes.end_listeners, Histogram(LATENCY_BUCKETS_S)

    def decode_pass() -> None:
        engine.latency.begin(passing)
        for listener in ended:
            listener(passing)

    def watch() -> None:
        engine.latency.begin(passing)
        engine.latency.end(passing)

    return {
        "observe": _fastest_ns(lambda: histogram.observe(0.02), 20_000),
        "pass_always": _fastest_ns(watch, 5_000),
        "decode_pass": _fastest_ns(decode_pass, 5_000),
        "summary_line": _fastest_ns(lambda: engine.stats().line(), 200),
        "scrape": _fastest_ns(lambda: generate_latest(registry), 50),
    }


def _fastest_ns(call: Callable[[], Any], number: int) -> float:
    return 1e9 * min(timeit.repeat(call, number=number, repeat=7)) / number


@contextmanager
def without_telemetry(engine: Engine) -> Iterator[None]:
    """Passes that nobody times and no metrics hear of."""
    passes = engine.passes
    begun, ended = list(passes.listeners), list(passes.end_listeners)
    passes.listeners.remove(engine.latency.begin)
    passes.end_listeners.clear()
    try:
        yield
    finally:
        passes.listeners[:], passes.end_listeners[:] = begun, ended


class Sample(NamedTuple):
    """One replay: time per output token, and what the computing thread's processor spent on each token, prompt
    included. The second feels other processes far less."""

    tpot_ms: float
    cpu_ms: float


def paired(engine: Engine, requests: Sequence[TokenRequest]) -> tuple[list[Sample], list[Sample]]:
    """With and without telemetry: every request twice, and which comes first alternates."""
    with_it: list[Sample] = []
    without: list[Sample] = []
    for number, request in enumerate(requests):
        for is_without in (number % 2 == 0, number % 2 == 1):
            if is_without:
                with without_telemetry(engine):
                    without.append(_sample(engine, request))
            else:
                with_it.append(_sample(engine, request))
    return with_it, without


def _sample(engine: Engine, request: TokenRequest) -> Sample:
    began_s = time.thread_time()
    found = replay(engine.model, [request]).tpot_ms_p50
    assert found is not None, "a request of one token has no TPOT"
    return Sample(found, 1e3 * (time.thread_time() - began_s) / len(request.output_ids))


def measure(model: str | Path, num_pairs: int = NUM_PAIRS) -> dict[str, Any]:
    """The cost on one checkpoint with a quarter of its experts in memory. JSON.

    Figures: `events_ns`; `tpot_ms`, of the fastest request without telemetry, and the median; `share_of_tpot`, the
    events of a decode pass over the former, which overstates it; `scrape_share`, of all time where it is scraped every
    15 s; `tpot_ratio` and `cpu_ratio`, with telemetry over without.
    """
    from prometheus_client import CollectorRegistry

    import runtime
    from runtime.profile import Profile

    registry = CollectorRegistry()
    with runtime.load(Profile.default(), model, overrides={"cache.slots": SLOTS}) as engine:
        register(engine, registry)
        sizes = {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS, "num_requests": num_pairs + 2}
        requests = cut(load_workload(), engine.tokenizer, **sizes, part="confirm")
        replay(engine.model, requests[:2])  # what is compiled and read once is no cost of telemetry
        with_it, without = paired(engine, requests[2:])
        found = event_ns(engine, registry)
    tpot_ms = min(one.tpot_ms for one in without)
    return {
        "events_ns": {name: round(ns, 1) for name, ns in found.items()},
        "tpot_ms": {"fastest": tpot_ms, "median": median([one.tpot_ms for one in without])},
        "share_of_tpot": found["decode_pass"] / (1e6 * tpot_ms),
        "scrape_share": found["scrape"] / (1e9 * SCRAPE_EVERY_S),
        "tpot_ratio": exact_ratio([one.tpot_ms for one in with_it], [one.tpot_ms for one in without]).as_dict(),
        "cpu_ratio": exact_ratio([one.cpu_ms for one in with_it], [one.cpu_ms for one in without]).as_dict(),
    }


def record(folder: Path = FOLDER) -> Path:
    """Measure the demo model as bundled and widened to experts of 1 MiB, and write both."""
    from harness.demo.widen import bundled_model, widened

    now = datetime.now(UTC)
    figures = {
        "bundled": measure(bundled_model()),
        "experts of 1 MiB": measure(widened(WIDENED_BYTES)),
    }
    load = {"load_average": os.getloadavg()[2], "cores": os.cpu_count()}  # over the 15 minutes before the end
    settings = {"slots": SLOTS, "prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS}
    content = {
        **provenance("harness.measure.telemetry_cost", now),
        "settings": settings,
        "load": load,
        "figures": figures,
    }
    path = folder / f"{now:%Y-%m-%d}.json"
    write_atomic(path, json.dumps(content, indent=1) + "\n")
    return path


if __name__ == "__main__":
    print(record().name)
