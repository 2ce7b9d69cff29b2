"""Reading and writing profiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime import strict_yaml
from runtime.errors import ProfileError, UsageError
from runtime.files import write_atomic
from runtime.profile.schema import KIND, SCHEMA_VERSION, Profile, validate


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile.

    Raises:
        ProfileError: one line with the file, the key, what is wrong, and the nearest thing that would be right.
    """
    path = Path(path)
    try:
        content = strict_yaml.parse(path.read_bytes())
    except OSError as error:
        raise ProfileError(f"{path}: cannot read the profile: {error.strerror}") from error
    except ValueError as error:
        raise ProfileError(f"{path}: {error}") from error
    return validate(_check_head(content, path), str(path))


def save_profile(profile: Profile, path: str | Path) -> None:
    """Write `profile` to `path`, wholly or not at all."""
    write_atomic(Path(path), dump_profile(profile))


def dump_profile(profile: Profile) -> str:
    """YAML of `profile`, keys in the order of the schema; `load_profile` gives an equal profile back."""
    return strict_yaml.dump(profile.model_dump(exclude_none=True))


def parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """{"cache.slots": 64} of ["cache.slots=64"]; values are read as YAML.

    Raises:
        UsageError: not of the form KEY=VALUE.
    """
    overrides = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{setting!r} is not KEY=VALUE, such as cache.slots=25%")
        try:
            overrides[key.strip()] = strict_yaml.parse(value)
        except ValueError as error:
            raise UsageError(f"{setting!r}: {error}") from error
    return overrides


def _check_head(content: object, path: Path) -> dict[Any, Any]:
    """The parts that are checked first, because the rest means nothing without them."""
    if content is None:
        raise ProfileError(f"{path}: the file is empty; harness.tune writes profiles")
    if not isinstance(content, dict):
        raise ProfileError(f"{path}: a profile is a mapping of keys to values, this is a {type(content).__name__}")
    if "kind" not in content and "schema_version" not in content:
        raise ProfileError(
            f"{path}: not a profile: it has neither schema_version nor kind; harness.tune writes profiles, and a "
            "checkpoint is named by its folder"
        )
    version, kind = content.get("schema_version"), content.get("kind")
    if isinstance(version, bool):
        raise ProfileError(f"{path}: schema_version is {version!r}, not {SCHEMA_VERSION}")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ProfileError(f"{path}: schema_version {version} is newer than {SCHEMA_VERSION}; upgrade expertflow")
    if "kind" in content and kind != KIND:
        raise ProfileError(f"{path}: kind is {kind!r}, not {KIND!r}: another sort of file")
    return content
