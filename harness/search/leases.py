"""Who runs a trial, and for how long nobody else may.

Several workers share a study. A trial that runs carries the lease of its worker, one that is about to run a claim; both
are dead when the worker's process is gone, as far as that can be seen from here, or when their time is up.
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.hardware.counters import process_fields


@dataclass(frozen=True)
class Worker:
    """A process that searches.

    Attributes:
        name: unique. host: where `pid` is a process: the machine since its boot, and the container.
        started: clock ticks between that boot and the start of the process, which tells it from a later one with the
            same number; 0 where that cannot be known.
    """

    name: str
    host: str
    pid: int
    started: int

    @classmethod
    def here(cls) -> Worker:
        """This process, under a new name."""
        return cls(uuid.uuid4().hex[:12], _host(), os.getpid(), _started(os.getpid()))

    def lease(self, duration_s: float) -> dict[str, Any]:
        """For JSON: that the worker has a trial from now on."""
        return {**asdict(self), "until": time.time() + duration_s}


def worker_of(attributes: Mapping[str, Any]) -> str:
    """Name of the worker that has the trial of these attributes; empty: nobody yet."""
    return str(_of(attributes).get("name", ""))


def lives(attributes: Mapping[str, Any]) -> bool:
    """Whether somebody runs the trial of these attributes, or is about to."""
    lease = _of(attributes)
    if not lease:
        return True
    return bool(time.time() <= lease["until"] and (lease["host"] != _host() or _runs(lease["pid"], lease["started"])))


def is_elsewhere(attributes: Mapping[str, Any]) -> bool:
    """Whether the worker of the trial of these attributes is where its process cannot be seen from here."""
    lease = _of(attributes)
    return bool(lease) and lease["host"] != _host()


def _of(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The lease, or the claim to one that comes before it."""
    found: Mapping[str, Any] = attributes.get("lease") or attributes.get("claim") or {}
    return found


def _host() -> str:
    """Two names are equal only where one process number means one process."""
    return "/".join((platform.node(), _read("/proc/sys/kernel/random/boot_id").strip(), _link("/proc/self/ns/pid")))


def _runs(pid: int, started: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(pid) == started and _state(pid) != "Z"


def _started(pid: int) -> int:
    fields = process_fields(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def _state(pid: int) -> str:
    return next(iter(process_fields(pid)), "")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
