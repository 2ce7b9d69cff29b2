"""Which device computes: named by the user or the profile, and what it offers."""

from __future__ import annotations

import torch

from runtime import machine
from runtime.errors import DeviceError
from runtime.profile import MachineFacts, Profile

CPU = torch.device("cpu")


def find_device(wanted: str | torch.device | None, profile: Profile) -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1"), else the one that the profile was tuned on, else the CPU.

    Raises:
        DeviceError: it is not there, or nothing of that name computes here.
    """
    if wanted is not None:
        return _named(str(wanted))
    tuned_on = profile.match.device if profile.match is not None else None
    if tuned_on is None or not tuned_on.startswith("cuda"):
        return CPU
    _named("cuda")
    alike = [index for index in range(torch.cuda.device_count()) if _name(index) == tuned_on]
    return torch.device("cuda", alike[0] if alike else 0)


def is_gpu(device: torch.device) -> bool:
    """Whether its memory is not the host's."""
    return device.type != "cpu"


def machine_facts(device: torch.device = CPU) -> MachineFacts:
    """This machine with that device, as profiles match it; the bandwidth is not measured here."""
    if device.type == "cpu":
        return MachineFacts(device="cpu", memory_total_bytes=machine.total_memory_bytes())
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    return MachineFacts(device=_name(device), memory_total_bytes=total_bytes)


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that is free now; what torch keeps for later use counts as free."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _named(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise DeviceError(f"device {name!r} is not one that this runs on; name cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise DeviceError(f"device {name!r}: this torch ({torch.__version__}) sees no GPU; compute on the CPU instead")
    if (device.index or 0) >= count:
        raise DeviceError(f"device {name!r}: torch sees {count} GPUs, numbered from 0")
    return torch.device("cuda", device.index or 0)


def _name(device: torch.device | int) -> str:
    return f"cuda:{torch.cuda.get_device_name(device)}"
