"""Where figures come from: the source tree, the command and the machine. No torch."""

from __future__ import annotations

import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from runtime import machine


def provenance(module: str, now: datetime) -> dict[str, Any]:
    """What is needed to read figures later: when, by which command, from which source, on what machine."""
    return {
        "created": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *map(_without_folders, sys.argv[1:])]),
        "commit": commit(),
        "machine": machine.fingerprint(),
    }


def _without_folders(argument: str) -> str:
    """A path as its last part: results are published, and where this machine keeps its files is nobody's business."""
    return Path(argument).name if "/" in argument else argument


def commit() -> str | None:
    """Of the source tree that runs, with "+" where it was changed; None outside a git repository."""
    try:
        changed = _git(
            "status", "--porcelain", "--untracked-files=no"
        )  # results that are not committed yet say nothing
        return _git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def commit_and_date(name: str) -> tuple[str, str | None]:
    """The full name of a commit of the source tree, and its date (ISO 8601); of one that is not known there, `name` and
    None."""
    try:
        found, date = _git("show", "--no-patch", "--format=%H %cI", "--end-of-options", f"{name}^{{commit}}").split()
        return found, date
    except (OSError, subprocess.SubprocessError, ValueError):
        return name, None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
