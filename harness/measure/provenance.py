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
    """The commit of the source tree, with "+" where it was changed since; None outside a repository."""
    root = Path(__file__).parents[2]
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        state = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("+" if state.stdout.strip() else "")
