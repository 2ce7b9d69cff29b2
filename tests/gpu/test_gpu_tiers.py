"""Disk, host memory and a real GPU: logits equal the resident model's to the bit, whatever of the host's memory is
pinned."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_gpu_engine import DEVICE, DTYPES, NO_PREFETCH, logits, resident

import runtime
from harness.demo.widen import bundled_model
from runtime import build_tiers, host_memory, numa
from runtime.facts import describe
from runtime.host_memory import memlock_limit_bytes
from runtime.transfer.cuda_streams import pins_beyond_limit
from runtime.transfer.host_rows import HostRows

pytestmark = pytest.mark.gpu

PREFETCH: dict[str, Any] = {"prefetch.depth": 2, "prefetch.count": 4, "prefetch.on_trial": False}


def host_bytes(share: float, dtype: str) -> int:
    facts = describe(bundled_model(), dtype=DTYPES[dtype])
    return int(share * facts.num_experts_total * facts.slot_bytes)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("slots", [1, 4, "25%", "100%"])
def test_logits_equal_the_resident_models_to_the_bit(slots: int | str, share: float, dtype: str) -> None:
    overrides = {"cache.slots": slots, "tiers.host_bytes": host_bytes(share, dtype), **NO_PREFETCH}
    with runtime.load(bundled_model(), device=DEVICE, dtype=DTYPES[dtype], overrides=overrides) as engine:
        (pool,) = engine._pools
        assert isinstance(pool.store, HostRows)
        for _ in range(2):
            assert torch.equal(logits(engine.model), resident("grouped_mm", "eager", dtype))
        engine.check_integrity()
        pool.store.residency.check_integrity()
        stats = engine.stats()
        assert 0 < stats.num_disk_loads <= stats.num_loads and stats.disk_busy_s > 0.0
        print(stats.summary())


@pytest.mark.parametrize("memlock_bytes", [0, 2 << 20, None])
def test_pageable_memory_is_copied_from_as_pinned_memory_is(
    monkeypatch: pytest.MonkeyPatch, memlock_bytes: int | None
) -> None:
    memory = replace(host_memory.host_memory(), memlock_bytes=memlock_bytes)
    monkeypatch.setattr(build_tiers, "host_memory", lambda: memory)
    monkeypatch.setattr(build_tiers, "pins_beyond_limit", lambda device: False)
    for tier in ({}, {"tiers.host_bytes": host_bytes(0.4, "bf16")}):
        overrides = {"cache.slots": "25%", **PREFETCH, **tier}
        with runtime.load(bundled_model(), device=DEVICE, overrides=overrides) as engine:
            assert any("pageable" in note for note in engine.notes) == (memlock_bytes is not None)
            assert torch.equal(logits(engine.model), resident("grouped_mm", "eager", "bf16"))


def test_prefetching_through_both_tiers_changes_nothing() -> None:
    overrides = {"cache.slots": "25%", "tiers.host_bytes": host_bytes(0.4, "bf16"), **PREFETCH}
    with runtime.load(bundled_model(), device=DEVICE, overrides=overrides, record_loads=True) as engine:
        assert torch.equal(logits(engine.model), resident("grouped_mm", "eager", "bf16"))
        assert engine.stats().cache.num_prefetch_issued > 0
        assert engine.replay_loads(tuple(engine.needed_loads or ())) > 0.0
        assert torch.equal(logits(engine.model), resident("grouped_mm", "eager", "bf16"))


def test_what_the_driver_pins_and_where_the_gpu_is(caplog: pytest.LogCaptureFixture) -> None:
    """Facts of the machine, for the record; a refusal must not linger for the next kernel."""
    device, limit = torch.device(DEVICE), memlock_limit_bytes()
    beyond = None if limit is None else pins_beyond_limit(device)
    assert torch.ones(4, device=device).sum().item() == 4.0
    node = numa.gpu_node(0)
    print(f"RLIMIT_MEMLOCK {limit}, pins beyond it: {beyond}; nodes {sorted(numa.nodes())}, the GPU near {node}")
    assert node is None or node in numa.nodes()
    with (
        caplog.at_level(logging.INFO, "runtime.build_tiers"),
        runtime.load(bundled_model(), device=DEVICE, overrides={"cache.slots": 4}),
    ):
        assert "host memory hold all experts" in caplog.text
