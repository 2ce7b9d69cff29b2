"""NVML readings against a fake library with every status, and against what this machine has."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import FakeNvml, NVMLError

from harness.hardware import nvml
from harness.hardware.nvml import find_gpu, gpu_state, read_gpus
from harness.hardware.readings import Reading, Status, throttle_reasons
from runtime.errors import DeviceError

STATUSES = {
    3: Status.NOT_SUPPORTED,
    4: Status.NO_PERMISSION,
    6: Status.NOT_FOUND,
    9: Status.DRIVER_NOT_LOADED,
    12: Status.LIBRARY_NOT_FOUND,
    13: Status.FUNCTION_MISSING,
    15: Status.GPU_LOST,
    16: Status.RESET_REQUIRED,
    18: Status.VERSION_MISMATCH,
    999: Status.ERROR,
}
# Every function of the fake that asks one GPU, and the readings that come from it alone.
SOURCES = {
    "nvmlDeviceGetName": ["name"],
    "nvmlDeviceGetUUID": ["uuid"],
    "nvmlDeviceGetPciInfo": ["pci_bus_id"],
    "nvmlDeviceGetCudaComputeCapability": ["compute_capability"],
    "nvmlDeviceGetMemoryInfo": [f"memory_{name}_bytes" for name in ("total", "free", "used", "reserved")],
    "nvmlDeviceGetCurrPcieLinkGeneration": ["pcie_generation"],
    "nvmlDeviceGetMaxPcieLinkGeneration": ["pcie_generation_max"],
    "nvmlDeviceGetGpuMaxPcieLinkGeneration": ["gpu_pcie_generation_max"],
    "nvmlDeviceGetCurrPcieLinkWidth": ["pcie_width"],
    "nvmlDeviceGetMaxPcieLinkWidth": ["pcie_width_max"],
    "nvmlDeviceGetPcieThroughput": ["pcie_tx_bytes_per_s", "pcie_rx_bytes_per_s"],
    "nvmlDeviceGetFieldValues": ["pcie_tx_bytes", "pcie_rx_bytes"],
    "nvmlDeviceGetPcieReplayCounter": ["pcie_replays"],
    "nvmlDeviceGetClockInfo": ["sm_clock_mhz", "memory_clock_mhz"],
    "nvmlDeviceGetTemperature": ["temperature_c"],
    "nvmlDeviceGetPowerUsage": ["power_w"],
    "nvmlDeviceGetEccMode": ["ecc"],
    "nvmlDeviceGetMigMode": ["mig"],
    "nvmlDeviceGetNumaNodeId": ["numa_node"],
}
FALLBACKS = {
    "nvmlSystemGetCudaDriverVersion_v2": "nvmlSystemGetCudaDriverVersion",
    "nvmlDeviceGetCurrentClocksEventReasons": "nvmlDeviceGetCurrentClocksThrottleReasons",
    "nvmlDeviceGetEnforcedPowerLimit": "nvmlDeviceGetPowerManagementLimit",
}

HANDLES = ("nvmlDeviceGetHandleByIndex", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetIndex")


@pytest.fixture(autouse=True)
def no_pci(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The kernel's own list of devices, empty."""
    monkeypatch.setattr(nvml, "PCI_DEVICES", tmp_path)
    return tmp_path


def _readings(gpu: Any) -> dict[str, Reading[Any]]:
    fields = {one.name: getattr(gpu, one.name) for one in dataclasses.fields(gpu)}
    return {name: value for name, value in fields.items() if isinstance(value, Reading)}


def test_everything_is_read() -> None:
    fake = FakeNvml()
    fake.reasons, fake.processes = 0x1 | 0x4 | 0x40, {"compute": [os.getpid(), 12], "graphics": [7, 12]}
    readings = read_gpus(fake)
    assert (readings.num_gpus.value, readings.driver.value, readings.cuda.value) == (2, "580.95.05", "13.1")
    assert not fake.is_open
    values = {name: reading.value for name, reading in _readings(readings.gpus[1]).items()}
    assert values == {
        "name": "Fake GPU",
        "uuid": "GPU-1",
        "pci_bus_id": "00000000:A1:00.0",
        "compute_capability": "9.0",
        "memory_total_bytes": 80 << 30,
        "memory_free_bytes": 70 << 30,
        "memory_used_bytes": 9 << 30,
        "memory_reserved_bytes": 1 << 30,
        "pcie_generation": 1,
        "pcie_generation_max": 4,
        "gpu_pcie_generation_max": 5,
        "pcie_width": 16,
        "pcie_width_max": 16,
        "pcie_tx_bytes_per_s": 100_000,
        "pcie_rx_bytes_per_s": 2_500_000,
        "pcie_tx_bytes": 197 << 30,
        "pcie_rx_bytes": 198 << 30,
        "pcie_replays": 3,
        "throttle_reasons": ("software power cap", "hardware thermal slowdown"),
        "sm_clock_mhz": 1980,
        "memory_clock_mhz": 2619,
        "temperature_c": 41,
        "power_w": 71.5,
        "power_limit_w": 700.0,
        "ecc": True,
        "mig": False,
        "foreign_processes": (7, 12),
        "numa_node": 1,
    }
    told = json.loads(json.dumps(dataclasses.asdict(readings)))
    assert told["gpus"][0]["name"] == {"value": "Fake GPU", "status": "ok"}


