"""NVML readings against a fake library with every status, and against what this machine has."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from harness.hardware.nvml import Status, find_gpu, read_gpus
from runtime.errors import DeviceError


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value


class FakeNvml:
    """Two GPUs; `fail` names functions and the nvmlReturn_t that they end with."""

    NVMLError = NVMLError
    nvmlMemory_v2 = 0x2000028

    def __init__(self, **fail: int) -> None:
        self.fail, self.is_open, self.memory_versions = fail, False, []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("nvml") or not callable(found):
            return found
        if name in self.fail:
            return lambda *_: (_ for _ in ()).throw(NVMLError(self.fail[name]))
        return found

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.95.05"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"Fake GPU"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int = 1) -> Any:
        self.memory_versions.append(version)
        return SimpleNamespace(total=80 << 30, free=70 << 30, used=10 << 30)

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: int) -> int:
        return 1

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:
        return 5

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:
        return 16

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: int) -> int:
        return 16


STATUSES = {
    3: Status.NOT_SUPPORTED,
    4: Status.NO_PERMISSION,
    9: Status.DRIVER_NOT_LOADED,
    12: Status.LIBRARY_NOT_FOUND,
    13: Status.FUNCTION_MISSING,
    15: Status.GPU_LOST,
    999: Status.ERROR,
}


def test_everything_is_read() -> None:
    fake = FakeNvml()
    readings = read_gpus(fake)
    gpu = readings.gpus[1]
    assert (readings.num_gpus.value, readings.driver.value, fake.is_open) == (2, "580.95.05", False)
    assert (gpu.name.value, gpu.uuid.value, gpu.memory_free_bytes.value) == ("Fake GPU", "GPU-1", 70 << 30)
    assert (gpu.pcie_generation.value, gpu.pcie_generation_max.value, gpu.pcie_width.value) == (1, 5, 16)
    assert json.loads(json.dumps(readings.as_dict()))["gpus"][0]["name"] == {"value": "Fake GPU", "status": "ok"}


@pytest.mark.parametrize(("code", "status"), STATUSES.items())
def test_a_read_that_fails_is_a_status_and_spoils_no_other(code: int, status: Status) -> None:
    gpu = read_gpus(FakeNvml(nvmlDeviceGetCurrPcieLinkWidth=code)).gpus[0]
    assert (gpu.pcie_width.value, gpu.pcie_width.status, str(gpu.pcie_width)) == (None, status, status.value)
    assert gpu.pcie_width_max.value == 16


@pytest.mark.parametrize(("code", "status"), STATUSES.items())
def test_a_library_that_does_not_start_leaves_only_its_status(code: int, status: Status) -> None:
    readings = read_gpus(FakeNvml(nvmlInit=code))
    assert (readings.num_gpus.status, readings.driver.status, readings.gpus) == (status, status, ())


def test_a_lost_gpu_has_no_values_and_the_library_is_closed() -> None:
    fake = FakeNvml(nvmlDeviceGetHandleByIndex=15)
    gpu = read_gpus(fake).gpus[0]
    assert {gpu.name.status, gpu.memory_free_bytes.status, gpu.pcie_width.status} == {Status.GPU_LOST}
    assert not fake.is_open


def test_memory_falls_back_to_version_1() -> None:
    class Old(FakeNvml):
        def nvmlDeviceGetMemoryInfo(self, handle: int, version: int = 1) -> Any:
            if version != 1:
                raise NVMLError(13)
            return super().nvmlDeviceGetMemoryInfo(handle)

    assert read_gpus(Old()).gpus[0].memory_total_bytes.value == 80 << 30


def test_a_function_that_the_binding_lacks_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetUUID")
    assert read_gpus(FakeNvml()).gpus[0].uuid.status is Status.FUNCTION_MISSING


def test_find_gpu() -> None:
    assert find_gpu(1, read_gpus(FakeNvml())).uuid.value == "GPU-1"


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        (FakeNvml(), "only 0 … 1"),
        (FakeNvml(nvmlInit=12), "library not found"),
        (FakeNvml(nvmlDeviceGetCount=4), "no permission"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_with_the_way_out(fake: FakeNvml, said: str) -> None:
    with pytest.raises(DeviceError, match=f"--gpu 3.*{said}.*--device cpu"):
        find_gpu(3, read_gpus(fake))


def test_this_machine_answers_whatever_it_has() -> None:
    readings = read_gpus()
    assert (readings.num_gpus.value is None) == (readings.num_gpus.status is not Status.OK)
    assert len(readings.gpus) == (readings.num_gpus.value or 0)
