"""The checkpoint of a profile, named so that it can be found on another machine."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.errors import CheckpointError
from runtime.profile.schema import Profile

_CACHE = "cache:"


def home(path: str) -> Path:
    """`path` with a leading ~ replaced; as it is where that means nobody."""
    return Path(os.path.expanduser(path))


def checkpoint_cache() -> Path:
    """Where checkpoints that were made here are kept: $EXPERTFLOW_CACHE, or ~/.cache/expertflow."""
    return home(os.environ.get("EXPERTFLOW_CACHE") or "~/.cache/expertflow")


def portable(checkpoint: str) -> str:
    """How a profile names `checkpoint`: "cache:NAME" in the cache, relative below the working folder, "~/…" at home.

    Anything else, such as a hub id, stays as it is.
    """
    path = Path(checkpoint).absolute()
    if os.path.exists(path) and path.is_relative_to(cache := checkpoint_cache().absolute()):
        return _CACHE + str(path.relative_to(cache))
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    own = home("~")
    return f"~/{path.relative_to(own)}" if path.is_relative_to(own) else checkpoint


def checkpoint_of(profile: Profile) -> str | None:
    """The checkpoint that a profile names, as `runtime.load` takes it: a folder or hub id; None: it names none.

    Raises:
        CheckpointError: it is one of the cache's that is not there; says which command makes it.
    """
    origin = profile.provenance
    if origin is None or origin.model is None:
        return None
    if not origin.model.startswith(_CACHE):
        return str(home(origin.model)) if origin.model.startswith("~/") else origin.model
    folder = checkpoint_cache() / origin.model.removeprefix(_CACHE)
    if not os.path.isdir(folder):
        way_out = f"make it: {origin.model_command}" if origin.model_command else "name another (--model)"
        raise CheckpointError(f"the profile's checkpoint is not at {folder}; {way_out}")
    return str(folder)
