"""Schedulers side by side, open loops and the search for the largest batch: the logic, with stand-ins for processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import runtime
from harness import batching
from harness.measure import kv_room, slo
from harness.measure.batch_contender import BatchContender
from harness.measure.batch_runs import Arm, replayed, run_arms, serve
from harness.measure.kv_room import Room, largest_batch
from harness.measure.limits import MARGIN_BYTES, ModelBytes
from harness.measure.process import ContenderFailed, Spec
from harness.measure.workload import TokenRequest
from harness.report import batching as report
from runtime.prompts import PromptRequest
from runtime.schedulers.base import Request
from runtime.schedulers.deadline import Deadline


def _texts(number: int, tokens: int = 300) -> list[TokenRequest]:
    ids = tuple(range(1, tokens + 1))
    return [TokenRequest(f"text{i}", f"task{i % 4}", ids[:160], ids[160:]) for i in range(number)]


class FakeServer:
    """Serves each request in `seconds[kind]`, one after the other."""

    def __init__(self, seconds: dict[str, float], slots: int | None = None) -> None:
        self.seconds, self.facts, self.peak_bytes = seconds, {"slots": slots, "notes": []}, 1000
        self.asked: list[str] = []

    def ask(self, op: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        assert op == "serve" and timeout_s > 0
        requests, kind = arguments["requests"], arguments["scheduler"]["kind"]
        self.asked.append(kind)
        times, now_s = [], 0.0
        for request in requests:
            arrival_s = request["arrival_s"] if arguments["concurrency"] is None else 0.0
            now_s = max(now_s, arrival_s) + self.seconds[kind]
            number = len(request["output_ids"])
            first_s = now_s - self.seconds[kind] / 2
            times.append(
                {"id": request["id"], "task": request["task"], "arrival_s": arrival_s, "first_token_s": first_s,
                 "finish_s": now_s, "num_tokens": number}
            )  # fmt: skip
        num_tokens = sum(one["num_tokens"] for one in times)
        return {
            "requests": times,
            "tokens_per_s": num_tokens / now_s,
            "distinct_experts": 8.0 * self.seconds[kind],
            "decode_batch": 2.0,
            "planning_s": 0.1,
            "hidden_planning_s": 0.05,
            "peak_resident_bytes": 2000,
            "stats": {"num_loads": 3 * num_tokens, "num_tokens": num_tokens},
        }


ARMS = {"fifo 2x4": "fifo", "route_overlap 2x4 q8": "route_overlap"}


def _arms() -> list[Arm]:
    return [Arm(name, {"kind": kind, "group": 2, "window": 4}) for name, kind in ARMS.items()]


def test_arms_take_turns_on_the_same_requests_and_are_compared_block_by_block() -> None:
    server, arms = FakeServer({"fifo": 2.0, "route_overlap": 1.0}), _arms()
    blocks = [[replayed(text, 10, 20) for text in _texts(3)] for _ in range(4)]
    counts = {"samples": 0, "blocks": 0}

    def count(what: str) -> None:
        counts[what] += 1

    run_arms(server, arms, blocks, 8, [], lambda: count("samples"), lambda: count("blocks"))
    fifo, other = "fifo", "route_overlap"
    assert server.asked in ([fifo, other, other, fifo] * 2, [fifo, other, other, fifo, other, fifo, fifo, other])
    assert counts == {"samples": 8, "blocks": 4}
    summary = report.overlap_summary(arms)
    row = summary["arms"][1]
    for name in ("tokens_per_s", "distinct_experts", "latency_ms_p50"):
        assert row[f"{name}_gain"]["estimate"] == pytest.approx(2.0) and row[f"{name}_gain"]["num_pairs"] == 4
    assert row["loads_per_token_gain"]["estimate"] == pytest.approx(1.0)
    assert "tokens_per_s_gain" not in summary["arms"][0]
    table = report.overlap_table(summary)
    assert "2.00 [2.00, 2.00]" in table and "100, 50 ms" in table
    assert json.dumps(report.arms_json(arms))


def test_latency_is_what_a_client_sees() -> None:
    requests = [replayed(text, number, 20) for text, number in zip(_texts(3), (10, 10, 5), strict=True)]
    sample = serve(FakeServer({"fifo": 2.0}), requests, {"kind": "fifo"}, 8)
    assert sample["latency_ms_p50"] == pytest.approx(400.0)  # of 200, 400 and 1200
    assert sample["loads_per_token"] == 3.0


def test_a_stream_is_that_of_its_seed_and_slos_are_multiples_of_idle_latency() -> None:
    texts = _texts(40)
    idle = {kind: slo.Idle(0.1 * place, 0.01) for place, kind in enumerate(slo.KINDS, 1)}
    stream, again, other = (slo.stream(texts, idle, 2.0, [3.0, 6.0], [seed, 5]) for seed in (1, 1, 2))
    assert stream == again != other
    assert [request.arrival_s for request in stream] == sorted(request.arrival_s for request in stream)
    assert 10 < stream[-1].arrival_s < 40
    assert len({request.id for request in stream}) == 40
    kinds = slo.kinds_of(texts)
    factors = set()
    for request in stream:
        kind = kinds[request.task]
        assert request.output_ids is not None and request.slo_s is not None
        assert len(request.prompt_ids) == kind.prompt_tokens
        assert abs(len(request.output_ids) - kind.output_tokens) <= slo.SPREAD * kind.output_tokens + 1
        assert request.max_new_tokens == slo.MOST_TOKENS >= len(request.output_ids)
        factors.add(round(request.slo_s / idle[kind].latency_s(len(request.output_ids)), 6))
    assert factors == {3.0, 6.0}


def test_the_share_in_time_counts_requests_and_is_compared_by_block() -> None:
    requests = [
        PromptRequest(f"r{i}", (1,), output_ids=(2, 3), arrival_s=10.0 * i, slo_s=slo_s)
        for i, slo_s in enumerate((1.0, 3.0, 3.0, 1.5))
    ]
    arms = [Arm(kind, {"kind": kind}) for kind in ("fifo", "deadline")]
    server = FakeServer({"fifo": 2.0, "deadline": 1.2})
    run_arms(server, arms, [requests, requests], None, [], lambda: None, lambda: None)
    assert [slo.share_in_time(requests, arm.samples[0]) for arm in arms] == [0.5, 0.75]
    summary = report.deadline_summary(arms, [requests, requests])
    assert [row["share_in_time"] for row in summary["arms"]] == [0.5, 0.75]
    assert summary["more_in_time"]["estimate"] == 0.25
    assert "+25.0 points [+25.0, +25.0] of 8 requests" in report.deadline_table(summary)
    run_arms(
        server, one := [Arm(kind, {"kind": kind}) for kind in ("fifo", "deadline")], [requests], None, [], *[int] * 2
    )
    assert "+25.0 points of 4 requests, one block" in report.deadline_table(report.deadline_summary(one, [requests]))


def test_idle_latency_is_that_of_the_only_request() -> None:
    sample = serve(FakeServer({"fifo": 2.0}), [slo.alone(_texts(4), slo.KINDS[1])], {"kind": "fifo"}, 1)
    idle = slo.idle_of(sample)
    assert idle.ttft_s == 1.0 and idle.latency_s(slo.KINDS[1].output_tokens) == pytest.approx(2.0)


@given(st.integers(0, 70), st.integers(1, 64), st.integers(-5, 200))
def test_the_largest_batch_is_found_to_an_eighth(fits: int, most: int, guess: int) -> None:
    tried: list[int] = []

    def runs(number: int) -> str | None:
        tried.append(number)
        return f"{number} ran" if number <= fits else None

    number, answer = largest_batch(runs, most, guess)
    best = min(fits, most)
    assert number <= best and (number == most or best - number <= max(1, number // 8))
    assert answer == (f"{number} ran" if number else None)
    assert len(tried) == len(set(tried)) <= 14 and all(1 <= one <= most for one in tried)


SIZES = ModelBytes(dense_bytes=10_000_000, slot_bytes=1_000_000, num_experts=100)


def _room() -> Room:
    return Room(SIZES, kv_bytes_per_token=1000, kv_tokens_per_request=500, process_bytes=50_000_000,
                resident_peak_bytes=200_000_000)  # fmt: skip


def test_the_memory_sum_divides_between_slots_and_kv_cache() -> None:
    room = _room()
    assert room.resident_kv_tokens(200_000_000) == 500 and room.resident_kv_tokens(204_000_000) == 4500
    limit = 60_000_000 + MARGIN_BYTES + 30_000_000
    assert room.kv_tokens(limit, 30) == 0 and room.kv_tokens(limit, 20) == 10_000
    assert room.slots(limit, 20) == 20 and room.slots(limit, 60) == 0
    assert room.slots(10**9, 1) == SIZES.num_experts


class FakeMachine:
    """Starts contenders that die where they need more than their limit; a request of a batch needs `kv_bytes`."""

    def __init__(self, kv_bytes: int) -> None:
        self.kv_bytes, self.started = kv_bytes, list[Spec]()

    @contextmanager
    def start(self, name: str, spec: Spec, limit_bytes: int | None) -> Iterator[Any]:
        self.started.append(spec)
        slots = spec.overrides.get("cache.slots")
        base = 60_000_000 + (SIZES.num_experts if slots is None else slots) * SIZES.slot_bytes
        server = FakeServer({"fifo": 1.0}, slots)
        ask = server.ask

        def limited(op: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
            server.peak_bytes = base + len(arguments["requests"]) * self.kv_bytes
            if limit_bytes is not None and server.peak_bytes > limit_bytes:
                raise ContenderFailed("killed by the kernel: out of memory", out_of_memory=True)
            return ask(op, timeout_s=timeout_s, **arguments)

        server.ask = limited  # type: ignore[method-assign]
        yield server


def _spec(slots: int, kv_bytes: int) -> Spec:
    return Spec("batch", "model", 1, overrides={"cache.slots": slots, "cache.kv_bytes": kv_bytes})


def test_batches_are_as_large_as_their_limit_lets_them_be() -> None:
    texts, room = _texts(64), _room()
    machine = FakeMachine(kv_bytes=2_000_000)  # four times what the sum says
    resident = Spec("batch_resident", "model", 1)
    needs = kv_room.measure_process_bytes(machine.start, _spec(4, 0), 4, SIZES, texts[0])
    assert needs == 50_000_000 + machine.kv_bytes
    peak = kv_room.resident_peak(machine.start, resident, SIZES, needs, texts[0], lambda text: None)
    assert peak is not None and 0 <= peak - 162_000_000 <= 2_000_000
    number, sample = kv_room.resident_batch(machine.start, resident, room, 200_000_000, texts)
    assert 18 <= number <= 20 and sample is not None
    row = report.memory_row("resident", room, 200_000_000, number, sample)
    assert row["slots"] is None and row["batch"] == number and row["tokens_per_s"] > 0
    machine.started.clear()
    machine.kv_bytes = (room.kv_bytes(64) + MARGIN_BYTES) // 64 + 30_000  # more than the sum says, its margin included
    limit = 60_000_000 + room.kv_bytes(64) + MARGIN_BYTES + 20_000_000
    number, sample = kv_room.our_batch(machine.start, _spec, room, limit, texts)
    assert number == 64 and sample is not None and 1 <= sample["slots"] < room.slots(limit, 64)
    tried = [spec.overrides["cache.slots"] for spec in machine.started]
    assert tried == sorted(tried, reverse=True) and tried[-1] == sample["slots"]
    assert "64" in report.memory_table(room, [{"percent": 2, "limit_bytes": limit,
        **report.memory_row("offloaded", room, limit, number, sample)}], SIZES)  # fmt: skip


def test_a_failure_for_another_reason_is_no_answer() -> None:
    @contextmanager
    def start(name: str, spec: Spec, limit_bytes: int | None) -> Iterator[Any]:
        raise ContenderFailed("no such model", out_of_memory=False)
        yield

    with pytest.raises(ContenderFailed, match="no such model"):
        kv_room.resident_batch(start, Spec("batch_resident", "model", 1), _room(), 10**9, _texts(4))


def test_a_contender_serves_and_its_schedulers_remember(tiny_checkpoint: Path) -> None:
    keys = {"cache.slots": "50%"}
    with runtime.load(tiny_checkpoint, overrides=keys, dtype=torch.float32) as engine:
        contender = BatchContender(engine)
        requests = [replayed(text, 6, 20) for text in _texts(3, tokens=170)]
        section = {"kind": "deadline", "group": 2, "window": 2}
        as_json = json.loads(json.dumps([vars(request) for request in requests]))
        for _ in range(2):
            sample = contender.serve(as_json, section, concurrency=3)
        again = contender._scheduler(dict(reversed(section.items())))
        assert isinstance(again, Deadline) and contender._scheduler({**section, "window": 1}) is not again
        assert again._lengths.left(Request("new", "task0", 0.0, 4, 4, 0, 20)) == 6  # as it learned
        assert [one["id"] for one in sample["requests"]] == ["text0", "text1", "text2"]
        assert [one["num_tokens"] for one in sample["requests"]] == [6, 6, 6]
        assert sample["stats"]["num_tokens"] == 3 * 165 and json.dumps(sample)
        assert contender.facts() == {"slots": 8, "notes": []}


def test_equality_is_reported(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(tiny_checkpoint), "--requests", "3", "--tokens", "6", "--prompt-tokens", "8"]
    code = batching.main(["equality", *options, "--out", str(tmp_path)])
    *table, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert [row["scheduler"] for row in summary["rows"]] == ["fifo", "route_overlap", "deadline"]
    margins = [one["margin"] for row in summary["rows"] for one in row["differences"]]
    assert code == 0 and summary["passed"] == all(margin <= 1e-4 for margin in margins)
    assert sum(" of 3" in line for line in table) == 3
