"""A GPU for whole commands on a machine without one: a trial's process that has imported this computes "on cuda:0".

NVML is made up, torch sees one GPU, experts are copied late (`late_streams`), and everything computes on the CPU. What
is asked of the GPU's memory is what was reserved there: slots, by their own size.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from fake_nvml import FakeNvml
from late_streams import LateStreams

from harness import probe
from harness.hardware import cuda_copies
from harness.hardware.compute import measure_experts
from harness.search import child, gpu
from runtime import batching, build, build_tiers, devices, facts, loading, nvml
from runtime.errors import DeviceError
from runtime.transfer.device_slots import DeviceSlots

NAME, DEVICE = "Fake GPU", "cuda:0"
TOTAL_BYTES, CONTEXT_BYTES, BASE_BYTES = 79 << 30, 300 << 20, 20 << 20
CPU = torch.device("cpu")


class Memory:
    """Of the GPU, as this process takes it."""

    reserved_bytes = 0
    is_used = False


class Nvml(FakeNvml):
    """Takes what CUDA takes from what is free, once it was used here."""

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int = 1) -> Any:
        found = super().nvmlDeviceGetMemoryInfo(handle, version)
        found.free -= Memory.reserved_bytes + CONTEXT_BYTES * Memory.is_used
        return found


class Slots(DeviceSlots):
    """Counted as the GPU's."""

    def __init__(self, num_slots: int, slot_bytes: int, device: torch.device) -> None:
        super().__init__(num_slots, slot_bytes, device)
        Memory.reserved_bytes += num_slots * slot_bytes + BASE_BYTES


class Copies:
    """A `CopyDevice` of 10 GB/s."""

    def __init__(self, index: int) -> None: ...

    def allocate(self, memory: object, num_bytes: int) -> None: ...

    def start(self, direction: object, num_bytes: int, num_copies: int, *, under_load: bool) -> None:
        self._seconds = num_copies * (2e-6 + num_bytes / 10e9) * (2.0 if under_load else 1.0)

    def finish(self) -> float:
        return self._seconds

    def is_intact(self, num_bytes: int) -> bool:
        return True

    def close(self) -> None: ...


def _cuda_index(uuid: str | None) -> int:
    """CUDA_VISIBLE_DEVICES hides the other GPU of NVML's two."""
    if uuid != "GPU-0":
        raise DeviceError(f"torch does not see the GPU {uuid}")
    return 0


def _properties(device: object) -> SimpleNamespace:
    return SimpleNamespace(uuid="0", name=NAME, total_memory=TOTAL_BYTES)


def _synchronize(device: object = None) -> None:
    Memory.is_used = True


def _find_device(wanted: object, profile: Any) -> torch.device:
    """The CPU stands for the GPU; what is named otherwise is not there."""
    tuned_on = profile.match.device if profile.match is not None else None
    if wanted == DEVICE or (wanted is None and tuned_on == f"cuda:{NAME}"):
        return CPU
    raise AssertionError(f"{wanted!r} is not the GPU, in a process that has one")


def install() -> None:
    """In this process."""
    nvml.binding = Nvml
    torch.cuda.get_device_properties = _properties  # type: ignore[assignment]
    torch.cuda.get_device_name = lambda device=None: NAME  # type: ignore[assignment]
    torch.cuda.synchronize = _synchronize
    torch.cuda.memory_reserved = torch.cuda.max_memory_reserved = lambda device=None: Memory.reserved_bytes
    build_tiers.CudaStreams, build_tiers.DeviceSlots = LateStreams, Slots  # type: ignore[assignment,misc]
    loading.find_device, facts.free_bytes = _find_device, lambda device: 70 << 30
    for module in (build, loading, facts, devices):
        module.is_gpu = lambda device: True
    batching.current = lambda device: nullcontext()
    cuda_copies.CudaCopies = Copies  # type: ignore[assignment,misc]
    devices.cuda_index = _cuda_index
    gpu._compute = _synchronize
    probe.measure_experts = lambda *of, device="cpu", **options: measure_experts(*of, **options)


if os.environ.get("FAKE_GPU") == "trials":
    install()
else:  # the process that tunes: trials import this as well, and NVML sees the GPU
    os.environ["FAKE_GPU"] = "trials"
    child._PRELOAD.append("fake_gpu")
    nvml.binding = FakeNvml
