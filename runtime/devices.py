"""Which device computes: named by the user or the profile, and what it offers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from runtime import nvml
from runtime.errors import DeviceError
from runtime.profile import MachineFacts, Profile, machine_facts
from runtime.vocabulary import Pass

CPU = torch.device("cpu")


def find_device(wanted: str | torch.device | None, profile: Profile) -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1"), else a GPU if the profile was tuned on one and there is one,
    else the CPU. Whether the profile fits it is for `match_profile` to say.

    Raises:
        DeviceError: what was named is not there, or nothing of that name computes here.
    """
    if wanted is not None:
        return _named(str(wanted))
    if profile.gpu is None or not _num_gpus():
        return CPU
    alike = [index for index in range(torch.cuda.device_count()) if _name(index) == profile.gpu]
    return torch.device("cuda", alike[0] if alike else 0)


def numbered_gpu(number: int) -> torch.device:
    """The GPU of that number in the driver's order, as nvidia-smi shows it.

    torch has an order of its own, and sees only what CUDA_VISIBLE_DEVICES leaves.

    Raises:
        DeviceError: there is none, or torch does not see it.
    """
    if not _num_gpus():
        raise DeviceError(f"--gpu {number}: {_no_gpu()}")
    try:
        return torch.device("cuda", cuda_index(nvml.uuid_of(number)))
    except DeviceError as error:
        raise DeviceError(f"--gpu {number}: {error}") from error


def cuda_index(uuid: str | None) -> int:
    """The number that torch gives the GPU of that UUID of NVML's: CUDA orders and hides GPUs by its own rules.

    Raises:
        DeviceError: torch sees no GPU, or not this one.
    """
    count = _num_gpus()
    if not count:
        raise DeviceError(_no_gpu())
    seen = [_uuid(index) for index in range(count)]
    if uuid not in seen:
        raise DeviceError(
            f"torch does not see the GPU {uuid}; check CUDA_VISIBLE_DEVICES, name a part of a GPU (MIG) by torch's "
            f"number (--device cuda:0), or {_ON_THE_CPU}"
        )
    return seen.index(uuid)


def gpu_number(device: torch.device) -> int | None:
    """What `--gpu` calls a GPU; torch's number where the driver does not say. None for the CPU."""
    if not is_gpu(device):
        return None
    try:
        return nvml.number_of(_uuid(device))
    except DeviceError:
        return device.index


def is_gpu(device: torch.device) -> bool:
    """Whether its memory is not the host's."""
    return device.type != "cpu"


def device_facts(device: torch.device) -> MachineFacts:
    """This machine with that device, as profiles match it; the bandwidth is not measured here."""
    if not is_gpu(device):
        return machine_facts()
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    return replace(machine_facts(), device=_name(device), memory_total_bytes=total_bytes)


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that is free now; what torch keeps for later use counts as free."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_bytes(device: torch.device) -> int:
    """Most memory of a GPU that tensors of this process took at once, since its start or
    `torch.cuda.reset_peak_memory_stats`; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if is_gpu(device) else 0


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within it, what names no GPU means this one."""
    return torch.cuda.device(device) if is_gpu(device) else nullcontext()


def finish(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given, on whichever stream."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def in_turn(device: torch.device) -> Callable[[Pass], None]:
    """Called as each pass begins: a GPU then finishes the one before first, should that be another thread's on a stream
    of its own. Expert slots are shared, and loads are ordered against one compute stream at a time."""
    last = torch.cuda.current_stream(device)

    def begin(passing: Pass) -> None:
        nonlocal last
        current = torch.cuda.current_stream(device)
        if current != last:
            current.wait_stream(last)
            last = current

    return begin


def _named(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise DeviceError(f"device {name!r} is not one that this runs on; name cpu, cuda or cuda:N")
    count = _num_gpus()
    if not count:
        raise DeviceError(f"device {name!r}: {_no_gpu()}")
    if (device.index or 0) >= count:
        raise DeviceError(f"device {name!r}: there is no such GPU; the last one that torch sees is cuda:{count - 1}")
    return torch.device("cuda", device.index or 0)


def _uuid(device: torch.device | int) -> str:
    """As NVML writes it."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _no_gpu() -> str:
    way_out = "check the driver and CUDA_VISIBLE_DEVICES" if torch.backends.cuda.is_built() else "install one with CUDA"
    return f"this torch ({torch.__version__}) sees no GPU; {way_out}, or {_ON_THE_CPU}"


_ON_THE_CPU = "compute on the CPU (--device cpu)"


def _num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _name(device: torch.device | int) -> str:
    return f"cuda:{torch.cuda.get_device_name(device)}"
