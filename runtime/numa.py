"""NUMA: which node of the host's memory and processors is near a GPU, and how memory is placed there."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NODES = Path("/sys/devices/system/node")
PCI_DEVICES = Path("/sys/bus/pci/devices")
_MBIND = {"x86_64": 237, "aarch64": 235}  # numbers of the system call
_MPOL_PREFERRED = 1  # mempolicy.h: elsewhere where the node is full
_LONG_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


def nodes() -> frozenset[int]:
    """Nodes of this machine; empty where the kernel does not tell."""
    return frozenset(int(folder.name[4:]) for folder in NODES.glob("node[0-9]*"))


def gpu_node(index: int) -> int | None:
    """The node that a GPU is attached to, by its number in CUDA; None: not known, as in many virtual machines."""
    try:
        bus_id = _pci_bus_id(index)
        node = int((PCI_DEVICES / bus_id.lower() / "numa_node").read_text())
    except (OSError, ValueError, AttributeError):
        return None
    return node if node >= 0 else None


def prefer(address: int, num_bytes: int, node: int) -> bool:
    """Have the pages of a mapping come from `node` when they are first touched, as long as it has some; False where the
    kernel refuses.

    Args:
        address: a multiple of the page size.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return False
    words = node // _LONG_BITS + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // _LONG_BITS] = 1 << node % _LONG_BITS
    # The kernel reads one bit less than it is told of.
    arguments = (address, num_bytes, _MPOL_PREFERRED, ctypes.addressof(mask), words * _LONG_BITS + 1, 0)
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    return bool(syscall(ctypes.c_long(number), *map(ctypes.c_ulong, arguments)) == 0)


def cpus(node: int) -> frozenset[int]:
    """Processors of a node; empty where the kernel does not tell."""
    try:
        spans = (NODES / f"node{node}" / "cpulist").read_text().strip().split(",")
    except OSError:
        return frozenset()
    found = set[int]()
    for span in filter(None, spans):
        first, _, last = span.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


@contextmanager
def near(node: int | None) -> Iterator[None]:
    """Run on the processors of a node, so that memory touched first meanwhile lies there.

    No effect where the node is not known or none of its processors may be used.
    """
    before = os.sched_getaffinity(0)
    wanted = before & cpus(node) if node is not None else set()
    if wanted:
        os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _pci_bus_id(index: int) -> str:
    """Such as "0000:a0:00.0". Raises OSError: there is no driver, or no such GPU."""
    driver, device, name = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.create_string_buffer(32)
    error = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index)
    error = error or driver.cuDeviceGetPCIBusId(name, len(name), device)
    if error:
        raise OSError(f"CUDA error {error}: no PCI bus id of GPU {index}")
    return name.value.decode()
