"""Which NUMA node is near, and memory and processors there."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from runtime import numa
from runtime.transfer.slots import SlotArena


def test_near_a_node_means_on_its_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text(f"{one},4090-4095\n")
    (tmp_path / "node2").mkdir()
    (tmp_path / "node2" / "cpulist").write_text("4090\n")
    monkeypatch.setattr(numa, "NODES", tmp_path)
    assert numa.cpus(1) == {one, *range(4090, 4096)} and numa.cpus(7) == frozenset()
    with numa.near(1):
        assert os.sched_getaffinity(0) == {one}
    for unknown in (2, 7, None):
        with numa.near(unknown):
            assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None), ("what\n", None), (None, None)])
def test_the_node_of_a_gpu_is_that_of_its_pci_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, node: int | None
) -> None:
    monkeypatch.setattr(numa, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(numa, "_pci_bus_id", lambda index: f"0000:A{index}:00.0")
    (tmp_path / "0000:a2:00.0").mkdir()
    if text is not None:
        (tmp_path / "0000:a2:00.0" / "numa_node").write_text(text)
    assert numa.gpu_node(2) == node and numa.gpu_node(3) is None


def test_no_driver_is_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert numa.gpu_node(0) is None


def test_nodes_of_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "NODES", tmp_path)
    for name in ("node0", "node11", "online", "nodeX"):
        (tmp_path / name).mkdir()
    assert numa.nodes() == {0, 11}


def test_memory_prefers_a_node_that_there_is() -> None:
    arena = SlotArena(8, mmap.PAGESIZE)
    if not numa.prefer(arena.address(0), 8 * mmap.PAGESIZE, 0):
        pytest.skip("this kernel does not let memory be placed")
    arena.memory[:] = bytes(8 * mmap.PAGESIZE)
    policy = [line for line in Path("/proc/self/numa_maps").read_text().splitlines() if "prefer:0" in line]
    address = f"{arena.address(0):x}"
    assert any(line.startswith(address) for line in policy), policy
    assert not numa.prefer(arena.address(0), 8 * mmap.PAGESIZE, 999), "no such node"
    assert not numa.prefer(arena.address(0) + 1, mmap.PAGESIZE, 0), "not a page"
