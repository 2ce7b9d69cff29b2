"""What is said of links and disks, and by which evidence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.hardware import verdicts
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
