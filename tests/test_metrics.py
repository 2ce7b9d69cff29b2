"""Prometheus metrics: what a scrape says beside what the engine counted."""

from __future__ import annotations

import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tiny import save_tiny

import runtime
from runtime.errors import UsageError
from runtime.generate import main
from runtime.metrics import expose, register, serve
from runtime.prompts import PromptRequest
from runtime.serving import run_batch

NEW = 8
PREFIX = "expertflow_"
Samples = dict[tuple[str, str], float]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[runtime.Engine]:
    overrides = {"cache.slots": 6, "predictor.kind": "previous_token", "prefetch.depth": 2}
    with runtime.load(checkpoint, overrides=overrides) as engine:
        yield engine


def _generate(engine: runtime.Engine, new: int = NEW) -> None:
    inputs: Any = engine.tokenizer("the cat sat.", return_tensors="pt", return_token_type_ids=False)
    engine.model.generate(**inputs, max_new_tokens=new, do_sample=False)


def _samples(text: str) -> Samples:
    """By name and the value of its one label, "" without one."""
    return {
        (sample.name.removeprefix(PREFIX), "".join(value for name, value in sample.labels.items() if name != "le")): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def _scrape(registry: CollectorRegistry) -> Samples:
    return _samples(generate_latest(registry).decode())


def test_a_scrape_is_what_the_engine_counted(engine: runtime.Engine) -> None:
    registry = CollectorRegistry()
    register(engine, registry)
    _generate(engine)
    stats, found = engine.stats(), _scrape(registry)
    cache = stats.cache
    assert cache.num_misses > 0 < cache.num_prefetch_used
    lookups = [found["lookups_total", result] for result in ("hit", "in_flight", "miss")]
    assert lookups == [cache.num_hits, cache.num_in_flight, cache.num_misses]
    expected = {
        "evictions_total": cache.num_evictions,
        "loads_total": stats.num_loads,
        "loaded_bytes_total": stats.num_bytes,
        "stall_seconds_total": stats.stall_s,
        "pass_seconds_total": stats.latency.pass_s,
        "prefetches_issued_total": cache.num_prefetch_issued,
        "prefetches_used_total": cache.num_prefetch_used,
        "prefetches_late_total": cache.num_in_flight,
        "prefetches_wasted_total": cache.num_prefetch_wasted,
        "passes_total": NEW,
        "tokens_total": cache.num_tokens,
        "layer_steps_total": cache.num_layer_steps,
        "slots": 6,
        "slots_occupied": 6,
        "resident_expert_bytes": stats.expert_bytes,
    }
    assert {name: found[name, ""] for name in expected} == expected
    assert stats.expert_bytes >= 6 * 3 * 32 * 16 * 4


def test_histograms_count_every_pass_and_add_up_to_the_counters(engine: runtime.Engine) -> None:
    registry = CollectorRegistry()
    register(engine, registry)
    _generate(engine)
    found = _scrape(registry)
    assert found["time_to_first_token_seconds_count", ""] == 1
    assert found["time_per_output_token_seconds_count", ""] == NEW - 1
    phases = ("prefill", "decode")
    assert [found["pass_stall_seconds_count", phase] for phase in phases] == [1, NEW - 1]
    assert [found["loaded_bytes_per_token_count", phase] for phase in phases] == [12, NEW - 1]
    for histogram, counter in (("pass_stall_seconds", "stall_seconds"), ("loaded_bytes_per_token", "loaded_bytes")):
        total = sum(found[f"{histogram}_sum", phase] for phase in phases)
        assert total == pytest.approx(found[f"{counter}_total", ""], rel=0.3)  # prefetches may end after the last pass
    assert (
        found["time_to_first_token_seconds_sum", ""] + found["time_per_output_token_seconds_sum", ""]
        >= (found["pass_seconds_total", ""])
    )


def test_buckets_are_cumulated(engine: runtime.Engine) -> None:
    registry = CollectorRegistry()
    register(engine, registry)
    _generate(engine)
    by_series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                by_series.setdefault((family.name, sample.labels.get("phase", "")), []).append(
                    (float(sample.labels["le"]), sample.value)
                )
    assert len(by_series) == 6
    for (name, phase), buckets in by_series.items():
        assert buckets == sorted(buckets) and buckets[-1][0] == float("inf")
        values = [value for _, value in buckets]
        assert values == sorted(values)
        assert values[-1] == _scrape(registry)[f"{name.removeprefix(PREFIX)}_count", phase]


def test_counters_never_fall_even_where_the_engine_counts_anew(engine: runtime.Engine) -> None:
    registry = CollectorRegistry()
    register(engine, registry)
    totals = 0
    before = _scrape(registry)
    for turn in range(4):
        _generate(engine, new=4)
        totals += engine.stats().num_loads
        if turn % 2:
            engine.reset_stats()
            assert engine.stats().num_loads == 0
            _generate(engine, new=2)
            totals += engine.stats().num_loads
        found = _scrape(registry)
        falling = [name for name in before if found[name] < before[name] and not name[0].startswith(("slots", "resid"))]
        assert falling == []
        assert found["loads_total", ""] == engine.lifetime_stats().num_loads
        before = found
        engine.reset_stats()
    assert _scrape(registry)["loads_total", ""] == totals
    assert before["time_to_first_token_seconds_count", ""] == 6
    assert before["passes_total", ""] == 4 * 4 + 2 * 2


def test_batches_report_what_clients_saw(engine: runtime.Engine) -> None:
    registry = CollectorRegistry()
    register(engine, registry)
    requests = [PromptRequest(str(i), (5, 6, 7, 8), max_new_tokens=3 + i) for i in range(4)]
    run = run_batch(engine, requests, concurrency=4)
    found = _scrape(registry)
    assert found["time_to_first_token_seconds_count", ""] == 4
    assert found["time_per_output_token_seconds_count", ""] == sum(one.num_tokens - 1 for one in run.requests)
    assert found["time_to_first_token_seconds_sum", ""] == pytest.approx(sum(one.ttft_ms for one in run.requests) / 1e3)
    between = sum(one.finish_s - one.first_token_s for one in run.requests)
    assert found["time_per_output_token_seconds_sum", ""] == pytest.approx(between)
    assert found["passes_total", ""] == run.num_passes


def test_scrapes_over_http_while_the_engine_runs(engine: runtime.Engine) -> None:
    with expose(engine, port=0) as server:

        def get() -> Samples:
            with urllib.request.urlopen(server.url, timeout=10) as answer:
                return _samples(answer.read().decode())

        first = get()
        assert first["process_resident_memory_bytes", ""] > 0 and first["passes_total", ""] == 0
        done = threading.Thread(target=_generate, args=(engine, 200))
        done.start()
        seen = [first]
        while done.is_alive():
            seen.append(get())
        done.join()
        seen.append(get())
        for name in ("passes_total", "loads_total", "loaded_bytes_total", "stall_seconds_total"):
            values = [one[name, ""] for one in seen]
            assert values == sorted(values)
        assert seen[-1]["passes_total", ""] == 200 == engine.stats().cache.num_passes
    with pytest.raises(OSError):
        get()


def test_what_was_registered_can_be_taken_out(engine: runtime.Engine) -> None:
    registry = CollectorRegistry()
    unregister = register(engine, registry)
    with pytest.raises(UsageError, match="has the metrics of an engine already"):
        register(engine, registry)
    num_listeners = len(engine.passes.end_listeners)
    unregister()
    assert _scrape(registry) == {} and len(engine.passes.end_listeners) == num_listeners - 1
    register(engine, registry)
    assert _scrape(registry)["slots", ""] == 6


def test_a_port_in_use_is_told_before_the_model_is_loaded(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime import build

    monkeypatch.setattr(build, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with serve(port=0) as server:
        port = server.url.split(":")[2].split("/")[0]
        assert main(["--model", str(checkpoint), "--prompt", "a", "--metrics-port", port]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: metrics on 127.0.0.1:{port}: ") and "name another port" in error
    assert main(["--model", str(checkpoint), "--prompt", "a", "--metrics-port", "70000"]) == 2


def test_without_the_library_one_line_says_how_to_get_it(
    engine: runtime.Engine, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UsageError, match=r"pip install 'expertflow\[metrics\]'"):
        register(engine, None)  # type: ignore[arg-type]
    assert main(["--model", str(checkpoint), "--prompt", "a", "--metrics-port", "0"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == "error: metrics need prometheus_client: pip install 'expertflow[metrics]'"


def test_the_command_serves_them_while_it_runs(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime import build

    load, texts = build.load, []

    def loaded(*args: Any, **options: Any) -> runtime.Engine:
        engine = load(*args, **options)

        def scrape(passing: Any) -> None:
            url = capsys.readouterr().err.split("metrics    ")[1].split()[0] if not texts else texts[0]
            texts[:1] = [url]
            with urllib.request.urlopen(url, timeout=10) as answer:
                texts.append(answer.read().decode())

        engine.on_pass_end(scrape)
        return engine

    monkeypatch.setattr(build, "load", loaded)
    arguments = ["--prompt", "a cat", "--max-new-tokens", "3", "--metrics-port", "0"]
    assert main(["--model", str(checkpoint), *arguments]) == 0
    assert [_samples(text)["passes_total", ""] for text in texts[1:]] == [1, 2, 3]


def test_the_memory_of_a_gpu_is_a_gauge_where_one_computes(
    engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = CollectorRegistry()
    unregister = register(engine, registry)
    assert registry.get_sample_value("expertflow_peak_gpu_bytes") is None
    monkeypatch.setattr("runtime.engine.peak_bytes", lambda device: 123)
    assert registry.get_sample_value("expertflow_peak_gpu_bytes") == 123
    unregister()
