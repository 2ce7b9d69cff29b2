"""A memory limit for one process: a memory cgroup of its own, version 1 or 2. Standard library only.

The group is made below the one that this process is in, so every limit that already applies goes on applying. Only what
a process allocates, or brings into the page cache, after it joined is charged: join before importing anything large.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "expertflow-"


class CgroupUnavailable(Exception):
    """No memory cgroup can be made here; the message says why."""


@dataclass(frozen=True)
class MemoryCgroup:
    """A memory cgroup that this process made. `limit` and `peak` count page cache as well as anonymous memory."""

    path: Path
    version: int

    @property
    def limit_bytes(self) -> int | None:
        """The limit; None for no limit."""
        text = self._file("limit").read_text().strip()
        return None if text == "max" or int(text) >= 1 << 60 else int(text)

    @property
    def peak_bytes(self) -> int | None:
        """Most memory charged since the group was made; None where the kernel does not say."""
        try:
            return int(self._file("peak").read_text())
        except OSError:
            return None

    @property
    def num_oom_kills(self) -> int:
        """Processes of the group that the kernel killed because the limit was reached."""
        lines = self._file("events").read_text().split("\n")
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

    def set_limit(self, limit_bytes: int | None) -> None:
        """Limit the group's memory and leave it no swap."""
        unlimited = "-1" if self.version == 1 else "max"
        self._file("limit").write_text(unlimited if limit_bytes is None else str(limit_bytes))
        swap = {1: ("memory.memsw.limit_in_bytes", limit_bytes), 2: ("memory.swap.max", 0)}[self.version]
        if limit_bytes is not None and (self.path / swap[0]).exists():
            (self.path / swap[0]).write_text(str(swap[1]))

    def remove(self, timeout_s: float = 5.0) -> None:
        """Remove the group, whose processes must have ended; waits a moment for the kernel to notice."""
        end = time.monotonic() + timeout_s
        while self.path.exists():
            try:
                self.path.rmdir()
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def _file(self, what: str) -> Path:
        names = {
            "limit": ("memory.limit_in_bytes", "memory.max"),
            "peak": ("memory.max_usage_in_bytes", "memory.peak"),
            "events": ("memory.oom_control", "memory.events"),
        }
        return self.path / names[what][self.version - 1]


def join(path: str | Path) -> None:
    """Put this process into the cgroup at `path`; everything it allocates from now on is charged there."""
    (Path(path) / "cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def memory_cgroup(name: str, limit_bytes: int | None) -> Iterator[MemoryCgroup]:
    """A memory cgroup for the time of a `with` block. Its processes must have ended when the block does.

    Raises:
        CgroupUnavailable: none can be made: not permitted, no memory controller, or not Linux.
    """
    group = _create(f"{_PREFIX}{os.getpid()}-{name}")
    try:
        group.set_limit(limit_bytes)
        yield group
    finally:
        group.remove()


def unavailable_reason() -> str | None:
    """Why no memory cgroup can be made here; None when one can."""
    try:
        with memory_cgroup("probe", 64 << 20):
            return None
    except (CgroupUnavailable, OSError) as error:
        return str(error)


def _create(name: str) -> MemoryCgroup:
    reasons = []
    for version, parent in _parents():
        try:
            if version == 2:
                _delegate_memory(parent)
            (parent / name).mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        _remove_stale(parent)
        return MemoryCgroup(parent / name, version)
    raise CgroupUnavailable("; ".join(reasons[:2]) or "no memory cgroup controller is mounted")


def _parents() -> Iterator[tuple[int, Path]]:
    """(version, folder) where a group could be made: from this process's own group up to the mount."""
    for version, mount in _mounts():
        own = mount / _own_path(version).lstrip("/")
        folder = own if own.is_dir() else mount  # a container may see its own group as the mount's root
        yield version, folder
        while folder != mount:
            folder = folder.parent
            yield version, folder


def _mounts() -> list[tuple[int, Path]]:
    """Where the memory controller is mounted; v1 first, since a v2 mount beside it lacks the controller."""
    try:
        lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return []
    first = [(1, Path(f[1])) for f in lines if f[2] == "cgroup" and "memory" in f[3].split(",")]
    return first + [(2, Path(f[1])) for f in lines if f[2] == "cgroup2"]


def _own_path(version: int) -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if (version == 1 and "memory" in controllers.split(",")) or (version == 2 and number == "0"):
            return path
    return "/"


def _delegate_memory(parent: Path) -> None:
    """v2: children of `parent` have a memory controller only when its `subtree_control` says so."""
    control = parent / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        control.write_text("+memory")


def _remove_stale(parent: Path) -> None:
    """Groups of processes that were killed before they could clean up."""
    for folder in parent.glob(f"{_PREFIX}*"):
        owner = folder.name.removeprefix(_PREFIX).split("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()
