"""A stand-in for NVIDIA's binding: two GPUs, and every way in which a read can end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value


def _structure(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**fields)


class FakeNvml:
    """Two GPUs.

    `fail` names functions and the nvmlReturn_t that they end with, `missing` functions that the driver lacks,
    `lost_after` the number of calls after which every GPU is lost. Tests may set `link`, `reasons` and `processes`.
    """

    NVMLError = NVMLError
    nvmlMemory_v2 = 0x2000028

    def __init__(self, *, missing: tuple[str, ...] = (), lost_after: int | None = None, **fail: int) -> None:
        self.fail, self.missing, self.lost_after = fail, missing, lost_after
        self.is_open, self.num_calls = False, 0
        self.memory_versions: list[int] = []
        self.link, self.reasons = (1, 16), 0x1
        self.processes: dict[str, list[int]] = {"compute": [], "graphics": []}
        self.field_return = 0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("nvml") or not callable(found):
            return found

        def call(*arguments: Any) -> Any:
            self.num_calls += 1
            if name in self.missing:
                raise NVMLError(13)
            if name in self.fail:
                raise NVMLError(self.fail[name])
            if self.lost_after is not None and self.num_calls > self.lost_after and name.startswith("nvmlDevice"):
                raise NVMLError(15)
            return found(*arguments)

        return call

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.95.05"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13010

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12000

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index not in (0, 1):
            raise NVMLError(2)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid not in ("GPU-0", "GPU-1"):
            raise NVMLError(6)
        return int(uuid[-1])

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"Fake GPU"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return _structure(busId=f"00000000:{handle + 0xA0:02X}:00.0".encode())

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (9, 0)

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int = 1) -> Any:
        self.memory_versions.append(version)
        sizes = {"total": 80 << 30, "free": 70 << 30, "used": 9 << 30}
        return _structure(**sizes, reserved=1 << 30) if version != 1 else _structure(**sizes)

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: int) -> int:
        return self.link[0]

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:
        return 4

    def nvmlDeviceGetGpuMaxPcieLinkGeneration(self, handle: int) -> int:
        return 5

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: int) -> int:
        return self.link[1]

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: int) -> int:
        return 16

    def nvmlDeviceGetPcieThroughput(self, handle: int, direction: int) -> int:
        return (100, 2500)[direction]

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[int]) -> list[Any]:
        return [
            _structure(fieldId=field, nvmlReturn=self.field_return, value=_structure(ullVal=field << 30))
            for field in fields
        ]

    def nvmlDeviceGetPcieReplayCounter(self, handle: int) -> int:
        return 3

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return self.reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return self.reasons

    def nvmlDeviceGetClockInfo(self, handle: int, which: int) -> int:
        return {1: 1980, 2: 2619}[which]

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 41

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 71_500

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 700_000

    def nvmlDeviceGetPowerManagementLimit(self, handle: int) -> int:
        return 650_000

    def nvmlDeviceGetEccMode(self, handle: int) -> list[int]:
        return [1, 0]

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        return [0, 1]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [_structure(pid=pid) for pid in self.processes["compute"]]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[Any]:
        return [_structure(pid=pid) for pid in self.processes["graphics"]]

    def nvmlDeviceGetNumaNodeId(self, handle: int) -> int:
        return handle
