"""What is said of links, disks and the host's memory, and by which evidence."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from harness.hardware import host, verdicts
from harness.hardware.host import host_memory, near, numa_cpus
from harness.hardware.verdicts import Link, Verdict, disk_links, judge_disk, judge_link

GEN4, GEN3, GEN4_X8 = Link(4, 16), Link(3, 16), Link(4, 8)


@pytest.mark.parametrize(
    ("bytes_per_s", "now", "best", "verdict", "reason"),
    [
        (26e9, GEN4, GEN4, Verdict.OK, "26.0 GB/s, 83% of what PCIe 4 x16 carries"),
        (26e9, GEN4, None, Verdict.OK, "83%"),
        (12e9, GEN3, GEN4, Verdict.DEGRADED_LINK, "PCIe 3 x16 while copying, PCIe 4 x16 possible"),
        (13e9, GEN4_X8, GEN4, Verdict.DEGRADED_LINK, "PCIe 4 x8 while copying"),
        (15e9, GEN4, GEN4, Verdict.UNDERPERFORMING, "48% of what PCIe 4 x16 carries, at least 60%"),
        (None, GEN4, GEN4, Verdict.UNMEASURABLE, "no copy"),
        (26e9, None, GEN4, Verdict.UNMEASURABLE, "its link is not told"),
        (26e9, Link(9, 16), GEN4, Verdict.UNMEASURABLE, "PCIe 9 x16 is not known"),
        (400e9, GEN4, GEN4, Verdict.UNMEASURABLE, "more than PCIe 4 x16 carries"),
    ],
)
def test_a_link_is_judged(
    bytes_per_s: float | None, now: Link | None, best: Link | None, verdict: Verdict, reason: str
) -> None:
    judgement = judge_link("link", bytes_per_s, now, best)
    assert judgement.verdict is verdict and reason in judgement.reason


@pytest.mark.parametrize(
    ("counted", "links", "verdict", "reason"),
    [
        (1.1, None, Verdict.OK, "3.00 GB/s read from a disk"),
        (1.0, (Link(4, 4), Link(4, 4)), Verdict.OK, "behind PCIe 4 x4"),
        (1.0, (Link(3, 4), Link(4, 4)), Verdict.DEGRADED_LINK, "PCIe 3 x4, PCIe 4 x4 possible"),
        (0.0, None, Verdict.UNMEASURABLE, "100% of it did not come from a disk"),
        (None, None, Verdict.UNMEASURABLE, "the kernel does not tell"),
    ],
)
def test_a_disk_is_judged(
    counted: float | None, links: tuple[Link, Link] | None, verdict: Verdict, reason: str
) -> None:
    judgement = judge_disk("disk", 3e9, counted, links)
    assert judgement.verdict is verdict and reason in judgement.reason


def test_the_link_of_a_disk_is_that_of_the_device_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for an NVMe disk: the block device lies below the PCI device that has the link."""
    pci, device = tmp_path / "0000:01:00.0", tmp_path.stat().st_dev
    block = pci / "nvme" / "nvme0" / "nvme0n1"
    block.mkdir(parents=True)
    monkeypatch.setattr(verdicts, "BLOCK_DEVICES", tmp_path)
    assert disk_links(tmp_path) is None
    (tmp_path / f"{os.major(device)}:{os.minor(device)}").symlink_to(block)
    assert disk_links(tmp_path) is None
    for name, text in {"current_link_speed": "8.0 GT/s PCIe", "max_link_speed": "16.0 GT/s PCIe"}.items():
        (pci / name).write_text(f"{text}\n")
    for name in ("current_link_width", "max_link_width"):
        (pci / name).write_text("4\n")
    assert disk_links(tmp_path) == (Link(3, 4), Link(4, 4))
    (pci / "current_link_speed").write_text("Unknown\n")
    assert disk_links(tmp_path) is None


GIB = 1 << 30


@pytest.mark.parametrize(
    ("limit", "may_lock", "memlock", "pinnable"),
    [
        (resource.RLIM_INFINITY, False, None, 22 * GIB),
        (8 << 20, False, 8 << 20, 8 << 20),
        (8 << 20, True, None, 22 * GIB),
        (64 * GIB, False, 64 * GIB, 22 * GIB),
    ],
)
def test_what_can_be_pinned_is_the_smaller_limit(
    monkeypatch: pytest.MonkeyPatch, limit: int, may_lock: bool, memlock: int | None, pinnable: int
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (limit, limit))
    monkeypatch.setattr(host, "_may_lock", lambda: may_lock)
    monkeypatch.setattr("runtime.machine.total_memory_bytes", lambda: 80 * GIB)
    monkeypatch.setattr("runtime.machine.available_memory_bytes", lambda: 30 * GIB)
    memory = host_memory()
    assert (memory.memlock_bytes, memory.pinnable_bytes) == (memlock, pinnable)


@pytest.mark.parametrize(("capabilities", "may_lock"), [("0000000000004000", True), ("00000000a80425fb", False)])
def test_the_capability_lifts_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capabilities: str, may_lock: bool
) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text(f"Name:\tx\nCapEff:\t{capabilities}\n")
    monkeypatch.setattr("runtime.machine.PROC", tmp_path)
    assert host._may_lock() is may_lock


def test_memory_of_this_machine_is_consistent() -> None:
    memory = host_memory()
    assert 0 <= memory.pinnable_bytes < memory.available_bytes <= memory.total_bytes


def test_near_a_node_means_on_its_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text(f"{one},4090-4095\n")
    (tmp_path / "node2").mkdir()
    (tmp_path / "node2" / "cpulist").write_text("4090\n")
    monkeypatch.setattr(host, "NODES", tmp_path)
    assert numa_cpus(1) == {one, *range(4090, 4096)} and numa_cpus(7) == frozenset()
    with near(1):
        assert os.sched_getaffinity(0) == {one}
    for unknown in (2, 7, None):
        with near(unknown):
            assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before
