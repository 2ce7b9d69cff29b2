"""What is wrong with a profile that others are to trust: its evidence, its age, what it gives away."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from runtime.errors import ProfileError
from runtime.profile.configuration import LOSSY
from runtime.profile.evidence import Evidence, Objectives
from runtime.profile.files import load_profile
from runtime.profile.lookup import find_profile, missing_artifact
from runtime.profile.matching import RECHECK_DAYS, created_at
from runtime.profile.schema import DEFAULT, Profile

_HOMES = re.compile(r"(?<![\w.~-])(/home/|/root\b|/Users/|/tmp/|[A-Za-z]:\\Users\\)")
_SECRETS = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|KEY)\s*[=:]\s*\S|://[^/\s:@]+:[^@\s]+@|\bhf_\w{16,}|\bsk-\w{16,}",
    re.IGNORECASE,
)
_TUNE = "measure: python -m harness.tune"
_QUALITY = "measure: python -m harness.quality --profile FILE --write"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong (`error`) or worth knowing (`warning`)."""

    severity: Literal["error", "warning"]
    message: str


def lint(path: Path, now: datetime | None = None) -> list[Problem]:
    """Everything that is found about the profile at `path`; `now`: with its time zone, None: the present."""
    try:
        profile = load_profile(path)
    except ProfileError as error:
        return [Problem("error", str(error).removeprefix(f"{path}: "))]
    now = now or datetime.now(UTC)
    found = [*_given_away(profile), *_files(profile, path), *_device(profile)]
    if not profile.is_default:  # the default promises nothing that would have to be measured
        found += [*_evidence(profile), *_limits(profile), *_origin(profile, now)]
    return found


def _error(message: str) -> Problem:
    return Problem("error", message)


def _evidence(profile: Profile) -> Iterator[Problem]:
    evidence, measured = profile.evidence or Evidence(), profile.objectives or Objectives()
    if profile.evidence is None or profile.objectives is None:
        yield _error(f"evidence and objectives: what was measured is missing; {_TUNE}")
        return
    baseline, ratio = evidence.baseline, evidence.ratio
    if baseline is None:
        yield _error(f"evidence.baseline: the default was not measured beside it; {_TUNE}")
    if ratio is None or evidence.pairs is None:
        yield _error(f"evidence.ratio, evidence.pairs: not confirmed against the default; {_TUNE}")
        return
    if not ratio.low <= ratio.estimate <= ratio.high:
        yield _error(f"evidence.ratio: {ratio.estimate} is not within {ratio.low} to {ratio.high}")
    if ratio.high >= 1 and not _saves_memory(measured, baseline):
        most = f"up to {ratio.high} of the default's latency"
        yield _error(f"evidence.ratio: {most}, and no less memory: no gain is proven")
    if (profile.numerics in LOSSY or profile.miss != "copy") and evidence.kl_nats is None:
        yield _error(f"numerics {profile.numerics}: its cost was not measured; {_QUALITY}")


def _saves_memory(measured: Objectives, baseline: Objectives | None) -> bool:
    own, other = measured.peak_memory_bytes, None if baseline is None else baseline.peak_memory_bytes
    return own is not None and other is not None and own < other


def _limits(profile: Profile) -> Iterator[Problem]:
    """What was measured keeps what was asked for."""
    limits, measured = profile.limits, profile.objectives
    if limits is None or measured is None:
        return
    for limit, figure in (
        ("max_memory_bytes", "peak_memory_bytes"),
        ("slo_tpot_ms", "tpot_ms_p50"),
        ("slo_ttft_ms", "ttft_ms_p50"),
    ):
        most, found = getattr(limits, limit), getattr(measured, figure)
        if most is not None and found is not None and found > most:
            yield _error(f"objectives.{figure}: {found} is above limits.{limit}, {most}")


def _origin(profile: Profile, now: datetime) -> Iterator[Problem]:
    match, origin = profile.match, profile.provenance
    if match is None or match.device is None or match.memory_total_bytes is None or match.model is None:
        yield _error("match: device, memory_total_bytes and model say where it holds; one of them is missing")
    created = created_at(origin)
    if origin is None or created is None:
        yield _error("provenance.created: missing, or no date and time of ISO 8601")
    elif created > now:
        yield _error(f"provenance.created: {origin.created} is in the future")
    elif (age := (now - created).days) > RECHECK_DAYS:
        yield Problem("warning", f"provenance.created: measured {age} days ago; python -m harness.check --profile FILE")
    for name in ("model", "versions", "commit", "command"):
        if origin is None or not getattr(origin, name):
            yield Problem("warning", f"provenance.{name}: missing; nobody can measure it again just so")
    if origin is not None and (origin.commit or "").endswith("+"):
        yield Problem("warning", f"provenance.commit: {origin.commit} was measured with changes that nobody else has")


def _device(profile: Profile) -> Iterator[Problem]:
    """The device is named as it is looked up, and what is set acts there."""
    device = None if profile.match is None else profile.match.device
    if device is None or device == "cpu":
        return
    kind, _, name = device.partition(":")
    if kind != "cuda" or not name or name.isdigit():
        yield _error(f"match.device: {device!r} is neither cpu nor a GPU by its name, such as cuda:NVIDIA H200")
    if profile.compute.decode == "gemv":
        yield Problem("warning", "compute.decode: gemv is for the CPU; on a GPU eager runs instead")


def _files(profile: Profile, path: Path) -> Iterator[Problem]:
    """What it needs beside itself."""
    artifact = missing_artifact(profile, path)
    if artifact is not None:
        yield _error(f"predictor.artifact: there is no {artifact}; it has to come with the profile")
    if profile.fallback == DEFAULT:
        return
    try:
        other = find_profile(profile.fallback, beside=path.parent)
    except ProfileError as error:
        yield _error(f"fallback: {error}")
    else:
        if path.exists() and other.samefile(path):
            yield _error(f"fallback: {profile.fallback} is the profile itself")


def _given_away(profile: Profile) -> Iterator[Problem]:
    """Paths of one machine and secrets: a profile is there to be shared."""
    for key, text in _texts(profile.model_dump(exclude_none=True)):
        if _SECRETS.search(text) or _SECRETS.search(f"{key.rpartition('.')[2]}={text}"):
            yield _error(f"{key}: looks like a secret; remove it")
        if _HOMES.search(text):
            yield _error(f"{key}: names a folder of one machine: {_HOMES.search(text)[0]}…")  # type: ignore[index]
    artifact = profile.predictor.artifact
    if artifact is not None and Path(artifact).is_absolute() and not _HOMES.search(artifact):
        yield _error("predictor.artifact: is an absolute path; keep the file beside the profile")


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and texts of all leaves that are text."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _texts(value, key)
    elif isinstance(tree, str):
        yield key, tree
