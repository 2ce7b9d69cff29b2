"""The probe's command line."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_nvml import FakeNvml
from pydantic import TypeAdapter
from test_copies import FakeDevice

from harness import probe
from harness.hardware.compute import ExpertTime, measure_experts
from harness.hardware.nvml import read_gpus
from harness.hardware.readings import NvmlReadings, Reading
from harness.hardware.verdicts import Verdict
from harness.probe import Probe, check_gpu, main, take_probe
from runtime.errors import DeviceError
from runtime.facts import describe

BRIEF = ["--seconds", "0.5"]


def test_json_has_every_part(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tiny_checkpoint), "--json", *BRIEF]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["curve"]["expert_bytes"] == 3 * 64 * 32 * 2 and found["curve"]["engine_bytes_per_s"] > 0
    assert found["num_cpus"] >= 1 and found["host"]["available_bytes"] <= found["host"]["total_bytes"]
    assert found["hardware"]["device"] == "cpu" and "status" in found["nvml"]["num_gpus"]
    assert {one["kernel"] for one in found["compute"]} == {"eager", "grouped_mm", "gemv"}
    assert found["copies"] is None and found["verdicts"][0]["verdict"] in set(Verdict)


def test_the_columns_stand_apart_at_any_size_of_an_expert(tiny_checkpoint: Path) -> None:
    model = str(tiny_checkpoint)
    taken = take_probe(model, describe(model), read_gpus(FakeNvml()), budget_s=0.5)
    points = tuple(replace(taken.curve.series[0].points[0], num_bytes=size) for size in (1 << 20, 2_088_960))
    curve = replace(taken.curve, series=(replace(taken.curve.series[0], points=points),))
    assert "    1 MiB 1.992 MiB  latency" in replace(taken, curve=curve).describe()


def test_the_text_names_what_was_measured(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tiny_checkpoint), *BRIEF]) == 0
    out = capsys.readouterr().out
    words = (
        "device",
        "can be pinned",
        "NVML",
        "buffered x4",
        "12 KiB",
        "+ load",
        "engine",
        "gemv x1",
        "verdict",
        "disk:",
    )
    assert [word for word in words if word not in out] == []


@pytest.mark.parametrize(
    "line",
    [
        "--model {here}",
        "--gpu 3",
        "--seconds 0",
        "--seconds nan",
        "--seconds inf",
        "--gpu 0 --device cpu",
        "--device cuda:0",
    ],
)
def test_mistakes_are_one_line_and_exit_2(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.format(here=tmp_path) for word in line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_a_gpu_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"--gpu 1: this torch \(.*\) sees no GPU; .* \(--device cpu\)"):
        check_gpu(1, read_gpus(FakeNvml()))
    none = NvmlReadings(Reading(0), Reading("580"))
    with pytest.raises(DeviceError, match="no GPU at all; run with --device cpu"):
        check_gpu(0, none)


def test_a_gpu_is_found_by_its_uuid_in_whatever_order_cuda_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.devices import cuda_index

    uuids = ["9", "1"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(uuids))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))
    assert check_gpu(1, read_gpus(FakeNvml())).index == 1 and cuda_index("GPU-1") == 1
    with pytest.raises(DeviceError, match=r"--gpu 0: torch does not see the GPU GPU-0; check CUDA_VISIBLE_DEVICES"):
        check_gpu(0, read_gpus(FakeNvml()))


def test_with_a_gpu_its_copies_are_timed_and_its_link_judged(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice()
    monkeypatch.setattr("runtime.devices.cuda_index", lambda uuid: 0)
    monkeypatch.setattr("harness.hardware.cuda_copies.CudaCopies", lambda index: device)
    monkeypatch.setattr(probe, "gpu_state", lambda which: device.state())
    computed = list[str]()

    def measured(*of: Any, device: str = "cpu", **options: Any) -> tuple[ExpertTime, ...]:
        computed.append(device)
        return measure_experts(*of, **options)

    monkeypatch.setattr(probe, "measure_experts", measured)
    nvml = read_gpus(FakeNvml())
    taken = take_probe(str(tiny_checkpoint), describe(tiny_checkpoint), nvml, gpu=nvml.gpus[0], budget_s=0.5)
    assert taken.device == "cuda:Fake GPU" and taken.copies is not None and device.is_closed
    assert [one.verdict for one in taken.verdicts][1] is Verdict.OK
    assert computed == ["cpu", "cuda:0"] and {one.threads for one in taken.gpu_compute} == {1}
    assert TypeAdapter(Probe).validate_python(json.loads(json.dumps(asdict(taken)))) == taken
    out = taken.describe()
    words = (
        "GPU-0",
        "capability 9.0",
        "at most 4 x16; the GPU alone 5",
        "pinned H2D + load",
        "not throttled",
        "ECC on",
        "eager on the GPU",
    )
    assert [word for word in words if word not in out] == []
    assert json.loads(json.dumps(taken.as_dict()))["copies"]["while_copying"]["pcie_generation"]["value"] == 4
