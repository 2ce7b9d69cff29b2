"""The engine as a user meets it: generation, counters, traces, profiles, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import EXPERTS, LAYERS, TOP_K, save_tiny
from transformers import AutoModelForCausalLM, TextIteratorStreamer

import runtime
from runtime import machine
from runtime.errors import UnsupportedModelError
from runtime.facts import BUFFER_BYTES, describe, resolve
from runtime.generate import main
from runtime.profile import Profile, save_profile
from runtime.trace import read_trace
from runtime.vocabulary import LoadReason

PROMPT = "the cat sat."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def _generate(engine: runtime.Engine, **options: object) -> list[int]:
    inputs = engine.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output: torch.Tensor = engine.model.generate(**inputs, max_new_tokens=12, **options)
    return output[0].tolist()


def test_same_tokens_as_the_resident_model_at_every_budget(checkpoint: Path) -> None:
    with runtime.load_reference(checkpoint) as reference:
        expected = _generate(reference, do_sample=False)
    for slots in (1, 2, 6, LAYERS * EXPERTS):
        with runtime.load(checkpoint, overrides={"cache.slots": slots}) as engine:
            assert engine.profile.cache.slots == slots
            assert _generate(engine, do_sample=False) == expected
            engine.check_integrity()


def test_previous_token_prefetches_and_changes_no_token(checkpoint: Path) -> None:
    with runtime.load_reference(checkpoint) as reference:
        expected = _generate(reference, do_sample=False)
    overrides = {"cache.slots": 5, "predictor.kind": "previous_token", "prefetch.depth": 2}
    with runtime.load(checkpoint, overrides=overrides) as engine:
        assert _generate(engine, do_sample=False) == expected
        assert engine.stats().cache.num_prefetch_issued > 0
        engine.check_integrity()


def test_fp32_equals_plain_transformers_defaults(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    with runtime.load(checkpoint, overrides={"cache.slots": "25%"}) as engine:
        ids = engine.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        assert _generate(engine, do_sample=False) == plain.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()


def test_sampling_streaming_and_batches_are_those_of_transformers(checkpoint: Path) -> None:
    with (
        runtime.load_reference(checkpoint) as reference,
        runtime.load(checkpoint, overrides={"cache.slots": 5}) as engine,
    ):
        for seed in (0, 1):
            torch.manual_seed(seed)
            sampled = _generate(reference, do_sample=True)
            torch.manual_seed(seed)
            assert _generate(engine, do_sample=True) == sampled
        streamer = TextIteratorStreamer(engine.tokenizer, skip_prompt=True)
        whole = _generate(engine, do_sample=False, streamer=streamer)
        assert "".join(streamer).replace(" ", "") == engine.tokenizer.decode(whole[len(PROMPT) :]).replace(" ", "")
        batch = torch.randint(1, 20, (3, 7), generator=torch.Generator().manual_seed(0))
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(batch)}
        assert torch.equal(engine.model.generate(batch, **options), reference.model.generate(batch, **options))


def test_the_counters_add_up(checkpoint: Path) -> None:
    with runtime.load(checkpoint, overrides={"cache.slots": 6}, record_loads=True) as engine:
        _generate(engine, do_sample=False)
        stats = engine.stats()
        cache = stats.cache
        assert cache.num_passes == 12 and cache.num_tokens == len(PROMPT) + 11
        assert cache.num_layer_steps == 12 * LAYERS
        assert cache.num_lookups == cache.num_hits + cache.num_in_flight + cache.num_misses
        assert stats.num_loads + stats.num_loads_cancelled == cache.num_misses + cache.num_prefetch_issued
        assert engine.needed_loads is not None
        reasons = [load.reason for load in engine.needed_loads]
        assert reasons.count(LoadReason.DEMAND) == cache.num_misses
        assert reasons.count(LoadReason.PREFETCH) == cache.num_prefetch_used > 0
        assert json.loads(json.dumps(stats.as_dict()))["hit_rate"] == cache.hit_rate
        engine.reset_stats()
        assert engine.stats().cache.num_lookups == 0 and not engine.needed_loads


def test_replaying_loads_leaves_the_cache_as_it_was(checkpoint: Path) -> None:
    with runtime.load(checkpoint, overrides={"cache.slots": 6}, record_loads=True) as engine:
        expected = _generate(engine, do_sample=False)
        assert engine.replay_loads(list(engine.needed_loads or ())) > 0
        engine.check_integrity()
        assert _generate(engine, do_sample=False) == expected


def test_an_offloaded_model_refuses_to_be_saved(checkpoint: Path, tmp_path: Path) -> None:
    with runtime.load(checkpoint) as engine, pytest.raises(UnsupportedModelError, match="cannot be saved"):
        engine.model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_profile_says_what_runs_and_where_its_model_is(checkpoint: Path, tmp_path: Path) -> None:
    overrides = {"cache.slots": 7, "cache.policy": "lru", "provenance.model": str(checkpoint)}
    save_profile(Profile.default().with_overrides(overrides), tmp_path / "p.yaml")
    with runtime.load(tmp_path / "p.yaml", overrides={"prefetch.depth": 0}) as engine:
        assert (engine.profile.cache.slots, engine.profile.cache.policy, engine.profile.prefetch.depth) == (7, "lru", 0)


def test_slots_are_clamped_to_the_experts_there_are_and_to_the_memory_with_a_note(checkpoint: Path) -> None:
    with runtime.load(checkpoint, overrides={"cache.slots": 10_000}) as engine:
        assert engine.profile.cache.slots == LAYERS * EXPERTS and not engine.notes
    facts = describe(checkpoint)
    fixed = machine.resident_bytes() + BUFFER_BYTES + facts.dense_bytes + machine.kv_cache_bytes(facts.config, 64, 1, 2)
    limit = fixed + 64 * facts.slot_bytes
    overrides = {"limits.max_memory_bytes": limit, "workload.context": 64, "cache.slots": "100%"}
    facts_of_many = replace(facts, slot_bytes=16 * facts.slot_bytes)
    profile, notes = resolve(Profile.default().with_overrides(overrides), facts_of_many)
    assert 1 <= int(profile.cache.slots or 0) <= 4
    assert "24 slots asked for" in notes[0] and "fit the memory" in notes[0]


def test_the_command_line_writes_text_figures_and_a_trace(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "6", "--set", "cache.slots=6"]
    assert main([*arguments, "--trace", str(tmp_path / "t.npz")]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    for word in ("TTFT", "TPOT", "hits", "loads", "memory"):
        assert word in captured.err
    trace = read_trace(tmp_path / "t.npz")
    assert trace.experts.shape == (len(PROMPT) + 5, LAYERS, TOP_K)
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert len(result["token_ids"]) == 6 and result["ttft_ms"] > 0 and result["tpot_ms"] > 0
    assert result["num_bytes"] > 0 and result["peak_resident_bytes"] > 0 and 0 <= result["hit_rate"] <= 1
