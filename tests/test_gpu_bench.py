"""The bench of a GPU, on streams and counters that this machine has: what it measures, writes and says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from late_streams import LateStreams

from harness import gpu_bench
from harness.measure import gpu_runs
from runtime import build, devices

SIZES = {"expert-bytes": "64KiB", "requests": "1", "prompt-tokens": "16", "output-tokens": "5", "long-tokens": "40"}
ARGUMENTS = [word for name, value in SIZES.items() for word in (f"--{name}", value)]


class Gpu:
    """What the command is told it runs on; the systems compute on the CPU."""

    type = "cuda"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("EXPERTFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(build, "CudaStreams", LateStreams)
    monkeypatch.setattr(build, "is_gpu", lambda device: True)
    find = devices.find_device
    monkeypatch.setattr(
        devices, "find_device", lambda name, profile: Gpu() if name == "cuda:0" else find(name, profile)
    )
    monkeypatch.setattr(gpu_bench, "_gpu", lambda device: {"name": "none"})
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: 1 << 20)
    made = gpu_runs.Systems
    monkeypatch.setattr(gpu_runs, "Systems", lambda checkpoint, device: made(checkpoint, torch.device("cpu")))


def bench(out: Path, *more: str) -> dict[str, Any]:
    assert gpu_bench.main([*ARGUMENTS, "--out", str(out), *more]) == 0
    (file,) = out.glob("bench-*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.usefixtures("gpu")
def test_offloaded_systems_predict_what_the_resident_one_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["resident", "25 %", "on demand"]
    found = bench(tmp_path, *(word for name in names for word in ("--only", name)))
    systems = found["systems"]
    assert list(systems) == names and found["model"]["experts"] == 32
    for key in ("sha256", "tokens_per_s"):
        assert len({systems[name][key] for name in names}) == (1 if key == "sha256" else 3)
    assert len({systems[name]["prefill"]["sha256"] for name in names}) == 1
    quarter, nothing_kept = systems["25 %"], systems["on demand"]
    assert "bytes_per_token" not in systems["resident"]
    assert 0.0 < quarter["hit_rate"] < 1.0 and nothing_kept["hit_rate"] < 0.2
    assert quarter["bytes_per_token"] < nothing_kept["bytes_per_token"]
    for system in (quarter, nothing_kept):
        (row,) = system["requests"]
        assert row["needed_loads"] == row["num_loads"] == row["misses"] and row["steps"] == 4
        assert row["hits"] + row["misses"] == 4 * 8 * 4  # steps, layers, experts of each
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines[1:]] == names


@pytest.mark.usefixtures("gpu")
def test_without_time_nothing_is_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bench.main([*ARGUMENTS, "--out", str(tmp_path), "--budget-s", "0"]) == 0
    assert "no time left for 25 %" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_cpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bench.main([*ARGUMENTS, "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert "this compares systems on a GPU" in capsys.readouterr().err
