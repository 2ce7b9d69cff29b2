"""Prometheus metrics of an engine: `with runtime.metrics.expose(engine, port=9400): …`

What the engine counts anyway is read when it is scraped. Only two histograms are filled as it runs, once per pass.
Ratios are left to queries: the hit rate is `rate(expertflow_lookups_total{result="hit"}[5m]) / ignoring(result)
sum without(result)(rate(expertflow_lookups_total[5m]))`, the stall share `rate(expertflow_stall_seconds_total[5m]) /
rate(expertflow_pass_seconds_total[5m])`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.errors import UsageError
from runtime.latency import Histogram
from runtime.telemetry import LATENCY_BUCKETS_S, Distribution, EngineStats
from runtime.vocabulary import Pass, Phase

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

    from runtime.engine import Engine

PORT = 9400

STALL_BUCKETS_S = (0.0, 1e-5, 1e-4, *LATENCY_BUCKETS_S)
"""The first one holds passes that waited for nothing."""

BYTES_BUCKETS = (0.0, *(float(step * 10**power) for power in range(4, 10) for step in (1, 2, 5)), 1e10, 1e11)
"""From one small expert to every expert of a large model for every token; the first one holds tokens that brought
nothing in."""

_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("evictions", "Experts that lost their slot", lambda of: of.cache.num_evictions),
    ("loads", "Expert loads that were done", lambda of: of.num_loads),
    ("loads_cancelled", "Expert loads dropped before they began", lambda of: of.num_loads_cancelled),
    ("loads_failed", "Expert loads that failed after every retry", lambda of: of.num_failed_loads),
    ("load_retries", "Reads that were tried again", lambda of: of.num_retries),
    ("loaded_bytes", "Bytes that loads asked of the medium", lambda of: of.num_bytes),
    ("busy_seconds", "Time in which at least one load was under way", lambda of: of.busy_s),
    ("stall_seconds", "Time spent waiting for experts", lambda of: of.stall_s),
    ("pass_seconds", "Time in forward passes", lambda of: of.latency.pass_s),
    ("prefetches_issued", "Loads decided ahead of demand", lambda of: of.cache.num_prefetch_issued),
    ("prefetches_used", "Prefetches demanded before they were evicted", lambda of: of.cache.num_prefetch_used),
    ("prefetches_late", "Used ones still on their way when demanded", lambda of: of.cache.num_prefetch_late),
    ("prefetches_wasted", "Prefetches evicted undemanded", lambda of: of.cache.num_prefetch_wasted),
    ("passes", "Forward passes", lambda of: of.cache.num_passes),
    ("tokens", "Tokens in forward passes, those of prompts among them", lambda of: of.cache.num_tokens),
    ("layer_steps", "MoE layers executed", lambda of: of.cache.num_layer_steps),
    ("waves", "Rounds of slots that layer steps took", lambda of: of.cache.num_waves),
    ("substituted_choices", "Choices of absent experts that others took", lambda of: of.cache.num_substituted),
    ("misses_computed", "Misses computed on the CPU instead of being loaded", lambda of: of.cache.num_computed),
)
_DISK_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("disk_loads", "Experts that the disk brought into host memory for a GPU", lambda of: of.num_disk_loads),
    ("disk_loaded_bytes", "Bytes asked of the disk for these", lambda of: of.num_disk_bytes),
    ("disk_busy_seconds", "Time in which at least one of these was read", lambda of: of.disk_busy_s),
)
"""Told where there is such a tier; for a CPU the loads are from disk themselves."""
_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("slots", "Expert slots in use", lambda of: of.num_slots),
    ("slots_occupied", "Slots that hold an expert or wait for one", lambda of: of.num_slots_occupied),
    ("resident_expert_bytes", "Bytes of the occupied slots, on the device that computes", lambda of: of.expert_bytes),
    ("peak_resident_bytes", "Highest resident memory of the process", lambda of: of.peak_resident_bytes),
)
_GPU_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("peak_gpu_bytes", "Most memory that tensors took of the GPU at once", lambda of: of.peak_gpu_bytes),
)
"""Where one computes."""


class _PassHistograms:
    """What each pass waited and brought in, by phase."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen_s, self._seen_bytes = self._moved()
        self.stall_s = {phase: Histogram(STALL_BUCKETS_S) for phase in Phase}
        self.bytes_per_token = {phase: Histogram(BYTES_BUCKETS) for phase in Phase}

    def end(self, passing: Pass) -> None:
        """A pass ended."""
        stall_s, num_bytes = self._moved()
        # Counters that were reset since then count from zero again.
        waited = stall_s - self._seen_s if stall_s >= self._seen_s else stall_s
        brought = num_bytes - self._seen_bytes if num_bytes >= self._seen_bytes else num_bytes
        self._seen_s, self._seen_bytes = stall_s, num_bytes
        self.stall_s[passing.phase].observe(waited)
        self.bytes_per_token[passing.phase].observe(brought / passing.num_tokens, passing.num_tokens)

    def _moved(self) -> tuple[float, int]:
        pools = self._engine.transfer_stats()
        return sum(of.stall_s for of in pools), sum(of.num_bytes for of in pools)


