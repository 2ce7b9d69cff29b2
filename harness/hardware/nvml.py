"""What NVIDIA's management library says about the GPUs. Every read is optional: a value, or why there is none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from harness.hardware.readings import GpuReadings, GpuState, NvmlReadings, Reading, Status, throttle_reasons
from runtime import nvml
from runtime.errors import DeviceError

T = TypeVar("T")
V = TypeVar("V")

PCI_DEVICES = Path("/sys/bus/pci/devices")

# nvmlReturn_t. A driver older than the binding lacks symbols, which the binding reports as 13.
_STATUS_BY_CODE = {
    3: Status.NOT_SUPPORTED,
    4: Status.NO_PERMISSION,
    6: Status.NOT_FOUND,
    9: Status.DRIVER_NOT_LOADED,
    12: Status.LIBRARY_NOT_FOUND,
    13: Status.FUNCTION_MISSING,
    15: Status.GPU_LOST,
    16: Status.RESET_REQUIRED,
    18: Status.VERSION_MISMATCH,
}
_GONE = (Status.GPU_LOST, Status.RESET_REQUIRED)
# Fields of nvmlDeviceGetFieldValues, and clocks, sensors and directions of other calls.
_COUNT_TX_BYTES, _COUNT_RX_BYTES = 197, 198
_SM, _MEMORY, _GPU_SENSOR, _TX, _RX = 1, 2, 0, 0, 1


def read_gpus(binding: Any = None) -> NvmlReadings:
    """Read whatever can be read; never raises for what is missing.

    Args:
        binding: a module like `pynvml`; by default that one.
    """
    with _opened(binding) as (binding, status):
        if status is not Status.OK:
            missing: Reading[Any] = Reading(None, status)
            return NvmlReadings(missing, missing, missing)
        num_gpus = _call(binding, "nvmlDeviceGetCount")
        cuda = _first(binding, "nvmlSystemGetCudaDriverVersion_v2", "nvmlSystemGetCudaDriverVersion")
        return NvmlReadings(
            num_gpus,
            _text(_call(binding, "nvmlSystemGetDriverVersion")),
            _map(cuda, lambda version: f"{version // 1000}.{version % 1000 // 10}"),
            tuple(_readings(binding, index) for index in range(num_gpus.value or 0)),
        )


def gpu_state(gpu: int | str, binding: Any = None) -> GpuState:
    """What may change while a GPU works, in a few milliseconds; never raises for what is missing.

    In a container NVML may give the host's process numbers, so that this process seems a foreign one once it uses the
    GPU: compare with a state from before.

    Args:
        gpu: NVML's index, or the UUID.
        binding: as in `read_gpus`.
    """
    with _opened(binding) as (binding, status):
        if status is not Status.OK:
            return _unknown_state(gpu, status)
        return _state(binding, gpu)


def find_gpu(index: int, readings: NvmlReadings) -> GpuReadings:
    """The GPU that `--gpu index` means: NVML's order, that of the PCI bus, whatever CUDA_VISIBLE_DEVICES says.

    Raises:
        DeviceError: NVML is absent, or has no such GPU, or the GPU is lost.
    """
    num_gpus = readings.num_gpus
    if num_gpus.value is None:
        raise DeviceError(f"--gpu {index}: no GPU can be used here: NVML says {num_gpus}; run with --device cpu")
    if not 0 <= index < len(readings.gpus):
        known = f"only 0 … {num_gpus.value - 1}" if num_gpus.value else "no GPU at all"
        raise DeviceError(f"--gpu {index}: there is no such GPU: NVML sees {known}; run with --device cpu")
    gpu = readings.gpus[index]
    if gpu.uuid.status in _GONE:
        raise DeviceError(f"--gpu {index}: NVML says {gpu.uuid}; reset it or restart the machine, or take another GPU")
    return gpu


@contextmanager
def _opened(binding: Any) -> Iterator[tuple[Any, Status]]:
    """The binding, initialised, and how that went."""
    binding = nvml.binding() if binding is None else binding
    if binding is None:
        yield None, Status.LIBRARY_NOT_FOUND
        return
    started = _call(binding, "nvmlInit")
    try:
        yield binding, started.status
    finally:
        if started.status is Status.OK:
            _call(binding, "nvmlShutdown")


def _call(binding: Any, name: str, *arguments: Any) -> Reading[Any]:
    function = getattr(binding, name, None)
    if function is None:
        return Reading(None, Status.FUNCTION_MISSING)
    try:
        return Reading(function(*arguments))
    except binding.NVMLError as error:
        return Reading(None, _status(getattr(error, "value", 0)))


def _status(code: int) -> Status:
    return _STATUS_BY_CODE.get(code, Status.ERROR)


def _first(binding: Any, *names: str, arguments: tuple[Any, ...] = ()) -> Reading[Any]:
    """The first of several functions that driver and GPU have."""
    for name in names[:-1]:
        reading = _call(binding, name, *arguments)
        if reading.status not in (Status.FUNCTION_MISSING, Status.NOT_SUPPORTED):
            return reading
    return _call(binding, names[-1], *arguments)


@dataclass(frozen=True)
class _Gpu:
    """The reads of one GPU; all of them end with the status of its handle where that is not to be had."""

    binding: Any
    handle: Reading[Any]

    def read(self, *names: str, arguments: tuple[Any, ...] = ()) -> Reading[Any]:
        """The first of `names` that there is."""
        if self.handle.status is not Status.OK:
            return Reading(None, self.handle.status)
        return _first(self.binding, *names, arguments=(self.handle.value, *arguments))

    def clock_mhz(self, which: int) -> Reading[int]:
        return self.read("nvmlDeviceGetClockInfo", arguments=(which,))

    def temperature_c(self) -> Reading[int]:
        return self.read("nvmlDeviceGetTemperature", arguments=(_GPU_SENSOR,))

    def watts(self, *names: str) -> Reading[float]:
        return _map(self.read(*names), lambda milliwatts: milliwatts / 1000)

    def mode(self, name: str) -> Reading[bool]:
        """A switch of which NVML gives the current and the pending position."""
        return _map(self.read(name), lambda positions: bool(positions[0]))

    def memory(self) -> Reading[Any]:
        """Version 2 keeps the driver's own share out of `used`; older drivers have version 1 only."""
        newer = getattr(self.binding, "nvmlMemory_v2", None)
        reading = self.read("nvmlDeviceGetMemoryInfo", arguments=() if newer is None else (newer,))
        missing = reading.status in (Status.FUNCTION_MISSING, Status.NOT_SUPPORTED)
        return self.read("nvmlDeviceGetMemoryInfo") if missing and newer is not None else reading

    def throughput(self, direction: int) -> Reading[int]:
        reading = self.read("nvmlDeviceGetPcieThroughput", arguments=(direction,))
        return _map(reading, lambda kilobytes: kilobytes * 1000)

    def counter(self, field: int) -> Reading[int]:
        """A 64-bit field, which has a status of its own beside that of the call."""
        reading = self.read("nvmlDeviceGetFieldValues", arguments=([field],))
        if reading.value is not None and reading.value[0].nvmlReturn != 0:
            return Reading(None, _status(reading.value[0].nvmlReturn))
        return _map(reading, lambda values: int(values[0].value.ullVal))

    def throttle_reasons(self) -> Reading[tuple[str, ...]]:
        names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        return _map(self.read(*names), throttle_reasons)

    def foreign_processes(self) -> Reading[tuple[int, ...]]:
        """Numbers of the processes that compute or draw, this one left out. What cannot be told of one kind is left."""
        kinds = [self.read(f"nvmlDeviceGet{kind}RunningProcesses") for kind in ("Compute", "Graphics")]
        known = [kind.value for kind in kinds if kind.value is not None]
        gone = [kind.status for kind in kinds if kind.status in _GONE]
        if gone or not known:
            return Reading(None, (gone or [kinds[0].status])[0])
        pids = {int(process.pid) for processes in known for process in processes}
        return Reading(tuple(sorted(pids - {os.getpid()})))

    def pci_bus_id(self) -> Reading[str]:
        reading = self.read("nvmlDeviceGetPciInfo")
        return _text(_map(reading, lambda info: info.busId))

    def numa_node(self) -> Reading[int]:
        """NVML's, else the kernel's; a virtual machine often says -1, which is not known."""
        reading = self.read("nvmlDeviceGetNumaNodeId")
        if reading.value is not None and reading.value >= 0:
            return reading
        try:
            node = int((PCI_DEVICES / _sysfs_name(self.pci_bus_id().value or "") / "numa_node").read_text())
        except (OSError, ValueError):
            return Reading(None, reading.status if reading.value is None else Status.NOT_SUPPORTED)
        return Reading(node) if node >= 0 else Reading(None, Status.NOT_SUPPORTED)


