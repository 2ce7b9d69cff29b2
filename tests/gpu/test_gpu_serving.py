"""Serving on a real GPU: batches equal to the resident model's on it, with deadlines, within the memory promised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from harness.demo.widen import bundled_model
from runtime import devices
from runtime.errors import BudgetError
from runtime.probe import gpu_bandwidth
from runtime.profile import Profile
from runtime.prompts import PromptRequest, RequestResult
from runtime.schedulers.make import build_scheduler
from runtime.serving import run_batch

pytestmark = pytest.mark.gpu

DEVICE = "cuda:0"
ROOT = Path(__file__).parents[2]
QUARTER: dict[str, Any] = {"cache.slots": "25%"}
TEXT = "def read_lines(path):\n    with open(path) as file:\n        return [line.rstrip() for line in file]\n\n\n"
KINDS = [("fifo", 4, 1), ("fifo", 2, 2), ("route_overlap", 4, 2), ("deadline", 4, 2)]


@cache
def ids() -> tuple[int, ...]:
    with runtime.load(bundled_model(), device=DEVICE, overrides={"cache.slots": 1}) as engine:
        return tuple(engine.tokenizer(TEXT)["input_ids"])


def requests(num: int, slo_s: float | None = None) -> list[PromptRequest]:
    """Prompts of several lengths, each with its own end; every other one is due first."""
    due = [slo_s and slo_s * (1 + number % 2) for number in range(num)]
    return [
        PromptRequest(f"r{n}", ids()[n : n + 6 + 3 * (n % 4)], 6 + n % 5, task=f"t{n % 2}", slo_s=due[n])
        for n in range(num)
    ]


def run(engine: runtime.Engine, kind: tuple[str, int, int], **options: Any) -> list[tuple[int, ...]]:
    keys = dict(zip(("scheduler.kind", "scheduler.group", "scheduler.window"), kind, strict=True))
    scheduler = build_scheduler(Profile.default().with_overrides(keys))
    num = options.pop("num", 8)
    found = run_batch(engine, requests(num, options.pop("slo_s", None)), scheduler, **options)
    assert len(found.requests) == num
    return [request.token_ids for request in found.requests]


@cache
def resident(kind: tuple[str, int, int], *options: tuple[str, Any]) -> list[tuple[int, ...]]:
    with runtime.load_reference(bundled_model(), device=DEVICE) as reference:
        return run(reference, kind, **dict(options))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_equal_the_resident_models_to_the_token(kind: tuple[str, int, int]) -> None:
    with runtime.load(bundled_model(), device=DEVICE, overrides=QUARTER) as engine:
        for _ in range(2):  # with an empty cache, and with a full one
            assert run(engine, kind, concurrency=8) == resident(kind, ("concurrency", 8))
        engine.check_integrity()
        stats = engine.stats()
        assert stats.num_loads > 0 and stats.cache.num_lookups > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_tokens_are_those_of_the_resident_model(seed: int) -> None:
    options = (("concurrency", 8), ("sample", True), ("seed", seed))
    with runtime.load(bundled_model(), device=DEVICE, overrides=QUARTER) as engine:
        assert run(engine, ("fifo", 4, 1), **dict(options)) == resident(("fifo", 4, 1), *options)


def test_deadlines_concurrency_and_giving_up() -> None:
    with runtime.load(bundled_model(), device=DEVICE, overrides=QUARTER) as engine:
        done: list[RequestResult] = []
        tokens = run(engine, ("deadline", 4, 2), num=12, slo_s=60.0, concurrency=8, on_finish=done.append)
        assert sorted(one.id for one in done) == sorted(f"r{n}" for n in range(12)) and all(tokens)
        found = run_batch(engine, requests(8), concurrency=8, on_token=lambda name, token: name != "r3")
        assert found.requests[3].is_cancelled and found.requests[3].num_tokens == 1
        assert not any(one.is_cancelled for one in found.requests if one.id != "r3")
        assert run(engine, ("fifo", 4, 1), concurrency=8) == resident(("fifo", 4, 1), ("concurrency", 8))


def test_a_thread_that_generates_beside_a_batch_changes_nothing() -> None:
    """The batch and the text share slots, and the text runs on another stream."""
    expected = resident(("fifo", 4, 1), ("concurrency", 8))
    with runtime.load(bundled_model(), device=DEVICE, overrides=QUARTER) as engine:
        prompt = torch.tensor([ids()[:12]], device=DEVICE)
        greedy: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
        alone = engine.model.generate(prompt, **greedy)  # type: ignore[operator]
        for _ in range(2):
            assert run(engine, ("fifo", 4, 1), concurrency=8) == expected
            stream = torch.cuda.Stream(DEVICE)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                assert torch.equal(engine.model.generate(prompt, **greedy), alone)  # type: ignore[operator]
            stream.synchronize()


def test_the_kv_cache_is_the_profiles_and_goes_back() -> None:
    with runtime.load(bundled_model(), device=DEVICE, overrides=QUARTER) as engine:
        run(engine, ("fifo", 4, 1), concurrency=8)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(DEVICE)
        for _ in range(3):
            run(engine, ("fifo", 4, 1), concurrency=8)
        assert torch.cuda.memory_allocated(DEVICE) <= before + (1 << 20)
        assert engine.stats().peak_gpu_bytes > engine.num_slots * engine._pools[0].arena.slot_bytes
        with pytest.raises(BudgetError, match="KV cache of"):
            run_batch(engine, requests(2), max_kv_tokens=16, concurrency=2)


def test_a_static_cache_is_not_compiled() -> None:
    """transformers would compile a decode step on a GPU that has a static cache."""
    with runtime.load(bundled_model(), device=DEVICE, overrides=QUARTER) as engine:
        prompt = torch.tensor([ids()[:12]], device=DEVICE)
        greedy: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
        dynamic = engine.model.generate(prompt, **greedy)  # type: ignore[operator]
        static = engine.model.generate(prompt, **greedy, cache_implementation="static")  # type: ignore[operator]
        assert not hasattr(engine.model, "_compiled_call") and static.shape == dynamic.shape


def generate(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime.generate", *arguments]
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # packages may be there, too
    paths: Mapping[str, str] = {**os.environ, "PYTHONPATH": places, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=paths, timeout=300)


@pytest.mark.parametrize("named", [["--device", DEVICE], ["--gpu", "0"]])
def test_the_command_line_says_where_everything_is(named: list[str]) -> None:
    base = ["--model", str(bundled_model()), "--prompt", TEXT, "--max-new-tokens", "12", "--set", "cache.slots=25%"]
    done = generate([*base, *named, "--json"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["token_ids"]) == 12 and found["peak_gpu_bytes"] > 0
    assert "pinned host memory hold all experts" in done.stderr and "on cuda:0" in done.stderr
    assert " GB of GPU memory in tensors, " in done.stderr


def test_the_drivers_number_of_a_gpu_leads_back_to_it() -> None:
    for index in range(torch.cuda.device_count()):
        number = devices.gpu_number(torch.device("cuda", index))
        assert number is not None and devices.numbered_gpu(number) == torch.device("cuda", index)


def test_loading_can_probe_the_link_and_the_probe_leaves_nothing_behind() -> None:
    bandwidth = gpu_bandwidth(4 << 20, torch.device(DEVICE), budget_s=0.2)
    print(f"{bandwidth / 1e9:.1f} GB/s at 4 MiB")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    assert gpu_bandwidth(4 << 20, torch.device(DEVICE), budget_s=0.0) > 0
    assert torch.cuda.memory_allocated(DEVICE) == before
    name = f"cuda:{torch.cuda.get_device_name(0)}"
    for least, level in ((1.0, "compatible"), (1e15, "stale")):
        match = {"match.device": name, "match.bandwidth_at_expert_size_bytes_per_s": {"min": least}}
        tuned = Profile.default().with_overrides({**match, **QUARTER})
        with runtime.load(tuned, bundled_model(), probe=0.2) as engine:
            assert engine.match is not None and engine.match.level == level
            assert engine.model.device == torch.device(DEVICE)
