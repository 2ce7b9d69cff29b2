"""Files that are either wholly there or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from runtime.errors import UsageError


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a crash leaves the old content or the new, never a part.

    Raises OSError as `open` does; the temporary file beside `path` is removed then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(option: str, path: Path | None) -> None:
    """Before minutes of work: whether the file that `option` names, if any, can be written in the end.

    A file without a name is made beside it, or in the first folder above that is there; nothing is left of it.

    Raises:
        UsageError: it cannot.
    """
    if path is None:
        return
    why = "it is a folder"
    try:
        if not path.is_dir():
            folder = next(parent for parent in path.absolute().parents if parent.exists())
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"\0")
            return
    except OSError as error:
        why = error.strerror or str(error)
    raise UsageError(f"{option} {path}: cannot be written ({why}); name a file in a folder that can")


def write_named(option: str, path: Path, data: bytes | str) -> None:
    """`write_atomic` to the file that a command's `option` names.

    Raises:
        UsageError: it cannot be written, and why.
    """
    try:
        write_atomic(path, data)
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written: {error.strerror or error}") from error
