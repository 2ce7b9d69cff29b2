"""What NVIDIA's management library says about the GPUs. Every read is optional: a value, or why there is none.

The only importer of `pynvml` (distribution `nvidia-ml-py`), inside a function: a machine without it is measured too.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from runtime.errors import DeviceError

T = TypeVar("T")


class Status(enum.StrEnum):
    """How a read ended."""

    OK = "ok"
    NOT_SUPPORTED = "not supported"
    NO_PERMISSION = "no permission"
    FUNCTION_MISSING = "function missing"
    GPU_LOST = "GPU lost"
    LIBRARY_NOT_FOUND = "library not found"
    DRIVER_NOT_LOADED = "driver not loaded"
    ERROR = "error"


# nvmlReturn_t. A driver older than the binding lacks symbols, which the binding reports as 13.
_STATUS_BY_CODE = {
    3: Status.NOT_SUPPORTED,
    4: Status.NO_PERMISSION,
    9: Status.DRIVER_NOT_LOADED,
    12: Status.LIBRARY_NOT_FOUND,
    13: Status.FUNCTION_MISSING,
    15: Status.GPU_LOST,
}


@dataclass(frozen=True)
class Reading(Generic[T]):
    """A value, or None and the status that says why."""

    value: T | None
    status: Status = Status.OK

    def __str__(self) -> str:
        return str(self.value) if self.status is Status.OK else self.status.value


@dataclass(frozen=True)
class GpuReadings:
    """One GPU. Link generation and width are those of the moment: an idle link trains down."""

    index: int
    name: Reading[str]
    uuid: Reading[str]
    memory_total_bytes: Reading[int]
    memory_free_bytes: Reading[int]
    memory_used_bytes: Reading[int]
    pcie_generation: Reading[int]
    pcie_generation_max: Reading[int]
    pcie_width: Reading[int]
    pcie_width_max: Reading[int]


@dataclass(frozen=True)
class NvmlReadings:
    """The driver and its GPUs, in NVML's order (that of the PCI bus)."""

    num_gpus: Reading[int]
    driver: Reading[str]
    gpus: tuple[GpuReadings, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def read_gpus(binding: Any = None) -> NvmlReadings:
    """Read whatever can be read; never raises for what is missing.

    Args:
        binding: a module like `pynvml`; by default that one.
    """
    binding = _binding() if binding is None else binding
    if binding is None:
        return _without(Status.LIBRARY_NOT_FOUND)
    started = _read(binding, binding.nvmlInit)
    if started.status is not Status.OK:
        return _without(started.status)
    try:
        num_gpus = _read(binding, binding.nvmlDeviceGetCount)
        gpus = tuple(_gpu(binding, index) for index in range(num_gpus.value or 0))
        return NvmlReadings(num_gpus, _text(_read(binding, binding.nvmlSystemGetDriverVersion)), gpus)
    finally:
        _read(binding, binding.nvmlShutdown)


def find_gpu(index: int, readings: NvmlReadings) -> GpuReadings:
    """The GPU that `--gpu index` means.

    Raises:
        DeviceError: NVML is absent, or has no such GPU.
    """
    num_gpus = readings.num_gpus
    if num_gpus.value is None:
        raise DeviceError(f"--gpu {index}: no GPU can be used here: NVML says {num_gpus}; run with --device cpu")
    if not 0 <= index < len(readings.gpus):
        known = f"only 0 … {num_gpus.value - 1}" if num_gpus.value else "no GPU at all"
        raise DeviceError(f"--gpu {index}: there is no such GPU: NVML sees {known}; run with --device cpu")
    return readings.gpus[index]


def _binding() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def _without(status: Status) -> NvmlReadings:
    return NvmlReadings(Reading(None, status), Reading(None, status))


def _read(binding: Any, call: Callable[..., T], *arguments: Any) -> Reading[T]:
    try:
        return Reading(call(*arguments))
    except binding.NVMLError as error:
        return Reading(None, _STATUS_BY_CODE.get(getattr(error, "value", 0), Status.ERROR))


def _gpu(binding: Any, index: int) -> GpuReadings:
    handle = _read(binding, binding.nvmlDeviceGetHandleByIndex, index)

    def read(name: str, *arguments: Any) -> Reading[Any]:
        function = getattr(binding, name, None)
        if handle.status is not Status.OK:
            return Reading(None, handle.status)
        if function is None:
            return Reading(None, Status.FUNCTION_MISSING)
        return _read(binding, function, handle.value, *arguments)

    memory = _memory(binding, read)
    return GpuReadings(
        index=index,
        name=_text(read("nvmlDeviceGetName")),
        uuid=_text(read("nvmlDeviceGetUUID")),
        memory_total_bytes=_field(memory, "total"),
        memory_free_bytes=_field(memory, "free"),
        memory_used_bytes=_field(memory, "used"),
        pcie_generation=read("nvmlDeviceGetCurrPcieLinkGeneration"),
        pcie_generation_max=read("nvmlDeviceGetMaxPcieLinkGeneration"),
        pcie_width=read("nvmlDeviceGetCurrPcieLinkWidth"),
        pcie_width_max=read("nvmlDeviceGetMaxPcieLinkWidth"),
    )


def _memory(binding: Any, read: Callable[..., Reading[Any]]) -> Reading[Any]:
    """Version 2 keeps the driver's own share out of `used`; older drivers have version 1 only."""
    newer = getattr(binding, "nvmlMemory_v2", None)
    reading = read("nvmlDeviceGetMemoryInfo") if newer is None else read("nvmlDeviceGetMemoryInfo", newer)
    missing = reading.status in (Status.FUNCTION_MISSING, Status.NOT_SUPPORTED)
    return read("nvmlDeviceGetMemoryInfo") if missing and newer is not None else reading


def _field(reading: Reading[Any], name: str) -> Reading[int]:
    return Reading(None if reading.value is None else int(getattr(reading.value, name)), reading.status)


def _text(reading: Reading[Any]) -> Reading[str]:
    """Older bindings answer in bytes."""
    value = reading.value
    return Reading(value.decode() if isinstance(value, bytes) else value, reading.status)
