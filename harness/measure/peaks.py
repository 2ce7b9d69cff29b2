"""The most memory that this process has taken: of the host, or of the GPU that it computes on."""

from __future__ import annotations

from typing import Protocol

from runtime import machine


class Peak(Protocol):
    """Made before anything is loaded; `settle` is called once a first request has been computed."""

    def settle(self) -> None:
        """Everything is there that stays."""

    def num_bytes(self) -> int:
        """The peak so far."""


def peak_on(device: str | None) -> Peak:
    """Of this process from now on; `device` is what torch calls the one that computes, None: the CPU."""
    return HostPeak() if device in (None, "cpu") else GpuPeak(device)


class HostPeak:
    """Resident memory."""

    def __init__(self) -> None:
        machine.reset_peak()

    def settle(self) -> None:
        """Nothing: the kernel counts everything."""

    def num_bytes(self) -> int:
        """See `Peak.num_bytes`."""
        return machine.peak_resident_bytes()


class GpuPeak:
    """The most that torch has reserved of a GPU, and what CUDA takes beside it: its context, libraries, their kernels.

    Those are not in torch's counters. They are what the whole GPU has less free at `settle` than before this process
    began to use it, by NVML, less what torch holds then: another process that takes memory between the two is counted
    with them, and what is loaded later is not. 0 where NVML cannot be asked.

    Attributes:
        free_bytes: of the GPU before this process used it; None where NVML does not tell.
        outside_bytes: what CUDA takes beside torch's memory; 0 before `settle`.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        # Asking for properties makes no context on the GPU.
        self._uuid = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
        self.free_bytes = self._free_bytes()
        self.outside_bytes = 0

    def settle(self) -> None:
        """See `Peak.settle`."""
        import torch

        torch.cuda.synchronize(self._device)
        free_bytes = self._free_bytes()
        if self.free_bytes is not None and free_bytes is not None:
            held_bytes = torch.cuda.memory_reserved(self._device)
            self.outside_bytes = max(0, self.free_bytes - free_bytes - held_bytes)

    def num_bytes(self) -> int:
        """See `Peak.num_bytes`."""
        import torch

        return torch.cuda.max_memory_reserved(self._device) + self.outside_bytes

    def _free_bytes(self) -> int | None:
        from harness.hardware.nvml import gpu_state

        return gpu_state(self._uuid).memory_free_bytes.value