def _readings(binding: Any, index: int) -> GpuReadings:
    gpu = _Gpu(binding, _call(binding, "nvmlDeviceGetHandleByIndex", index))
    memory = gpu.memory()
    capability = gpu.read("nvmlDeviceGetCudaComputeCapability")
    return GpuReadings(
        index=index,
        name=_text(gpu.read("nvmlDeviceGetName")),
        uuid=_text(gpu.read("nvmlDeviceGetUUID")),
        pci_bus_id=gpu.pci_bus_id(),
        compute_capability=_map(capability, lambda version: f"{version[0]}.{version[1]}"),
        memory_total_bytes=_field(memory, "total"),
        memory_free_bytes=_field(memory, "free"),
        memory_used_bytes=_field(memory, "used"),
        memory_reserved_bytes=_field(memory, "reserved"),
        pcie_generation=gpu.read("nvmlDeviceGetCurrPcieLinkGeneration"),
        pcie_generation_max=gpu.read("nvmlDeviceGetMaxPcieLinkGeneration"),
        gpu_pcie_generation_max=gpu.read("nvmlDeviceGetGpuMaxPcieLinkGeneration"),
        pcie_width=gpu.read("nvmlDeviceGetCurrPcieLinkWidth"),
        pcie_width_max=gpu.read("nvmlDeviceGetMaxPcieLinkWidth"),
        pcie_tx_bytes_per_s=gpu.throughput(_TX),
        pcie_rx_bytes_per_s=gpu.throughput(_RX),
        pcie_tx_bytes=gpu.counter(_COUNT_TX_BYTES),
        pcie_rx_bytes=gpu.counter(_COUNT_RX_BYTES),
        pcie_replays=gpu.read("nvmlDeviceGetPcieReplayCounter"),
        throttle_reasons=gpu.throttle_reasons(),
        sm_clock_mhz=gpu.clock_mhz(_SM),
        memory_clock_mhz=gpu.clock_mhz(_MEMORY),
        temperature_c=gpu.temperature_c(),
        power_w=gpu.watts("nvmlDeviceGetPowerUsage"),
        power_limit_w=gpu.watts("nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPowerManagementLimit"),
        ecc=gpu.mode("nvmlDeviceGetEccMode"),
        mig=gpu.mode("nvmlDeviceGetMigMode"),
        foreign_processes=gpu.foreign_processes(),
        numa_node=gpu.numa_node(),
    )


