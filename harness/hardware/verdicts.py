"""Whether a link or a disk does what it could: one judgement each, with the evidence."""

from __future__ import annotations

import enum
import os
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.machine import format_bytes

BLOCK_DEVICES = Path("/sys/dev/block")

# Per lane and direction after encoding (8b/10b, 128b/130b, FLIT), by generation of PCIe.
_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
_GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}  # by gigatransfers/s
# Packet headers leave 80 to 87 % of the payload to large copies from pinned memory; another NUMA node or a virtual
# machine costs some of that.
_EXPECTED_SHARE = 0.6
_POSSIBLE_SHARE = 0.98
_MIN_COUNTED = 0.5


class Verdict(enum.StrEnum):
    """What is thought of a link or a disk."""

    OK = "ok"
    DEGRADED_LINK = "degraded link"
    UNDERPERFORMING = "underperforming"
    UNMEASURABLE = "unmeasurable"


@dataclass(frozen=True)
class Judgement:
    """The verdict on `subject`, and the evidence for it."""

    subject: str
    verdict: Verdict
    reason: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"


@dataclass(frozen=True)
class Link:
    """A PCIe link: its generation and its lanes."""

    generation: int
    width: int

    @property
    def bytes_per_s(self) -> float | None:
        """What it can carry in one direction; None for a generation that is not known."""
        lane = _LANE_BYTES_PER_S.get(self.generation)
        return None if lane is None else lane * self.width

    def __str__(self) -> str:
        return f"PCIe {self.generation} x{self.width}"


def judge_link(subject: str, copied_bytes_per_s: float | None, now: Link | None, best: Link | None) -> Judgement:
    """Judge a GPU's link.

    Args:
        copied_bytes_per_s: the best that was measured from pinned memory; None: nothing could be measured.
        now: the link while it was copying. best: what GPU and slot are capable of. None: not told.
    """
    if copied_bytes_per_s is None:
        return Judgement(subject, Verdict.UNMEASURABLE, "no copy from pinned memory could be timed")
    rate = f"{format_bytes(copied_bytes_per_s)}/s"
    if now is None or (possible := now.bytes_per_s) is None:
        why = "its link is not told" if now is None else f"{now} is not known here"
        return Judgement(subject, Verdict.UNMEASURABLE, f"{rate}, but {why}, so there is nothing to hold it against")
    share = copied_bytes_per_s / possible
    if share > _POSSIBLE_SHARE:
        reason = f"{rate} is more than {now} carries ({format_bytes(possible)}/s): that is not the link that copies"
        return Judgement(subject, Verdict.UNMEASURABLE, reason)
    if best is not None and (now.generation < best.generation or now.width < best.width):
        return Judgement(subject, Verdict.DEGRADED_LINK, f"{now} while copying, {best} possible; {rate}")
    reason = f"{rate}, {share:.0%} of what {now} carries"
    if share < _EXPECTED_SHARE:
        return Judgement(subject, Verdict.UNDERPERFORMING, f"{reason}, at least {_EXPECTED_SHARE:.0%} expected")
    return Judgement(subject, Verdict.OK, reason)


def judge_disk(
    subject: str, read_bytes_per_s: float, counted_share: float | None, links: tuple[Link, Link] | None
) -> Judgement:
    """Judge a disk: whether it was one that was measured, and whether its own link is what it could be.

    How fast it should be nobody here knows, so that "underperforming" is never said.

    Args:
        read_bytes_per_s: the best that was measured.
        counted_share: of the bytes read, those that the kernel counted as read from a disk; None: it does not count.
        links: `disk_links` after reading.
    """
    rate = f"{format_bytes(read_bytes_per_s)}/s"
    if counted_share is None:
        reason = f"{rate}, but the kernel does not tell whether that came from a disk or from memory"
        return Judgement(subject, Verdict.UNMEASURABLE, reason)
    if counted_share < _MIN_COUNTED:
        reason = f"{rate}, but {1 - counted_share:.0%} of it did not come from a disk of this machine"
        return Judgement(subject, Verdict.UNMEASURABLE, f"{reason}: files in memory, or over a network")
    if links is None:
        return Judgement(subject, Verdict.OK, f"{rate} read from a disk")
    now, best = links
    if now.generation < best.generation or now.width < best.width:
        return Judgement(subject, Verdict.DEGRADED_LINK, f"{now}, {best} possible; {rate}")
    return Judgement(subject, Verdict.OK, f"{rate} read from a disk behind {now}")


def disk_links(file: Path) -> tuple[Link, Link] | None:
    """The link of the disk that holds `file`, now and at its best; None where it has none or the kernel does not tell.

    Disks in a network, virtual ones and file systems over several disks have none.
    """
    device = file.stat().st_dev
    try:
        folder = (BLOCK_DEVICES / f"{os.major(device)}:{os.minor(device)}").resolve(strict=True)
    except OSError:
        return None
    for parent in (folder, *folder.parents):
        now, best = (_sysfs_link(parent, which) for which in ("current", "max"))
        if now is not None and best is not None:
            return now, best
    return None


def _sysfs_link(folder: Path, which: str) -> Link | None:
    try:
        speed = re.match(r"[\d.]+", (folder / f"{which}_link_speed").read_text())
        width = int((folder / f"{which}_link_width").read_text())
    except (OSError, ValueError):
        return None
    generation = _GENERATIONS.get(float(speed[0])) if speed else None
    return None if generation is None else Link(generation, width)
