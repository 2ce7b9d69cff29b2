"""The figures of main over time: appended to a history, and searched for the commits from which on they are others.

An alert, never a gate: a step shows only days later, machines change under a series, and a slow drift may look like
steps. What it names is confirmed with the paired check. Each kind of machine and each metric has a series of its own.

The search is PELT (Killick, Fearnhead and Eckley, 2012) with absolute deviations, by `ruptures`: medians of segments,
so that single bad nights move nothing. Of series of 40 points without a step, with the noise of shared runners, fewer
than 1 % seem to have one (tests/harness/test_series.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.checks.report import Finding, Report, Verdict
from harness.measure.stats import median, robust_deviation
from runtime.errors import UsageError
from runtime.files import write_atomic

MIN_POINTS = 20
"""Fewer are not searched."""
WINDOW = 120
"""Points that are searched, the newest."""
MIN_SEGMENT = 5
LEAST_CHANGE = 0.03
"""Less is none."""
RECENT_POINTS = 30
"""A change further back was told often enough: it stays in the findings, without an alert."""
_PENALTY = 3.0
"""Per logarithm of the number of points, in standard deviations of the noise."""
_LEAST_NOISE = 1e-3
"""Of a point, as a share: a series that hardly moves has no steps below that."""


@dataclass(frozen=True)
class Point:
    """A line of the history: what a commit's benchmark took on a kind of machine.

    Attributes:
        date: of the commit, ISO 8601. fingerprint: of the kind of machine, a hash. num_samples: that it is the median
            of.
    """

    commit: str
    date: str
    fingerprint: str
    metric: str
    median_s: float
    num_samples: int

    def __post_init__(self) -> None:
        """Raises ValueError for a field that is not what it should be."""
        for name in ("commit", "date", "fingerprint", "metric"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} {getattr(self, name)!r} is no text")
        datetime.fromisoformat(self.date)
        for name, kinds in (("median_s", (int, float)), ("num_samples", (int,))):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
                raise ValueError(f"{name} {value!r} is no positive number")

    @property
    def key(self) -> tuple[str, str, str]:
        """There is one point of each."""
        return self.fingerprint, self.metric, self.commit

    @property
    def time(self) -> datetime:
        """Of the commit; without a time zone it is taken as UTC."""
        time = datetime.fromisoformat(self.date)
        return time if time.tzinfo else time.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Change:
    """A step of a series.

    Attributes:
        commit: the first after the step, give or take one. date: its.
        before, after: commits of the series that have it between them.
        change: of the median of the points up to the next step, as a share; 0.05 is 5 % slower.
    """

    commit: str
    date: str
    before: str
    after: str
    change: float

    def __str__(self) -> str:
        bracket = f"{self.before[:12]}..{self.after[:12]}"
        return f"{self.change:+.1%} about {self.commit[:12]} of {self.date[:10]}, in {bracket}"

    @property
    def confirmation(self) -> str:
        """The command."""
        return f"git checkout {self.after[:12]} && python -m harness.check --base {self.before[:12]}"


def scan_series(history: Path, new: Path | None) -> Report:
    """Append the figures of a pytest-benchmark JSON file, then look for changes; every finding is a pass.

    Args:
        history: folder of JSON lines, a `Point` each; made where it is missing. new: None to append nothing.

    Raises:
        UsageError: ruptures is not installed; a file cannot be read or written; a line of the history is damaged; there
            are no figures at all.
    """
    _ruptures()  # before anything is written
    notes = [] if new is None else [_append(history, new)]
    series: defaultdict[tuple[str, str], list[Point]] = defaultdict(list)
    for point in read_history(history):
        series[point.metric, point.fingerprint].append(point)
    if not series:
        why = notes or ["add some with --benchmark-json FILE, which pytest-benchmark writes"]
        raise UsageError(f"{history}: no figures yet; {why[0]}")
    findings = []
    for name, points in sorted(series.items()):
        points = sorted(points, key=lambda point: point.time)[-WINDOW:]
        found = find_changes([point.median_s for point in points])
        changes = _changes(points, found)
        findings.append(_finding(*name, points, changes))
        notes += [
            f"{name[0]} on {name[1]}: {change}; to confirm: {change.confirmation}"
            for at, change in zip(found, changes, strict=True)
            if len(points) - at <= RECENT_POINTS
        ]
    command = shlex.join(["python", "-m", "harness.check", "--series", "--history", str(history)])
    return Report("series", tuple(findings), command, tuple(notes))


def read_history(history: Path) -> list[Point]:
    """Every point of the folder's .jsonl files, the first of those that were written twice.

    Raises:
        UsageError: a file cannot be read, or a line is no point; it is named.
    """
    points: dict[tuple[str, str, str], Point] = {}
    for path in sorted(history.glob("*.jsonl")):
        for point in _points(path):
            points.setdefault(point.key, point)
    return list(points.values())


def find_changes(values: Sequence[float]) -> list[int]:
    """Where a series of positive values takes a step: the index of the first value after each; none if it is short.

    Raises:
        UsageError: ruptures is not installed.
    """
    if len(values) < MIN_POINTS:
        return []
    logs = np.log(np.asarray(values, np.float64))
    search = _ruptures().Pelt(model="l1", min_size=MIN_SEGMENT, jump=1).fit(logs / _noise(logs))
    found: list[int] = search.predict(pen=_PENALTY * math.log(len(values)))[:-1]
    while found:
        steps = np.abs(np.diff(_levels(logs, found)))
        least = int(steps.argmin())
        if steps[least] >= math.log1p(LEAST_CHANGE):
            break
        del found[least]
    return found


def _noise(logs: npt.NDArray[np.float64]) -> float:
    """Standard deviation of a point, by the median step from one to the next, which few changes and spikes move."""
    return max(robust_deviation(np.diff(logs)) / math.sqrt(2), _LEAST_NOISE)


def _levels(logs: npt.NDArray[np.float64], changes: Sequence[int]) -> list[float]:
    return [float(np.median(part)) for part in np.split(logs, changes)]


def _changes(points: Sequence[Point], found: Sequence[int]) -> list[Change]:
    levels = _levels(np.log([point.median_s for point in points]), found)
    shares = np.expm1(np.diff(levels)).tolist()
    return [
        Change(points[at].commit, points[at].date, points[at - 2].commit, points[at + 1].commit, share)
        for at, share in zip(found, shares, strict=True)
    ]


def _finding(metric: str, fingerprint: str, points: Sequence[Point], changes: Sequence[Change]) -> Finding:
    now_s = median([point.median_s for point in points[-MIN_SEGMENT:]])
    if len(points) < MIN_POINTS:
        said = f"too short to be searched: {len(points)} of {MIN_POINTS} commits"
    else:
        said = f"{len(points)} commits, " + ("; ".join(map(str, changes)) or "no change")
    figures = {
        "metric": metric,
        "fingerprint": fingerprint,
        "num_points": len(points),
        "median_s": now_s,
        "changes": [asdict(change) for change in changes],
    }
    return Finding(f"{metric} on {fingerprint}", Verdict.PASS, f"{said}; now {1e3 * now_s:.4g} ms", figures)


def _append(history: Path, new: Path) -> str:
    """What was done, for people."""
    points, is_changed = _benchmarks(new)
    if is_changed:
        return f"{new}: measured in a changed source tree, so of no commit; nothing was added"
    if not points:
        return f"{new}: no benchmarks in it; nothing was added"
    path = history / f"{points[0].fingerprint}.jsonl"
    try:
        with _locked(history):
            known = {point.key for point in read_history(history)}
            added = [point for point in points if point.key not in known]
            if added:
                before = path.read_bytes() if path.exists() else b""
                lines = "".join(json.dumps(asdict(point)) + "\n" for point in added)
                write_atomic(path, before + lines.encode())
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error
    kept = f", {len(points) - len(added)} were there" if len(added) < len(points) else ""
    return f"{path}: {len(added)} figures of {points[0].commit[:12]} added{kept}"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _points(path: Path) -> Iterator[Point]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            yield Point(**_mapping(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            reason = str(error).replace("Point.__init__() ", "")
            raise UsageError(f"{path}, line {number}: {reason}; mend or delete the line") from error


def _benchmarks(path: Path) -> tuple[list[Point], bool]:
    """Of a pytest-benchmark JSON file; whether the source tree differed from the commit."""
    try:
        content = _mapping(json.loads(path.read_bytes()))
        commit, fingerprint = _mapping(content["commit_info"]), _fingerprint(_mapping(content["machine_info"]))
        points = [
            Point(
                commit=commit["id"],
                date=commit["time"],
                fingerprint=fingerprint,
                metric=one["fullname"],
                median_s=one["stats"]["median"],
                num_samples=one["stats"]["rounds"],
            )
            for one in _distinct(content["benchmarks"])
        ]
        return points, bool(commit["dirty"])
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UsageError(
            f"{path}: no figures of a commit as `pytest --benchmark-json` writes them ({reason})"
        ) from error


def _distinct(benchmarks: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    return {one["fullname"]: one for one in benchmarks}.values()


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} where an object should be")
    return value


def _fingerprint(machine: Mapping[str, Any]) -> str:
    """Of what times depend on; neither of the host's name nor of what changes with every update."""
    cpu = machine.get("cpu") or {}
    python = ".".join(str(machine["python_version"]).split(".")[:2])
    model = cpu.get("brand_raw") or machine.get("processor")
    facts = machine["system"], machine["machine"], model, cpu.get("count"), python
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _ruptures() -> ModuleType:
    try:
        import ruptures  # late: only the search needs it
    except ImportError as error:
        raise UsageError("change points need the package ruptures: pip install 'expertflow[ci]'") from error
    return ruptures
