"""`python -m runtime.generate --prompts FILE`: what it prints and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny

from runtime import build
from runtime.generate import main
from runtime.profile import Profile, save_profile
from runtime.trace import read_trace

TEXTS = ["the cat sat.", "a dog", "so it goes, and on", "why"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    # The first is the longest, so that others are complete before it.
    lengths = [16, 3, 5, 4]
    rows = [
        {"id": f"p{i}", "prompt": text, "task": f"t{i}", "max_new_tokens": length, "slo_ms": 60_000}
        for i, (text, length) in enumerate(zip(TEXTS, lengths, strict=True))
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def _json_lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main([*arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("scheduler", ["fifo", "route_overlap", "deadline"])
def test_every_prompt_is_answered_in_the_order_of_the_file(
    checkpoint: Path, prompts: Path, scheduler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = ["--set", "scheduler.group=2", "--set", "scheduler.window=2", "--scheduler", scheduler]
    *rows, last = _json_lines(capsys, "--model", str(checkpoint), "--prompts", str(prompts), *batch)
    assert [row["id"] for row in rows] == ["p0", "p1", "p2", "p3"]
    assert [len(row["token_ids"]) for row in rows] == [16, 3, 5, 4]
    assert all(row["slo_met"] and 0 < row["ttft_ms"] <= row["total_ms"] for row in rows)
    summary = last["summary"]
    assert summary["num_requests"] == 4 and summary["num_output_tokens"] == 28
    assert summary["decode_batch"] > 1 and summary["distinct_experts"] > 2
    assert summary["num_tokens"] == sum(row["num_prompt_tokens"] + len(row["token_ids"]) - 1 for row in rows)
    for row, text in zip(rows, TEXTS, strict=True):
        (alone,) = _json_lines(
            capsys, "--model", str(checkpoint), "--prompt", text, "--max-new-tokens", str(len(row["token_ids"]))
        )
        assert (row["token_ids"], row["text"]) == (alone["token_ids"], alone["text"])


def test_text_goes_to_stdout_and_figures_to_stderr(
    checkpoint: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(checkpoint), "--prompts", str(prompts), "--concurrency", "2"]) == 0
    captured = capsys.readouterr()
    heads = [line.split()[1] for line in captured.out.splitlines() if line.startswith("== ")]
    assert heads == ["p0", "p1", "p2", "p3"]
    assert "tokens/s, 1.0 requests and 2.0 experts per layer in a decode pass" in captured.err
    assert "hits" in captured.err


def test_a_profile_for_something_else_is_told_of_beside_json(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = Profile.default().with_overrides({"match": {"device": "cuda:H100"}})
    save_profile(profile, tmp_path / "p.yaml")
    arguments = ["--model", str(checkpoint), "--profile", str(tmp_path / "p.yaml"), "--prompt", "a", "--json"]
    assert main([*arguments, "--max-new-tokens", "1"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["token_ids"]) == 1
    assert "note: profile" in captured.err and "the default configuration runs instead" in captured.err


def test_the_trace_names_requests_and_tasks(checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.npz"
    options = ["--set", "scheduler.group=3", "--trace", str(file), "--max-new-tokens", "4", "--json"]
    assert main(["--model", str(checkpoint), "--prompts", str(prompts), *options]) == 0
    trace = read_trace(file)
    assert {int(number): trace.task(int(number)) for number in trace.request} == {i: f"t{i}" for i in range(4)}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompts", "missing.jsonl"], "missing.jsonl: cannot read the prompts"),
        (["--scheduler", "lifo", "--prompts", "FILE"], "unknown scheduler 'lifo'"),
        (["--concurrency", "0", "--prompts", "FILE"], "--concurrency 0: at least 1 is needed"),
        (["--scheduler", "fifo", "--prompt", "x"], "give them with --prompts FILE"),
        (["--max-new-tokens", "0", "--prompts", "FILE"], "--max-new-tokens 0: at least 1"),
    ],
)
def test_wrong_arguments(
    checkpoint: Path, prompts: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [str(prompts) if argument == "FILE" else argument for argument in arguments]
    assert main(["--model", str(checkpoint), *named]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ") and reason in error[-1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("", "prompts.jsonl: the file is empty"), ('{"prompt": "a"}\nb c\n', "prompts.jsonl, line 2: not JSON")],
)
def test_wrong_files(
    checkpoint: Path, tmp_path: Path, content: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content, encoding="utf-8")
    assert main(["--model", str(checkpoint), "--prompts", str(path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and reason in line


def test_a_prompt_beyond_the_context_is_refused_before_loading(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "load_offloaded", lambda *_, **__: pytest.fail("the model was loaded"))
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": "long", "prompt": "a" * 500}), encoding="utf-8")
    assert main(["--model", str(checkpoint), "--prompts", str(path)]) == 2
    assert "prompt 'long' has 500 tokens and 64 new ones, more than the 512" in capsys.readouterr().err


def test_a_trace_that_cannot_be_written_is_found_before_the_model_is_loaded(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(checkpoint), "--prompt", "a", "--trace", "/dev/null/t.npz"]) == 2
    assert "--trace /dev/null/t.npz: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("output", [[], ["--json"]])
def test_the_last_line_of_stderr_sums_up(
    checkpoint: Path, prompts: Path, output: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for what, first in ((["--prompt", "a cat", "--max-new-tokens", "4"], 1), (["--prompts", str(prompts)], 4)):
        assert main(["--model", str(checkpoint), *what, *output, "--set", "cache.slots=6"]) == 0
        captured = capsys.readouterr()
        line = captured.err.strip().splitlines()[-1]
        assert all(part in line for part in ("hits ", "stall ", "MB/token", "TTFT ", "TPOT ", "slots 6/6", "peak "))
        if output:
            told = json.loads(captured.out.splitlines()[-1])
            told = told.get("summary", told)
            assert 0 < told["tpot_p50_ms"] <= told["tpot_p95_ms"] and told["ttft_mean_ms"] > 0
            assert 0 <= told["stall_share"] <= 1
            assert len(captured.out.splitlines()) == (1 if first == 1 else 5)


def test_a_profile_can_be_named_and_held_to_its_word(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTFLOW_PROFILES", str(tmp_path))
    overrides = {"provenance.model": str(checkpoint), "match.device": "cuda:NVIDIA H100", "cache.slots": 5}
    save_profile(Profile.default().with_overrides(overrides), tmp_path / "there.yaml")
    arguments = ["--profile", "there", "--prompt", "a cat", "--max-new-tokens", "2"]
    assert main(arguments) == 0
    assert "there.yaml is for another model or machine" in capsys.readouterr().err
    assert main([*arguments, "--strict"]) == 2
    assert capsys.readouterr().err.startswith("error: profile ")
    assert main(["--profile", "nowhere", "--prompt", "a"]) == 2
    assert "no profile is called nowhere" in capsys.readouterr().err


def test_the_bandwidth_is_measured_first_where_it_is_asked_for(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {"provenance.model": str(checkpoint), "match.bandwidth_at_expert_size_bytes_per_s.min": 1e15}
    save_profile(Profile.default().with_overrides(overrides), tmp_path / "p.yaml")
    arguments = ["--profile", str(tmp_path / "p.yaml"), "--prompt", "a cat", "--max-new-tokens", "2"]
    assert main([*arguments, "--strict"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--strict", "--probe"]) == 2
    assert "is stale here" in capsys.readouterr().err


def test_the_device_can_be_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(checkpoint), "--prompt", "the cat", "--max-new-tokens", "2"]
    (there,) = _json_lines(capsys, *arguments, "--device", "cpu")
    (default,) = _json_lines(capsys, *arguments)
    assert there["token_ids"] == default["token_ids"]
    assert main([*arguments, "--device", "gpu"]) == 2
    assert capsys.readouterr().err == "error: device 'gpu' is not one that this runs on; name cpu, cuda or cuda:N\n"
