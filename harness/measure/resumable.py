"""Result files that a later call of the same command goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import UsageError
from runtime.files import check_writable

T = TypeVar("T")


def result_path(out: Path | None, kind: str) -> Path:
    """`--out`, or a new file for results of a kind.

    Raises:
        UsageError: it cannot be written, or is no JSON file: tables and plots have its name with other endings.
    """
    check_writable("--out", out)
    if out is not None and out.suffix != ".json":
        raise UsageError(f"--out {out}: name a .json file; tables and plots are written beside it")
    return out or Path("results") / kind / f"{datetime.now(UTC):%Y-%m-%d-%H%M%S}.json"


def reopened(path: Path, command: str, about: Mapping[str, Any], read: Callable[[dict[str, Any]], T]) -> T | None:
    """What an earlier run of `command` left in `path`; None where there is no such file.

    Args:
        about: JSON, what the figures depend on; the file has the same under this name.
        read: of the file's content; may raise KeyError, TypeError, ValueError or AttributeError for something else.

    Raises:
        UsageError: the file is none of `command`, or of something else than `about`.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        before, found = dict(content["about"]), read(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--out {path}: is there, and no result of {command} ({error}); name another file") from error
    for name, value in about.items():
        if before.get(name) != value:
            raise UsageError(
                f"--out {path}: is of another run ({name} {before.get(name)}, now {value}); name another file"
            )
    return found
