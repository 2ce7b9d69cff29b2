"""The simulator: it decides what the engine decides, no policy beats the oracle, and its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EXPERTS, LAYERS, save_tiny

import runtime
from harness.fitting.base import FitOptions, split
from harness.measure.host_replay import misses, replay_host
from harness.measure.replay import (
    RecordedLookahead,
    Setting,
    Timing,
    _replay_with_predictor,
    replay,
)
from harness.measure.schedule import Schedule
from harness.simulate import ALL_POLICIES, main
from runtime.cache.policies import POLICIES
from runtime.telemetry import EngineStats
from runtime.trace import RoutingTrace, read_trace, write_trace
from runtime.vocabulary import Load

ROOT = Path(__file__).parents[1]
TIMING = Timing(load_s=2e-3, expert_s=5e-4, layer_s=1e-3)


def _random(seed: int, tokens: int, layers: int, experts: int, top_k: int) -> RoutingTrace:
    """Routing with some locality: tokens prefer the experts of their request."""
    generator = np.random.default_rng(seed)
    request = np.sort(generator.integers(0, 3, tokens)).astype(np.int32)
    taste = generator.random((3, layers, experts)) * 3
    noise = generator.gumbel(size=(tokens, layers, experts))
    chosen = np.argsort(-(taste[request] + noise), axis=2)[:, :, :top_k]
    return RoutingTrace(chosen.astype(np.uint16), request, {"num_experts": experts, "expert_bytes": 1000})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def _run_and_record(checkpoint: Path, overrides: dict[str, object], at_once: bool) -> tuple[EngineStats, RoutingTrace]:
    """Prompts, decoding and batches. With `at_once` every load has arrived before anything else happens."""
    with runtime.load(checkpoint, overrides=overrides) as engine:
        if at_once:
            _arrive_at_once(engine._pools[0].coordinator.transfer)
        engine.start_trace()
        for text in ("the cat sat.", "a dog ran to the sea, and sang"):
            inputs = engine.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            engine.model.generate(**inputs, max_new_tokens=9, do_sample=False)
        engine.model(torch.arange(12).view(3, 4))
        engine.model(torch.arange(3).view(3, 1))  # three requests decoded together
        return engine.stats(), engine.trace()


def _arrive_at_once(transfer: Any) -> None:
    submit = transfer.submit

    def submit_and_wait(loads: Sequence[Load]) -> None:
        submit(loads)
        for load in loads:
            transfer.wait_any([load.expert])

    transfer.submit = submit_and_wait


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_recorded_run_replays_with_the_engines_own_counts(checkpoint: Path, policy: str) -> None:
    overrides = {"cache.slots": 7, "cache.policy": policy, "prefetch.depth": 0, "predictor.kind": "none"}
    ours, trace = _run_and_record(checkpoint, overrides, at_once=False)
    found = replay(Schedule(trace), Setting(policy, 7), TIMING)
    assert found.cache == ours.cache
    assert found.num_bytes == ours.num_loads * trace.meta["expert_bytes"] > 0
    assert found.num_loads == ours.num_loads and found.cache.num_waves > found.cache.num_layer_steps


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_with_prefetch_the_decisions_are_the_engines(checkpoint: Path, policy: str) -> None:
    overrides = {"cache.slots": 7, "cache.policy": policy, "predictor.kind": "previous_token", "prefetch.depth": 2}
    ours, trace = _run_and_record(checkpoint, {**overrides, "prefetch.count": 2}, at_once=True)
    at_once = Timing(load_s=0.0, expert_s=0.0, layer_s=1.0)
    found = replay(Schedule(trace), Setting(policy, 7, "previous_token", depth=2, count=2), at_once)
    assert found.cache == ours.cache and found.num_loads == ours.num_loads
    assert found.cache.num_prefetch_issued > 0


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_compiled_replay_is_the_coordinator(policy: str, batch: int | None, streams: bool) -> None:
    trace = _random(1, 120, 4, 16, 3)
    if batch is None:  # prompts of 24 tokens among passes of one
        trace = replace(trace, step=np.repeat(np.arange(28), [24, *[1] * 6] * 4).astype(np.int32))
    schedule = Schedule(trace, batch=batch)
    for slots in (2, 12, 40):
        setting = Setting(policy, slots, streams=streams)
        compiled = replay(schedule, setting, TIMING)
        stepped = _replay_with_predictor(schedule, setting, TIMING, lambda _: None)
        assert compiled.cache == stepped.cache
        assert (compiled.num_loads, compiled.num_bytes) == (stepped.num_loads, stepped.num_bytes)
        assert compiled.elapsed_s == pytest.approx(stepped.elapsed_s)
        assert compiled.stall_s == pytest.approx(stepped.stall_s)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 60),
    layers=st.integers(1, 4),
    experts=st.integers(2, 10),
    data=st.data(),
)
def test_nothing_misses_less_than_belady(
    seed: int, tokens: int, layers: int, experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    slots = data.draw(st.integers(top_k, layers * experts))
    trace = _random(seed, tokens, layers, experts, top_k)
    schedule = Schedule(trace)
    misses = {policy: replay(schedule, Setting(policy, slots), TIMING).num_loads for policy in ALL_POLICIES}
    assert misses["belady"] == min(misses.values())
    assert misses["belady"] >= len(np.unique(trace.experts[:, 0]))


def test_recorded_lookahead_is_prefetched_and_a_perfect_one_hides_loads() -> None:
    trace = _random(2, 80, 4, 16, 2)
    predicted = np.full((80, 4, 1, 2), np.iinfo(np.uint16).max, np.uint16)
    predicted[:, :-1, 0] = trace.experts[:, 1:]
    perfect = Schedule(replace(trace, predicted=predicted))
    without = replay(perfect, Setting("next_use", 20), TIMING)
    with_it = replay(perfect, Setting("next_use", 20, "gate_lookahead", depth=1, count=2), TIMING)
    assert with_it.cache.num_prefetch_used > 0 and with_it.cache.num_prefetch_wasted == 0
    assert with_it.cache.num_misses < without.cache.num_misses
    assert with_it.stall_s < without.stall_s
    assert RecordedLookahead(perfect).forecast(0).shape == (4, 16)


def test_a_batch_keeps_its_size_while_requests_wait() -> None:
    request = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2], np.int32)
    trace = RoutingTrace(np.zeros((9, 1, 1), np.uint16), request, {"num_experts": 2})
    assert [rows.tolist() for rows in Schedule(trace, batch=2).passes] == [[0, 3], [1, 4], [2, 5], [6], [7], [8]]
    assert [len(rows) for rows in Schedule(trace).passes] == [1] * 9
    stepped = replace(trace, step=np.array([0, 0, 0, 1, 1, 2, 3, 3, 3], np.int32))
    assert [len(rows) for rows in Schedule(stepped).passes] == [3, 2, 1, 3]


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    write_trace(tmp_path / "t.npz", _random(3, 50, LAYERS, EXPERTS, 2))
    return tmp_path / "t.npz"


def test_the_command_line_prints_one_object_per_configuration(
    trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--trace", str(trace_file), "--policy", "lru,belady", "--slots", "25%,12", "--json"]
    assert main(arguments) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["policy"], one["slots"]) for one in found] == [("lru", 6), ("belady", 6), ("lru", 12), ("belady", 12)]
    for one in found:
        assert one["hits"] + one["misses"] == 50 * LAYERS * 2 and one["events"] == 50 * LAYERS
        assert one["hit_rate"] == one["hits"] / (one["hits"] + one["misses"])
        assert one["bytes_moved"] == 1000 * one["misses"] and one["tokens_per_s"] > 0 and one["stall_s"] > 0


def test_experts_may_be_larger_than_those_of_the_trace(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--trace", str(trace_file), "--policy", "lru", "--slots", "6", "--json"]
    assert main(arguments) == main([*arguments, "--expert-bytes", "3kB"]) == 0
    own, larger = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert larger["bytes_moved"] == 3 * own["bytes_moved"] and larger["stall_s"] > own["stall_s"]


def test_the_table_the_csv_and_the_plot(trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv, plot = tmp_path / "t.csv", tmp_path / "t.png"
    assert main(["--trace", str(trace_file), "--policy", "all", "--csv", str(csv), "--plot", str(plot)]) == 0
    table = capsys.readouterr().out
    assert "belady" in table and "100%" in table
    assert len(csv.read_text().splitlines()) == 1 + 3 * (len(POLICIES) + 1)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_two_tiers_count_what_comes_from_disk(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tmp_path / "t.csv"
    above = ["--trace", str(trace_file), "--policy", "lru", "--slots", "6"]
    tiers = ["--host-slots", "50%,100%", "--host-policy", "lru,td_next_use", "--csv", str(csv)]
    assert main([*above, "--json"]) == main([*above, *tiers, "--json"]) == 0
    alone, *found = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [(one["policy"], one["slots"]) for one in found] == [
        (policy, slots) for slots in (LAYERS * EXPERTS // 2, LAYERS * EXPERTS) for policy in ("lru", "td_next_use")
    ]
    assert {one["gpu_misses"] for one in found} == {alone["misses"]}
    half, whole = found[0], found[2]
    trace = read_trace(trace_file)
    num_used = sum(len(np.unique(trace.experts[:, layer])) for layer in range(trace.num_layers))
    assert whole["host_misses"] == num_used < half["host_misses"] < alone["misses"]
    assert half["disk_reads_per_token"] == half["host_misses"] / trace.num_tokens
    assert len(csv.read_text().splitlines()) == 5
    assert main([*above, *tiers]) == 0 and "td_next_use" in capsys.readouterr().out


def test_a_prompt_that_streams_takes_less_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = replace(_random(3, 400, LAYERS, EXPERTS, 2), step=np.repeat([0, 1], 200).astype(np.int32))
    write_trace(tmp_path / "t.npz", trace)
    arguments = ["--trace", str(tmp_path / "t.npz"), "--policy", "next_use", "--slots", "50%", "--json"]
    assert main(arguments) == main([*arguments, "--streams"]) == 0
    waits, streams = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert not waits["streams"] and streams["streams"] and streams["prefetch_used"] > waits["prefetch_used"] == 0
    assert streams["elapsed_s"] < waits["elapsed_s"]


@pytest.mark.parametrize("option", [["--streams"], ["--host-slots", "50%"]])
@pytest.mark.parametrize("policy", [[], ["--policy", "all"]])
def test_unless_it_is_named_belady_is_left_out_where_it_cannot_be(
    trace_file: Path, option: list[str], policy: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--trace", str(trace_file), "--slots", "6", "--json", *option, *policy]) == 0
    replayed = {json.loads(line)["policy"] for line in capsys.readouterr().out.splitlines()}
    assert {"lru", "td_next_use"} <= replayed and "belady" not in replayed


def test_a_host_tier_below_all_slots_sees_every_expert_once() -> None:
    schedule = Schedule(_random(2, 40, 3, 8, 2), batch=2)
    above = Setting("lru", 24)
    missed = misses(schedule, above, lambda num_tokens: None)
    found = replay_host(schedule, above, missed, "lru", 1)
    assert found.gpu_misses == found.host_misses == len({expert for _, demand in missed for expert in demand})
    assert found.hit_rate == 0.0


def test_held_out_requests_are_those_that_a_training_would_hold_out(
    trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--trace", str(trace_file), "--policy", "lru", "--slots", "6", "--json"]
    assert main([*arguments, "--held-out"]) == 0
    _, held = split(read_trace(trace_file), FitOptions())
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == held.num_tokens < 50
    assert found["hits"] == replay(Schedule(held), Setting("lru", 6), TIMING).cache.num_hits


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policy", "lruu"], "'lruu'"),
        (["--slots", "0"], "from 1 to all 24"),
        (["--slots", "many"], "'many'"),
        (["--predictor", "psychic"], "'psychic'"),
        (["--predictor", "gate_lookahead", "--policy", "lru"], "no recorded gate lookahead"),
        (["--predictor", "previous_token", "--policy", "belady"], "on demand only"),
        (["--streams", "--policy", "belady"], "on demand only"),
        (["--streams", "--host-slots", "50%"], "demand alone"),
        (["--bandwidth", "fast"], "'fast'"),
        (["--batch", "0"], "--batch 0"),
        (["--every", "0"], "--every 0"),
        (["--csv", "/dev/null/t.csv"], "--csv /dev/null/t.csv: cannot be written"),
        (["--max-tokens", "-3"], "--max-tokens -3"),
    ],
)
def test_mistakes_are_one_line(
    trace_file: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--trace", str(trace_file), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_broken_trace_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.npz").write_bytes(b"nothing")
    assert main(["--trace", str(tmp_path / "t.npz")]) == 2
    assert "t.npz" in capsys.readouterr().err


def test_it_runs_where_torch_is_not_installed(trace_file: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from harness.simulate import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--trace", str(trace_file), "--predictor", "none,previous_token"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "previous_token" in result.stdout
