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
        DeviceError: there is none, or nobody knows; says why.
    """
    with _started() as nvml:
        return str(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(number)))


def number_of(uuid: str) -> int:
    """Inverse of `uuid_of`; raises likewise."""
    with _started() as nvml:
        return int(nvml.nvmlDeviceGetIndex(nvml.nvmlDeviceGetHandleByUUID(uuid)))


@contextmanager
def _started() -> Iterator[Any]:
    nvml = binding()
    if nvml is None:
        raise DeviceError("nvidia-ml-py is not installed (pip install nvidia-ml-py)")
    try:
        nvml.nvmlInit()
        try:
            yield nvml
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise DeviceError(f"NVML says {error}") from error