class _Collector:
    """What Prometheus asks when it scrapes. Counters never fall: they are those of the engine's whole life."""

    def __init__(self, engine: Engine, histograms: _PassHistograms) -> None:
        self._engine, self._histograms = engine, histograms

    def describe(self) -> Iterator[Metric]:
        """The names, by which a registry refuses a second engine."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Every metric as it is now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        stats = self._engine.lifetime_stats()
        cache = stats.cache
        lookups = CounterMetricFamily("expertflow_lookups", "Experts demanded by layer steps", labels=["result"])
        for result, num in (("hit", cache.num_hits), ("in_flight", cache.num_in_flight), ("miss", cache.num_misses)):
            lookups.add_metric([result], num)
        yield lookups
        for name, what, of in (*_COUNTERS, *(_DISK_COUNTERS if stats.num_disk_loads else ())):
            yield CounterMetricFamily(f"expertflow_{name}", what, value=of(stats))
        for name, what, of in (*_GAUGES, *(_GPU_GAUGES if stats.peak_gpu_bytes else ())):
            yield GaugeMetricFamily(f"expertflow_{name}", what, value=of(stats))
        for name, what, seen in (
            ("time_to_first_token_seconds", "TTFT of each sequence", stats.latency.ttft),
            ("time_per_output_token_seconds", "TPOT: each further token since the one before", stats.latency.tpot),
        ):
            family = HistogramMetricFamily(f"expertflow_{name}", what)
            family.add_metric([], _buckets(seen), seen.sum)
            yield family
        for name, what, by_phase in (
            ("pass_stall_seconds", "Time that each pass waited for experts", self._histograms.stall_s),
            ("loaded_bytes_per_token", "Bytes brought in for each token of a pass", self._histograms.bytes_per_token),
        ):
            family = HistogramMetricFamily(f"expertflow_{name}", what, labels=["phase"])
            for phase, histogram in by_phase.items():
                seen = histogram.value()
                family.add_metric([phase.name.lower()], _buckets(seen), seen.sum)
            yield family


def _buckets(of: Distribution) -> list[tuple[str, float]]:
    """Cumulated, as Prometheus has them."""
    found, below = [], 0
    for bound, count in zip((*of.bounds, float("inf")), of.counts, strict=True):
        below += count
        found.append(("+Inf" if bound == float("inf") else repr(bound), float(below)))
    return found


def register(engine: Engine, registry: CollectorRegistry) -> Callable[[], None]:
    """Add an engine's metrics to a registry of the program's own; what this returns takes them out again.

    Raises:
        UsageError: the registry has an engine already, or prometheus_client is not installed.
    """
    _require()
    histograms = _PassHistograms(engine)
    collector = _Collector(engine, histograms)
    try:
        registry.register(collector)
    except ValueError as error:
        raise UsageError(
            "the registry has the metrics of an engine already; give each a registry of its own"
        ) from error
    engine.on_pass_end(histograms.end)

    def unregister() -> None:
        registry.unregister(collector)
        with engine.passes.lock:
            engine.passes.end_listeners.remove(histograms.end)

    return unregister


@dataclass(frozen=True)
class MetricsServer:
    """Answers scrapes in threads of its own.

    Attributes:
        registry: what is served; that of the process (its memory, CPU time, open files) is in it.
        url: where.
    """

    registry: CollectorRegistry
    url: str


@contextmanager
def serve(port: int = PORT, address: str = "127.0.0.1") -> Iterator[MetricsServer]:
    """Serve a new registry over HTTP, until this ends.

    Args:
        port: 0 takes one that is free.
        address: "0.0.0.0" lets other machines ask.

    Raises:
        UsageError: the port cannot be had, or prometheus_client is not installed.
    """
    _require()
    from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(port, address, registry)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"metrics on {address}:{port}: {reason}; name another port, or 0 for any") from error
    try:
        yield MetricsServer(registry, f"http://{address}:{server.server_port}/metrics")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def expose(engine: Engine, port: int = PORT, address: str = "127.0.0.1") -> Iterator[MetricsServer]:
    """Serve an engine's metrics over HTTP, until this ends; see `serve` and `register`."""
    with serve(port, address) as server:
        unregister = register(engine, server.registry)
        try:
            yield server
        finally:
            unregister()


def _require() -> None:
    try:
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise UsageError("metrics need prometheus_client: pip install 'expertflow[metrics]'") from error
