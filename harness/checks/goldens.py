"""The file of committed counters: one line a scenario, so that a diff says what changed, and why each change was meant.

{"trace": {…}, "history": [{"date", "reason", "commit", "changed"}, …], "counters": {"scenario": {…}, …}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.checks.scenarios import LOWER_IS_BETTER, Counts
from runtime.errors import UsageError
from runtime.files import write_atomic

TRACE_NAME = "demo-routing.npz"
"""What is replayed; it lies beside the goldens."""

SAME_SHARE = 1e-9
"""Virtual seconds that differ by less are the same: their sums are not in the same order everywhere."""

Number = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TraceId(_Part):
    """What was replayed."""

    name: str
    sha256: str


class Blessing(_Part):
    """One change that was meant.

    Attributes:
        date: ISO, UTC. commit: that the working tree was based on, with "+" where it was changed.
        changed: counters added up over the scenarios that changed: [before, after]; beside them `scenarios`, `added`
            and `removed`, how many.
    """

    date: str
    reason: str
    commit: str | None
    changed: dict[str, int | list[Number]]


class Goldens(_Part):
    """The file."""

    trace: TraceId
    history: tuple[Blessing, ...]
    counters: dict[str, dict[str, Number]]


def read_goldens(path: Path) -> Goldens:
    """The committed counters.

    Raises:
        UsageError: there are none, or the file is no such file; and the way out.
    """
    write_anew = f'python -m harness.check --goldens {path} --bless --reason "why"'
    try:
        return Goldens.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"{path}: there are no counters to compare with; name the file (--goldens), or write it: {write_anew}"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{path}: not a file of counters: {place + ': ' if place else ''}{first['msg']}; restore it (git "
            f"checkout), or remove it and write it anew: {write_anew}"
        ) from None


def write_goldens(path: Path, goldens: Goldens) -> None:
    """Write the file, a line for each blessing and scenario.

    Raises:
        UsageError: it cannot be written.
    """
    history = ",\n".join(json.dumps(one.model_dump(), ensure_ascii=False) for one in goldens.history)
    counters = ",\n".join(f"{json.dumps(name)}: {json.dumps(counts)}" for name, counts in goldens.counters.items())
    text = (
        f'{{\n"trace": {json.dumps(goldens.trace.model_dump())},\n'
        f'"history": [\n{history}\n],\n"counters": {{\n{counters}\n}}\n}}\n'
    )
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error


def trace_id(path: Path) -> TraceId:
    """Of the trace in the file `path`."""
    return TraceId(name=path.name, sha256=sha256(path.read_bytes()).hexdigest())


def is_same(golden: float | None, found: float | None) -> bool:
    """Integers exactly, virtual seconds but for rounding."""
    if isinstance(golden, float) and isinstance(found, float):
        return math.isclose(golden, found, rel_tol=SAME_SHARE, abs_tol=1e-12)
    return type(golden) is type(found) and golden == found


def differing(golden: Counts, found: Counts) -> list[str]:
    """Names of the counters that are not the same; the telling ones first."""
    names = [
        *(name for name in LOWER_IS_BETTER if name in golden or name in found),
        *sorted(golden.keys() - LOWER_IS_BETTER.keys()),
    ]
    return [name for name in names if not is_same(golden.get(name), found.get(name))]


def described(name: str, golden: float | None, found: float | None) -> str:
    """ "misses 1201, golden 1190 (+11, worse)"."""
    if golden is None or found is None:
        return f"{name} {_text(found)}, golden {_text(golden)}"
    lower = LOWER_IS_BETTER.get(name)
    judged = "" if lower is None else (", better" if (found < golden) == lower else ", worse")
    return f"{name} {_text(found)}, golden {_text(golden)} ({_text(found - golden, sign='+')}{judged})"


def _text(number: float | None, sign: str = "") -> str:
    if number is None:
        return "none"
    return f"{number:{sign}d}" if isinstance(number, int) else f"{number:{sign}.9g}"


def totals(golden: Mapping[str, Counts], found: Mapping[str, Counts]) -> dict[str, list[Any]]:
    """[golden, found] of every counter that differs, added up over the scenarios that differ and are on both sides."""
    both = [(golden[name], found[name]) for name in found if name in golden and differing(golden[name], found[name])]
    sums = {}
    for counter in LOWER_IS_BETTER:
        if any(not is_same(old.get(counter), new.get(counter)) for old, new in both):
            pairs = [(old[counter], new[counter]) for old, new in both if counter in old and counter in new]
            sums[counter] = [sum(old for old, _ in pairs), sum(new for _, new in pairs)]
    return sums
