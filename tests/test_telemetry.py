"""Counters: their sums over pools, what is derived, and the ways of telling them; the clock beside the passes."""

from __future__ import annotations

import enum
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.latency import Histogram, LatencyWatch
from runtime.telemetry import CacheStats, Distribution, EngineStats, LatencyStats, SlotStats, engine_stats
from runtime.transfer.base import TransferStats
from runtime.vocabulary import Pass, Phase


class Count(enum.IntEnum):
    LOOKUPS = 0
    HITS = 1
    IN_FLIGHT = 2
    MISSES = 3
    PREFETCH_ISSUED = 4
    PREFETCH_USED = 5
    PREFETCH_WASTED = 6


def two_pools() -> EngineStats:
    first = dict(zip(Count, (10, 6, 1, 3, 5, 2, 1), strict=True))
    second = dict(zip(Count, (10, 8, 0, 2, 1, 1, 0), strict=True))
    transfers = [TransferStats(8, 8_000, 1, 0.5, 0.25), TransferStats(3, 3_000, 0, 0.25, 0.125)]
    return engine_stats([first, second], transfers, num_passes=3, num_tokens=4, peak_resident_bytes=10**9)


def test_pools_add_up() -> None:
    stats = two_pools()
    assert stats.cache == CacheStats(20, 14, 1, 5, 0, 6, 3, 1, 0, 0, 3, 4)
    assert (stats.num_loads, stats.num_bytes, stats.num_loads_cancelled) == (11, 11_000, 1)
    assert (stats.busy_s, stats.stall_s) == (0.75, 0.375)
    assert stats.cache.hit_rate == 0.7 and stats.bytes_per_token == 2750.0
    assert stats.cache.num_prefetch_pending == 2


def test_without_a_pool_nothing_is_divided_by_zero() -> None:
    stats = engine_stats([], [], 0, 0, 0)
    assert stats == EngineStats()
    assert stats.as_dict()["hit_rate"] is None and stats.as_dict()["bytes_per_token"] is None
    assert "no lookups" in stats.summary()


def test_the_dictionary_is_flat_json() -> None:
    told = json.loads(json.dumps(two_pools().as_dict()))
    assert told["hit_rate"] == 0.7 and told["num_prefetch_wasted"] == 1 and told["num_bytes"] == 11_000
    assert not any(isinstance(value, dict | list) for value in told.values())


def test_the_summary_fits_eight_lines() -> None:
    text = two_pools().summary()
    assert len(text.splitlines()) <= 8
    assert all(part in text for part in ("70.0% hits", "5 misses", "1 wasted", "0.38 s waiting", "1.00 GB"))


def test_trouble_is_told_where_there_was_any() -> None:
    stats = engine_stats([], [TransferStats(num_retries=2), TransferStats(num_retries=1, num_failed_loads=1)], 0, 0, 0)
    assert "3 reads tried again, 1 loads failed" in stats.summary() and stats.line().endswith("1 loads failed")
    assert "tried again" not in two_pools().summary() + two_pools().line()


def test_used_plus_wasted_never_makes_pending_negative() -> None:
    assert CacheStats(num_prefetch_issued=1, num_prefetch_used=2).num_prefetch_pending == 0


def test_the_counters_are_those_of_the_cache() -> None:
    from runtime.cache.residency import Residency

    residency = Residency(num_layers=2, num_experts=4, num_slots=2, top_k=1, policy="lru")
    residency.plan(0, [0], [1], 1)
    stats = engine_stats([residency.counts()], [], 1, 1, 0)
    assert (stats.cache.num_lookups, stats.cache.num_misses, stats.cache.num_layer_steps) == (1, 1, 1)
    with pytest.raises(TypeError):
        engine_stats([{enum.IntEnum("Other", {"NOVELTY": 1}).NOVELTY: 1}], [], 0, 0, 0)  # type: ignore[attr-defined]


def test_the_line_says_all_in_one() -> None:
    bounds = (0.01, 0.1, 1.0)
    latency = LatencyStats(1.5, Distribution(bounds, (0, 0, 1, 0), 0.5), Distribution(bounds, (0, 4, 0, 0), 0.2))
    stats = replace(two_pools(), latency=latency, num_slots=8, num_slots_occupied=6)
    line = stats.line()
    assert line == (
        "hits 70.0% | stall 25.0% | 0.00 MB/token | prefetch 3 used (1 late), 1 wasted | TTFT 500.0 ms | "
        "TPOT 50.0 ms (p95 95.5) | slots 6/8 | peak 1.00 GB"
    )
    assert stats.as_dict()["ttft_mean_ms"] == 500.0 and stats.as_dict()["tpot_p50_ms"] == pytest.approx(55.0)
    assert stats.as_dict()["stall_share"] == 0.25
    assert EngineStats().line() == "peak 0.00 GB"