@pytest.mark.parametrize(("code", "status"), STATUSES.items())
@pytest.mark.parametrize(("function", "names"), SOURCES.items())
def test_a_read_that_fails_is_a_status_and_spoils_no_other(
    function: str, names: list[str], code: int, status: Status
) -> None:
    failed, sound = (_readings(read_gpus(fake).gpus[0]) for fake in (FakeNvml(**{function: code}), FakeNvml()))
    assert {name: failed[name] for name in names} == dict.fromkeys(names, Reading(None, status))
    assert all(str(failed[name]) == status.value for name in names)
    assert {name: value for name, value in failed.items() if value != sound[name]}.keys() == set(names)


@pytest.mark.parametrize(("code", "status"), STATUSES.items())
def test_a_library_that_does_not_start_leaves_only_its_status(code: int, status: Status) -> None:
    readings = read_gpus(FakeNvml(nvmlInit=code))
    assert (readings.num_gpus.status, readings.driver.status, readings.gpus) == (status, status, ())
    assert gpu_state("GPU-1", FakeNvml(nvmlInit=code)).status is status


def test_without_the_binding_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.nvml.binding", lambda: None)
    assert read_gpus().num_gpus.status is Status.LIBRARY_NOT_FOUND
    assert gpu_state(0).status is Status.LIBRARY_NOT_FOUND


@pytest.mark.parametrize("name", FALLBACKS)
def test_an_older_driver_is_asked_by_the_older_name(name: str) -> None:
    fakes = [FakeNvml(missing=missing) for missing in ((name,), (name, FALLBACKS[name]))]
    older, neither = (read_gpus(fake) for fake in fakes)
    lost = {reading for reading in ("cuda",) if getattr(neither, reading).status is Status.FUNCTION_MISSING}
    lost |= {name for name, one in _readings(neither.gpus[0]).items() if one.status is Status.FUNCTION_MISSING}
    assert len(lost) == 1
    assert all(one.status is Status.OK for one in (older.cuda, *_readings(older.gpus[0]).values()))


def test_a_half_supported_gpu_gives_what_it_has() -> None:
    """A virtual GPU: no link, no counters, no sensors, an old library without the newer names."""
    absent = ("Temperature", "ClockInfo", "PowerUsage", "PcieThroughput", "PcieReplayCounter", "MigMode", "EccMode")
    old = ("nvmlDeviceGetGpuMaxPcieLinkGeneration", "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetNumaNodeId")
    fake = FakeNvml(missing=old, **{f"nvmlDeviceGet{name}": 3 for name in absent})
    fake.field_return = 3
    gpu = read_gpus(fake).gpus[0]
    assert (gpu.memory_free_bytes.value, gpu.pcie_generation.value, gpu.throttle_reasons.value) == (70 << 30, 1, ())
    unsupported = {name for name, one in _readings(gpu).items() if one.status is Status.NOT_SUPPORTED}
    assert unsupported >= {"temperature_c", "pcie_tx_bytes", "pcie_rx_bytes", "pcie_replays", "ecc", "mig"}
    assert gpu.numa_node.status is gpu.gpu_pcie_generation_max.status is Status.FUNCTION_MISSING


def test_a_lost_gpu_has_no_values_and_the_library_is_closed() -> None:
    fake = FakeNvml(nvmlDeviceGetHandleByIndex=15)
    gpu = read_gpus(fake).gpus[0]
    assert {one.status for one in _readings(gpu).values()} == {Status.GPU_LOST} and not fake.is_open
    with pytest.raises(DeviceError, match="GPU lost; reset it"):
        find_gpu(0, read_gpus(fake))


