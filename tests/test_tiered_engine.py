"""A GPU's engine whose experts do not fit the host's memory either, on streams that this machine can run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from late_streams import LateStreams, compute_late
from prometheus_client import CollectorRegistry, generate_latest
from tiny import EXPERTS, LAYERS, TOP_K, save_tiny

import runtime
from runtime import build, build_tiers, host_memory, numa
from runtime.cache.policies import FORESEEING, POLICIES
from runtime.errors import BudgetError, TransferError
from runtime.metrics import register
from runtime.transfer.host_rows import HostRows
from runtime.transfer.tiered import TieredTransfer

PROMPT = "the quick brown fox jumps"
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
ROW_BYTES = 8192  # of the tiny checkpoint's experts, as files are read into them
NUM_EXPERTS = LAYERS * EXPERTS
NUM_ROWS = round(0.3 * NUM_EXPERTS)
SOME = {"tiers.host_bytes": NUM_ROWS * ROW_BYTES}


@pytest.fixture(autouse=True)
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_late(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[int]:
    with runtime.load_reference(checkpoint) as reference:
        return tokens(reference)


def tokens(engine: runtime.Engine) -> list[int]:
    ids = engine.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    found: list[int] = engine.model.generate(ids, **GREEDY)[0].tolist()  # type: ignore[operator]
    return found


def rows_of(engine: runtime.Engine) -> HostRows:
    (pool,) = engine._pools
    assert isinstance(pool.store, HostRows)
    assert isinstance(pool.coordinator.transfer, TieredTransfer)
    return pool.store


@pytest.mark.parametrize("decode", ["eager", "grouped_mm"])
@pytest.mark.parametrize("slots", [1, TOP_K, "25%", NUM_EXPERTS])
def test_the_same_tokens_with_a_third_of_the_experts_in_memory(checkpoint: Path, slots: int | str, decode: str) -> None:
    overrides = {"cache.slots": slots, "compute.decode": decode, **SOME}
    with runtime.load_reference(checkpoint, overrides=overrides) as reference:
        expected = tokens(reference)
    with runtime.load(checkpoint, overrides=overrides, record_loads=True) as engine:
        rows = rows_of(engine)
        assert rows.residency.num_slots == NUM_ROWS and rows.residency.resident() == list(range(NUM_ROWS))
        assert engine.stats().num_disk_loads == 0, "what fills the rows on loading is not counted"
        assert tokens(engine) == expected
        stats = engine.stats()
        assert 0 < stats.num_disk_loads <= stats.num_loads and stats.num_disk_bytes > 0 and stats.disk_busy_s > 0.0
        assert engine.replay_loads(engine.needed_loads or []) > 0.0
        assert tokens(engine) == expected
        engine.check_integrity()
        rows.residency.check_integrity()
        assert engine.lifetime_stats().num_disk_loads >= stats.num_disk_loads


@pytest.mark.parametrize("num_rows", [TOP_K, TOP_K + 1, 11])
def test_the_same_tokens_with_few_rows_and_much_prefetch(checkpoint: Path, expected: list[int], num_rows: int) -> None:
    overrides = {"prefetch.depth": 2, "prefetch.count": 4, "prefetch.on_trial": False, "cache.slots": "50%"}
    with runtime.load(checkpoint, overrides={**overrides, "tiers.host_bytes": num_rows * ROW_BYTES}) as engine:
        assert tokens(engine) == expected
        assert engine.stats().cache.num_prefetch_issued > 0
        rows = rows_of(engine)
        engine._pools[0].coordinator.transfer.drain()
        assert not rows.residency._leases.any()


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - FORESEEING))
def test_every_policy_of_the_host_gives_the_same_tokens(checkpoint: Path, expected: list[int], policy: str) -> None:
    overrides = {"cache.slots": 4, "tiers.host_policy": policy, **SOME}
    with runtime.load(checkpoint, overrides=overrides) as engine:
        assert tokens(engine) == expected


def test_experts_that_are_converted_on_their_way(checkpoint: Path) -> None:
    """Half of a row's bytes would not do in this dtype."""
    overrides = {"cache.slots": 4, "tiers.host_bytes": 6 * 2 * ROW_BYTES}
    with runtime.load_reference(checkpoint, dtype=torch.float32) as reference:
        expected = tokens(reference)
    with runtime.load(checkpoint, dtype=torch.float32, overrides=overrides) as engine:
        assert rows_of(engine).store.recipe(0).conversions
        assert tokens(engine) == expected and engine.stats().num_disk_loads > 0


def test_weights_in_host_memory_are_the_models(checkpoint: Path) -> None:
    resident = dict(build.load_resident(str(checkpoint)).model.named_parameters())
    with runtime.load(checkpoint, overrides={"cache.slots": 4, **SOME}) as engine:
        rows = rows_of(engine)
        found = rows.weights(3)
        assert found is not None and rows.weights(NUM_EXPERTS - 1) is None
        for name, weight in found.items():
            assert torch.equal(weight, resident[f"{rows.store.prefixes[0]}.{name}"][3])


def test_fewer_slots_and_more_again(checkpoint: Path, expected: list[int]) -> None:
    with runtime.load(checkpoint, overrides={"cache.slots": 12, "prefetch.depth": 0, **SOME}) as engine:
        assert tokens(engine) == expected
        engine.shrink(5)
        assert tokens(engine) == expected
        engine.grow()
        assert tokens(engine) == expected
        engine.check_integrity()


