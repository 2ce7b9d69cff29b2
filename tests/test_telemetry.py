"""Counters: their sums over pools, what is derived, and the two ways of telling them."""

from __future__ import annotations

import enum
import json

import pytest

from runtime.telemetry import CacheStats, EngineStats, engine_stats
from runtime.transfer.base import TransferStats


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