def test_sums_keep_counts_and_the_latest_state() -> None:
    before = replace(two_pools(), latency=LatencyStats(pass_s=1.0), num_slots=8, peak_resident_bytes=7)
    both = before + replace(two_pools(), num_slots=4, peak_resident_bytes=5)
    assert both.cache.num_lookups == 40 and both.num_bytes == 22_000 and both.stall_s == 0.75
    assert (both.num_slots, both.peak_resident_bytes, both.latency.pass_s) == (4, 5, 1.0)
    assert EngineStats() + before == before


def test_every_counter_is_summed() -> None:
    """A counter that is added later must not be left out of what never falls."""
    states = {"peak_resident_bytes", "peak_gpu_bytes", "num_slots", "num_slots_occupied", "expert_bytes"}
    one = {name: 1 for name in EngineStats().__slots__ if name not in ("cache", "latency")}
    twice = EngineStats(**one) + EngineStats(**one)
    assert {name for name in one if getattr(twice, name) == 1} == states
    ones = CacheStats(*[1] * len(CacheStats().__slots__))
    assert ones + ones == CacheStats(*[2] * len(CacheStats().__slots__))


def test_slots_are_those_of_all_pools() -> None:
    stats = engine_stats([], [], 0, 0, 0, slots=[SlotStats(8, 6, 100), SlotStats(2, 2, 10)])
    assert (stats.num_slots, stats.num_slots_occupied, stats.expert_bytes) == (10, 8, 620)


# ---- histograms


def test_a_bucket_holds_what_does_not_exceed_its_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, num in ((0.0, 1), (1.0, 1), (1.5, 3), (2.5, 1)):
        histogram.observe(value, num)
    found = histogram.value()
    assert found == Distribution((1.0, 2.0), (2, 3, 1), 8.0) and found.num == 6 and found.mean == pytest.approx(8 / 6)
    assert (found + found).counts == (4, 6, 2)
    assert found.quantile(0.99) == 2.0  # beyond the last bound nothing is known
    histogram.reset()
    assert histogram.value().mean is None and histogram.value().quantile(0.5) is None