def test_a_disk_that_fails_ends_the_pass_and_not_the_engine(
    checkpoint: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime.load(checkpoint, overrides={"cache.slots": TOP_K, **SOME}) as engine:
        transfer = engine._pools[0].coordinator.transfer
        assert isinstance(transfer, TieredTransfer)
        files = transfer._disk._reader._files
        with monkeypatch.context() as broken:
            broken.setattr(files, "_read", _fail)
            broken.setattr(files, "_sleep", lambda pause_s: None)
            with pytest.raises(TransferError, match=r"expert \d of MoE layer \d .* could not be read in 3 attempts"):
                tokens(engine)
        assert not rows_of(engine).residency._leases.any()
        engine.check_integrity()
        assert tokens(engine) == expected
        stats = engine.stats()
        assert stats.num_failed_loads > 0 and stats.num_retries > 0


def _fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
    raise OSError(5, "Input/output error")


def test_a_disk_that_fails_while_rows_are_filled_closes_everything(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    monkeypatch.setattr(LateStreams, "close", lambda streams: closed.append(streams))
    monkeypatch.setattr(TieredTransfer, "fill", lambda transfer, experts: transfer._disk.wait_any([]))
    with pytest.raises(ValueError, match="submit them first"):
        runtime.load(checkpoint, overrides=SOME)
    assert closed


def test_the_plan_is_said_before_memory_is_taken(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_memory, "memlock_limit_bytes", lambda: 3 * ROW_BYTES + 5)
    plan = "24.6 kB of pinned host memory and 32.8 kB of pageable host memory hold experts, 69.6 kB stay on disk"
    with caplog.at_level(logging.INFO, "runtime.build_tiers"):
        with runtime.load(checkpoint, overrides={"cache.slots": 4, **SOME}) as engine:
            assert rows_of(engine).pinned_bytes == 3 * ROW_BYTES
            assert any(note.startswith(plan) and "RLIMIT_MEMLOCK 24.6 kB" in note for note in engine.notes)
        monkeypatch.setattr(build_tiers, "DeviceSlots", None)
        monkeypatch.setattr(build_tiers, "HostRows", None)
        caplog.clear()
        with pytest.raises(TypeError):
            runtime.load(checkpoint, overrides={"cache.slots": 4, **SOME})
    assert any(record.message.startswith(plan) for record in caplog.records)


def test_a_slab_that_cannot_be_pinned_whole_is_pageable_in_part(
    checkpoint: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "memlock_limit_bytes", lambda: 40_000)
    with runtime.load(checkpoint, overrides={"cache.slots": 4}) as engine:
        assert tokens(engine) == expected
        assert any("pageable host memory hold all experts" in note for note in engine.notes)


@pytest.mark.parametrize(
    ("available", "overrides", "message"),
    [
        (1 << 20, {}, r"^0 B of host memory do not hold the experts of one layer step \(2 rows of 8\.19 kB"),
        (1 << 20, {"tiers.host_bytes": 1 << 16}, r"65\.5 kB of host memory are asked for \(tiers\.host_bytes\), but "),
        (None, {"tiers.host_bytes": ROW_BYTES}, r"8\.19 kB of host memory do not hold .* raise tiers\.host_bytes"),
    ],
)
def test_what_would_end_in_an_oom_kill_is_refused(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    available: int | None,
    overrides: dict[str, Any],
    message: str,
) -> None:
    if available is not None:
        memory = replace(host_memory.host_memory(), available_bytes=available)
        monkeypatch.setattr(build_tiers, "host_memory", lambda: memory)
    with pytest.raises(BudgetError, match=message):
        runtime.load(checkpoint, overrides=overrides)


def test_memory_is_placed_near_the_gpu_and_a_refusal_is_said(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def prefer(address: int, num_bytes: int, node: int) -> bool:
        asked.append((num_bytes, node))
        return False

    monkeypatch.setattr(build_tiers, "_node", lambda device: (1, []))
    monkeypatch.setattr(numa, "prefer", prefer)
    for overrides, num_bytes in ((SOME, NUM_ROWS * ROW_BYTES), ({}, NUM_EXPERTS * 4096)):
        with runtime.load(checkpoint, overrides={"cache.slots": 4, **overrides}) as engine:
            assert asked.pop() == (num_bytes, 1)
            assert any("does not place memory on NUMA node 1" in note for note in engine.notes)


@pytest.mark.parametrize(
    ("nodes", "node", "found", "noted"), [({0}, 0, None, False), ({0, 1}, 1, 1, False), ({0, 1}, None, None, True)]
)
def test_one_node_needs_no_placing_and_an_unknown_one_is_said_where_there_are_several(
    monkeypatch: pytest.MonkeyPatch, nodes: set[int], node: int | None, found: int | None, noted: bool
) -> None:
    monkeypatch.setattr(numa, "nodes", lambda: frozenset(nodes))
    monkeypatch.setattr(numa, "gpu_node", lambda index: node)
    assert build_tiers._node(torch.device("cuda", 0))[0] == found
    assert bool(build_tiers._node(torch.device("cuda", 0))[1]) == noted
    assert build_tiers._node(torch.device("cpu")) == (None, [])


def test_what_the_disk_brought_is_told_apart(checkpoint: Path) -> None:
    with runtime.load(checkpoint, overrides={"cache.slots": 4, **SOME}) as engine:
        tokens(engine)
        stats = engine.stats()
        assert f"from disk  {stats.num_disk_loads} of the loads" in stats.summary()
        assert f"{stats.num_disk_loads} of {stats.num_loads} loads from disk" in stats.line()
        assert stats.as_dict()["num_disk_bytes"] == stats.num_disk_bytes
        registry = CollectorRegistry()
        register(engine, registry)
        text = generate_latest(registry).decode()
        assert f"expertflow_disk_loads_total {float(stats.num_disk_loads)}" in text
        engine.reset_stats()
        assert engine.stats().num_disk_bytes == 0 and "from disk" not in engine.stats().summary()