def test_a_gpu_that_is_lost_in_the_middle_keeps_what_was_read() -> None:
    whole = FakeNvml()
    read_gpus(whole)
    for num_calls in range(whole.num_calls - 1):  # without nvmlShutdown
        fake = FakeNvml(lost_after=num_calls)
        readings = read_gpus(fake)
        known = [one for gpu in readings.gpus for one in _readings(gpu).values()]
        lost = [one for one in known if one.status is Status.GPU_LOST]
        assert {one.status for one in known} <= {Status.OK, Status.GPU_LOST} and not fake.is_open
        assert readings.num_gpus.status is Status.GPU_LOST or lost


def test_the_state_says_that_the_gpu_was_lost_wherever_it_happened() -> None:
    whole = FakeNvml()
    assert gpu_state(0, whole).status is Status.OK
    for num_calls in range(1, whole.num_calls - 1):  # without nvmlInit and nvmlShutdown
        assert gpu_state("GPU-0", FakeNvml(lost_after=num_calls)).status is Status.GPU_LOST
    assert gpu_state("GPU-0", FakeNvml(lost_after=1)).uuid == "GPU-0"
    assert gpu_state(0, FakeNvml(nvmlDeviceGetTemperature=16)).status is Status.RESET_REQUIRED


@pytest.mark.parametrize("which", [1, "GPU-1"])
def test_the_state_of_one_gpu(which: int | str) -> None:
    fake = FakeNvml()
    fake.link, fake.reasons, fake.processes["compute"] = (3, 8), 0x20, [99]
    state = gpu_state(which, fake)
    assert (state.uuid, state.status, state.throttle_reasons.value) == ("GPU-1", "ok", ("software thermal slowdown",))
    assert (state.pcie_generation.value, state.pcie_width.value, state.foreign_processes.value) == (3, 8, (99,))
    assert (state.pcie_replays.value, state.temperature_c.value, state.memory_free_bytes.value) == (3, 41, 70 << 30)


def test_the_state_of_a_gpu_that_is_not_there() -> None:
    assert gpu_state("GPU-7", FakeNvml()).status is Status.NOT_FOUND
    assert gpu_state(7, FakeNvml()).status is Status.ERROR


@pytest.mark.parametrize(
    ("mask", "reasons"),
    [
        (0, ()),
        (0x1 | 0x2 | 0x100, ()),
        (0x8 | 0x80, ("hardware slowdown", "power brake")),
        (0x1 | 0x10 | 1 << 40, ("sync boost", "reason 0x10000000000")),
    ],
)
def test_only_what_throttles_is_a_throttle_reason(mask: int, reasons: tuple[str, ...]) -> None:
    assert throttle_reasons(mask) == reasons


def test_processes_of_one_kind_are_better_than_none() -> None:
    fake = FakeNvml(nvmlDeviceGetGraphicsRunningProcesses=3)
    fake.processes["compute"] = [5]
    assert read_gpus(fake).gpus[0].foreign_processes.value == (5,)
    both = FakeNvml(nvmlDeviceGetGraphicsRunningProcesses=3, nvmlDeviceGetComputeRunningProcesses=4)
    assert read_gpus(both).gpus[0].foreign_processes == Reading(None, Status.NO_PERMISSION)


@pytest.mark.parametrize(("text", "node"), [("3\n", 3), ("-1\n", None), ("?", None)])
def test_the_kernel_knows_the_numa_node_where_nvml_does_not(no_pci: Path, text: str, node: int | None) -> None:
    (no_pci / "0000:a0:00.0").mkdir()
    (no_pci / "0000:a0:00.0" / "numa_node").write_text(text)
    assert read_gpus(FakeNvml(nvmlDeviceGetNumaNodeId=3)).gpus[0].numa_node.value == node


def test_memory_falls_back_to_version_1() -> None:
    class Old(FakeNvml):
        def nvmlDeviceGetMemoryInfo(self, handle: int, version: int = 1) -> Any:
            if version != 1:
                raise NVMLError(13)
            return super().nvmlDeviceGetMemoryInfo(handle)

    gpu = read_gpus(Old()).gpus[0]
    assert gpu.memory_total_bytes.value == 80 << 30
    assert gpu.memory_reserved_bytes == Reading(None, Status.NOT_SUPPORTED)


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


@pytest.mark.parametrize("name", [*SOURCES, *FALLBACKS, *FALLBACKS.values(), *HANDLES])
def test_the_fake_has_the_names_of_the_real_binding(name: str) -> None:
    assert hasattr(pytest.importorskip("pynvml"), name)