@given(st.lists(st.floats(0, 500), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_quantiles_are_right_to_a_bucket(values: list[float], share: float) -> None:
    bounds = (1e-3, 1.0, 10.0, 100.0, 500.0)
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    found = histogram.value().quantile(share)
    true = np.quantile(values, share, method="inverted_cdf")
    edges = (0.0, *bounds)
    bucket = next(i for i, bound in enumerate(bounds) if true <= bound)
    assert found is not None and edges[bucket] <= found <= edges[bucket + 1] + 1e-9


def test_threads_lose_no_observation() -> None:
    histogram = Histogram((1.0,))
    threads = [threading.Thread(target=lambda: [histogram.observe(0.5) for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert histogram.value().num == 8000


# ---- the clock beside the passes


class _Run:
    """Passes on a clock that only they move."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.watch = LatencyWatch(lambda: self.now_s)

    def go(self, phase: Phase, seconds: float, *requests: int, gap_s: float = 0.0) -> None:
        """Requests of one token each, or of as many as they are named."""
        self.now_s += gap_s
        passing = Pass(phase, len(requests), 0, requests=requests)
        self.watch.begin(passing)
        self.now_s += seconds
        self.watch.end(passing)

    def seen(self) -> tuple[list[float], list[float]]:
        """Number and sum of TTFT and of TPOT."""
        stats = self.watch.stats()
        return [stats.ttft.num, pytest.approx(stats.ttft.sum)], [stats.tpot.num, pytest.approx(stats.tpot.sum)]


def test_a_token_is_timed_from_the_one_before_it() -> None:
    run = _Run()
    run.go(Phase.PREFILL, 5.0, 0, 0, 0)
    run.go(Phase.DECODE, 1.0, 0, gap_s=0.5)
    run.go(Phase.DECODE, 2.0, 0)
    run.go(Phase.PREFILL, 3.0, 1, 1, gap_s=60.0)  # nobody waits between requests
    run.go(Phase.DECODE, 1.0, 1)
    assert run.seen() == ([2, 8.0], [3, 4.5])
    assert run.watch.stats().pass_s == pytest.approx(12.0)
    run.watch.reset()
    assert run.watch.stats() == LatencyStats()


def test_every_sequence_of_a_batch_counts() -> None:
    run = _Run()
    run.go(Phase.PREFILL, 5.0, 0, 0, 1, 1)
    run.go(Phase.DECODE, 1.0, 0, 1)
    assert run.seen() == ([2, 10.0], [2, 2.0])


def test_a_prompt_fed_in_parts_has_one_first_token() -> None:
    run = _Run()
    run.go(Phase.PREFILL, 5.0, 0, 0)
    run.go(Phase.PREFILL, 2.0, 0, 0, gap_s=1.0)
    run.go(Phase.DECODE, 1.0, 0)
    assert run.seen() == ([1, 8.0], [1, 1.0])
    run.go(Phase.PREFILL, 4.0, 0, 0, gap_s=30.0)  # a further turn of the same talk
    run.go(Phase.DECODE, 1.0, 0)
    assert run.seen() == ([2, 12.0], [2, 2.0])


def test_who_asks_between_the_parts_of_a_prompt_does_not_make_two_of_it() -> None:
    run = _Run()
    run.go(Phase.PREFILL, 5.0, 0, 0)
    assert run.seen() == run.seen() == ([1, 5.0], [0, 0.0])
    run.go(Phase.PREFILL, 2.0, 0, 0)
    assert run.seen() == ([1, 7.0], [0, 0.0])
    run.go(Phase.DECODE, 1.0, 0)
    assert run.seen() == ([1, 7.0], [1, 1.0])


def test_a_reset_forgets_prompts_that_have_ended() -> None:
    run = _Run()
    run.go(Phase.PREFILL, 5.0, 0, 0)
    run.watch.reset()
    assert run.seen() == ([0, 0.0], [0, 0.0])
    run.go(Phase.DECODE, 1.0, 0)
    assert run.seen() == ([0, 0.0], [1, 1.0])


def test_a_prompt_of_one_token_has_a_first_token_too() -> None:
    run = _Run()
    run.go(Phase.DECODE, 2.0, 0)
    run.go(Phase.DECODE, 1.0, 0)
    run.go(Phase.DECODE, 2.0, 1, gap_s=9.0)
    assert run.seen() == ([2, 4.0], [1, 1.0])


def test_a_pass_that_failed_leaves_nothing() -> None:
    run = _Run()
    run.watch.begin(Pass(Phase.PREFILL, 2, 0, requests=(0, 0)))
    run.now_s += 50.0
    run.go(Phase.PREFILL, 1.0, 1, 1)
    assert run.seen() == ([1, 1.0], [0, 0.0])


def test_who_serves_tells_what_clients_saw() -> None:
    run = _Run()
    with run.watch.told():
        run.go(Phase.PREFILL, 5.0, 0, 0)
        run.go(Phase.DECODE, 1.0, 0)
        run.watch.first_token(7.0)
        run.watch.further_token(1.5)
    run.go(Phase.PREFILL, 1.0, 1, 1)
    assert run.seen() == ([2, 8.0], [1, 1.5])
    assert run.watch.stats().pass_s == pytest.approx(7.0)


def test_requests_in_turns_do_not_mix() -> None:
    run = _Run()
    run.go(Phase.PREFILL, 5.0, 0, 0)
    run.go(Phase.PREFILL, 3.0, 1, 1)
    run.go(Phase.DECODE, 1.0, 0)
    run.go(Phase.DECODE, 1.0, 1)
    assert run.seen() == ([2, 8.0], [2, 6.0])  # each waited for the other one
    with run.watch.told():
        run.go(Phase.DECODE, 1.0, 2)
    run.go(Phase.DECODE, 1.0, 0)
    assert run.seen() == ([2, 8.0], [3, 9.0])


def test_of_many_texts_none_is_lost_and_few_are_remembered() -> None:
    run = _Run()
    for number in range(2000):
        run.go(Phase.PREFILL, 1.0, number, number)
    assert len(run.watch._texts) <= 256 and run.seen() == ([2000, 2000.0], [0, 0.0])


def test_a_prompt_that_is_running_is_not_yet_told() -> None:
    run = _Run()
    run.go(Phase.PREFILL, 1.0, 0, 0)
    run.watch.begin(Pass(Phase.PREFILL, 2, 0, requests=(0, 0)))
    assert run.seen() == ([0, 0.0], [0, 0.0])
    run.now_s += 2.0
    run.watch.end(Pass(Phase.PREFILL, 2, 0, requests=(0, 0)))
    assert run.seen() == ([1, 3.0], [0, 0.0])
