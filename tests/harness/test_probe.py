"""The probe's command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness import probe
from harness.hardware.bandwidth import Curve
from harness.hardware.nvml import NvmlReadings, Reading
from harness.probe import check_gpu, main
from runtime.errors import DeviceError


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = probe.measure_curve

    def brief(files: list[Path], expert_bytes: int, engine_bytes_per_s: float) -> Curve:
        return whole(files, expert_bytes, engine_bytes_per_s, budget_s=0.1)

    monkeypatch.setattr(probe, "measure_curve", brief)


def test_json_has_every_part(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tiny_checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["curve"]["expert_bytes"] == 3 * 64 * 32 * 2 and found["curve"]["engine_bytes_per_s"] > 0
    assert found["num_cpus"] >= 1 and found["memory_available_bytes"] <= found["memory_total_bytes"]
    assert found["hardware"]["device"] == "cpu" and "status" in found["nvml"]["num_gpus"]


def test_the_text_names_what_was_measured(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tiny_checkpoint)]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("device", "memory", "NVML", "buffered x4", "12 KiB", "engine"))


@pytest.mark.parametrize("arguments", [["--model", "{here}"], ["--gpu", "3"]])
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(here=tmp_path) for word in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_a_gpu_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_nvml import FakeNvml

    from harness.hardware.nvml import read_gpus

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"--gpu 1: .*CUDA; run with --device cpu"):
        check_gpu(1, read_gpus(FakeNvml()))
    none = NvmlReadings(Reading(0), Reading("580"))
    with pytest.raises(DeviceError, match="no GPU at all; run with --device cpu"):
        check_gpu(0, none)
