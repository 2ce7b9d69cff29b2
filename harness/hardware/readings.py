"""What can be known of a GPU, as values: each is there, or the reason why not."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class Status(enum.StrEnum):
    """How a read ended."""

    OK = "ok"
    NOT_SUPPORTED = "not supported"
    NO_PERMISSION = "no permission"
    NOT_FOUND = "not found"
    FUNCTION_MISSING = "function missing"
    GPU_LOST = "GPU lost"
    RESET_REQUIRED = "GPU reset required"
    LIBRARY_NOT_FOUND = "library not found"
    DRIVER_NOT_LOADED = "driver not loaded"
    VERSION_MISMATCH = "driver and library versions differ"
    ERROR = "error"


@dataclass(frozen=True)
class Reading(Generic[T]):
    """A value, or None and the status that says why."""

    value: T | None
    status: Status = Status.OK

    def __str__(self) -> str:
        return str(self.value) if self.status is Status.OK else self.status.value


_CLOCK_REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
"""nvmlClocksEventReasons: why the clocks are where they are."""
_NO_THROTTLE = 0x1 | 0x2 | 0x100
"""An idle GPU clocks down by itself; application and display clocks are what somebody set."""


def throttle_reasons(mask: int) -> tuple[str, ...]:
    """What holds the clocks down against the GPU's will, of NVML's mask of reasons; unknown bits by their value."""
    bits = [1 << n for n in range(mask.bit_length()) if mask >> n & 1]
    return tuple(_CLOCK_REASONS.get(bit, f"reason {bit:#x}") for bit in bits if not bit & _NO_THROTTLE)


@dataclass(frozen=True)
class GpuState:
    """What may change in the middle of a run. A link that is idle trains down: compare it while copying only.

    Attributes:
        status: whether the GPU could be asked at all; GPU_LOST where it was lost before or during the reads.
        throttle_reasons: empty while nothing holds the clocks down.
        pcie_replays: how often the link has sent something again since the driver was loaded.
        foreign_processes: other processes that use the GPU, by their number in the host.
    """

    uuid: str | None
    status: Status
    throttle_reasons: Reading[tuple[str, ...]]
    pcie_generation: Reading[int]
    pcie_width: Reading[int]
    pcie_replays: Reading[int]
    temperature_c: Reading[int]
    memory_free_bytes: Reading[int]
    foreign_processes: Reading[tuple[int, ...]]


@dataclass(frozen=True)
class GpuReadings:
    """One GPU. Link generation and width are those of the moment: an idle link trains down.

    Attributes:
        memory_reserved_bytes: kept by driver and firmware; not in `memory_used_bytes` unless this is not supported.
        pcie_generation_max, pcie_width_max: of GPU and slot together. gpu_pcie_generation_max: of the GPU alone.
        pcie_tx_bytes_per_s, pcie_rx_bytes_per_s: over the last 20 ms. pcie_tx_bytes, pcie_rx_bytes: counted so far.
            All seen from the GPU: it receives what is copied to it.
        ecc, mig: whether switched on. numa_node: of the host's memory that is nearest.
    """

    index: int
    name: Reading[str]
    uuid: Reading[str]
    pci_bus_id: Reading[str]
    compute_capability: Reading[str]
    memory_total_bytes: Reading[int]
    memory_free_bytes: Reading[int]
    memory_used_bytes: Reading[int]
    memory_reserved_bytes: Reading[int]
    pcie_generation: Reading[int]
    pcie_generation_max: Reading[int]
    gpu_pcie_generation_max: Reading[int]
    pcie_width: Reading[int]
    pcie_width_max: Reading[int]
    pcie_tx_bytes_per_s: Reading[int]
    pcie_rx_bytes_per_s: Reading[int]
    pcie_tx_bytes: Reading[int]
    pcie_rx_bytes: Reading[int]
    pcie_replays: Reading[int]
    throttle_reasons: Reading[tuple[str, ...]]
    sm_clock_mhz: Reading[int]
    memory_clock_mhz: Reading[int]
    temperature_c: Reading[int]
    power_w: Reading[float]
    power_limit_w: Reading[float]
    ecc: Reading[bool]
    mig: Reading[bool]
    foreign_processes: Reading[tuple[int, ...]]
    numa_node: Reading[int]


@dataclass(frozen=True)
class NvmlReadings:
    """The driver and its GPUs, in NVML's order (that of the PCI bus)."""

    num_gpus: Reading[int]
    driver: Reading[str]
    cuda: Reading[str] = Reading(None, Status.NOT_SUPPORTED)
    gpus: tuple[GpuReadings, ...] = ()