def _state(binding: Any, which: int | str) -> GpuState:
    by = "nvmlDeviceGetHandleByIndex" if isinstance(which, int) else "nvmlDeviceGetHandleByUUID"
    gpu = _Gpu(binding, _call(binding, by, which))
    uuid = _text(gpu.read("nvmlDeviceGetUUID"))
    reads: dict[str, Reading[Any]] = {
        "throttle_reasons": gpu.throttle_reasons(),
        "pcie_generation": gpu.read("nvmlDeviceGetCurrPcieLinkGeneration"),
        "pcie_width": gpu.read("nvmlDeviceGetCurrPcieLinkWidth"),
        "pcie_replays": gpu.read("nvmlDeviceGetPcieReplayCounter"),
        "temperature_c": gpu.temperature_c(),
        "memory_free_bytes": _field(gpu.memory(), "free"),
        "foreign_processes": gpu.foreign_processes(),
    }
    gone = [one.status for one in (gpu.handle, uuid, *reads.values()) if one.status in _GONE]
    known = which if isinstance(which, str) else None
    return GpuState(uuid.value or known, gone[0] if gone else gpu.handle.status, **reads)


def _unknown_state(which: int | str, status: Status) -> GpuState:
    missing: Reading[Any] = Reading(None, status)
    uuid = which if isinstance(which, str) else None
    return GpuState(uuid, status, missing, missing, missing, missing, missing, missing, missing)


def _map(reading: Reading[T], convert: Callable[[T], V]) -> Reading[V]:
    return Reading(None if reading.value is None else convert(reading.value), reading.status)


def _field(reading: Reading[Any], name: str) -> Reading[int]:
    """Of a structure, which in its first version lacks some fields."""
    if reading.value is not None and not hasattr(reading.value, name):
        return Reading(None, Status.NOT_SUPPORTED)
    return _map(reading, lambda value: int(getattr(value, name)))


def _text(reading: Reading[Any]) -> Reading[str]:
    """Older bindings answer in bytes."""
    return _map(reading, lambda value: value.decode() if isinstance(value, bytes) else str(value))


def _sysfs_name(bus_id: str) -> str:
    """NVML's 00000000:17:00.0 as the kernel writes it: 0000:17:00.0."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:]}:{rest}"
