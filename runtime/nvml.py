"""NVIDIA's management library, as far as the engine needs it: which GPU a number means.

The only importer of `pynvml` (distribution `nvidia-ml-py`), inside a function: a machine without it runs as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runtime.errors import DeviceError


def binding() -> Any:
    """The module `pynvml`; None where it is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def uuid_of(number: int) -> str:
    """Of the GPU of that number in the driver's order, as nvidia-smi shows it.

    Raises:
        DeviceError: there is none, or nobody knows; says why, and the way out.
    """
    with _started() as nvml:
        count = int(nvml.nvmlDeviceGetCount())
        if not 0 <= number < count:
            raise DeviceError(f"there is no such GPU; NVML sees {f'0 … {count - 1}' if count else 'none'}")
        return str(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(number)))


def number_of(uuid: str) -> int:
    """Inverse of `uuid_of`; raises likewise."""
    with _started() as nvml:
        return int(nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetHandleByUUID(uuid)))


@contextmanager
def _started() -> Iterator[Any]:
    nvml = binding()
    if nvml is None:
        raise DeviceError(f"nvidia-ml-py is not installed; install it, or {_OTHERWISE}")
    try:
        nvml.nvmlInit()
        try:
            yield nvml
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise DeviceError(f"NVML says {error}; {_OTHERWISE}") from error


_OTHERWISE = "name the GPU by torch's number (--device cuda:0)"
