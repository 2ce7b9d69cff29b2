"""Whether a profile fits a model and a machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from typing import Literal, get_args

from runtime import machine
from runtime.machine import format_bytes
from runtime.profile.evidence import Match, ModelIdentity, Provenance
from runtime.profile.schema import Profile

# Memory reported by one machine differs a little from boot to boot.
MEMORY_TOLERANCE = 0.05
RECHECK_DAYS = 90
"""After which what was measured is worth measuring again."""
PACKAGES = ("torch", "transformers")
"""Whose minor versions bring other kernels."""


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What a machine offers: `device` "cpu" or "cuda:NAME", its memory, bandwidth where it was measured, versions."""

    device: str
    memory_total_bytes: int
    bandwidth_at_expert_size_bytes_per_s: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


Level = Literal["exact", "compatible", "stale", "rejected"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True, slots=True)
class MatchResult:
    """How far a profile fits: `exact`, `compatible` (differs, or does not say), `stale` (tune again) or `rejected`."""

    level: Level
    reasons: tuple[str, ...]


def machine_facts() -> MachineFacts:
    """This machine, as profiles match it; the bandwidth is not measured here."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return MachineFacts(device="cpu", memory_total_bytes=machine.total_memory_bytes(), versions=versions)


def match_profile(
    profile: Profile, model: ModelIdentity, machine: MachineFacts, now: datetime | None = None
) -> MatchResult:
    """Whether `profile` holds for `model` on `machine`: the worst of all findings, with every reason.

    Args:
        now: with its time zone; None: a profile of any age will do.
    """
    findings: list[tuple[Level, str]] = []
    if profile.match is None:
        findings.append(("compatible", "the profile does not say which model and machine it is for"))
    else:
        findings += [*_match_model(profile.match, model), *_match_machine(profile.match, machine)]
    if profile.provenance is not None:
        findings += [*_match_versions(profile.provenance, machine.versions), *_match_age(profile.provenance, now)]
    level = max((level for level, _ in findings), key=LEVELS.index, default=LEVELS[0])
    return MatchResult(level, tuple(reason for _, reason in findings))


def _match_model(match: Match, model: ModelIdentity) -> Iterator[tuple[Level, str]]:
    if match.model is None:
        yield "compatible", "the profile does not say which model it is for"
        return
    for name in ModelIdentity.model_fields:
        wanted, found = getattr(match.model, name), getattr(model, name)
        if wanted != found:
            yield "rejected", f"model {name}: profile {wanted}, here {found}"


def _match_machine(match: Match, machine: MachineFacts) -> Iterator[tuple[Level, str]]:
    if match.device is None:
        yield "compatible", "the profile does not say which device it is for"
    elif match.device != machine.device:
        same_kind = is_same_kind(match, machine)
        yield "compatible" if same_kind else "rejected", f"device: profile {match.device}, here {machine.device}"
        if not same_kind:
            return  # the memory and the rate of another kind of device say nothing
    yield from _match_memory(match.memory_total_bytes, machine.memory_total_bytes)
    bandwidth, found = match.bandwidth_at_expert_size_bytes_per_s, machine.bandwidth_at_expert_size_bytes_per_s
    if bandwidth is None or (found is not None and found >= bandwidth.min):
        return
    if found is None:
        yield "exact", "bandwidth at expert size was not measured here"
    else:
        wanted = f"{format_bytes(bandwidth.min)}/s"
        yield "stale", f"bandwidth at expert size: profile at least {wanted}, here {format_bytes(found)}/s"


def is_same_kind(match: Match, machine: MachineFacts) -> bool:
    """Whether both are CPUs or both GPUs; of a profile that does not say, yes."""
    return match.device is None or match.device.split(":")[0] == machine.device.split(":")[0]


def _match_memory(wanted: int | None, found: int) -> Iterator[tuple[Level, str]]:
    if wanted is None:
        yield "compatible", "the profile does not say how much memory it is for"
    elif abs(found - wanted) > MEMORY_TOLERANCE * wanted:
        level: Level = "stale" if found < wanted else "compatible"
        yield level, f"memory: profile {format_bytes(wanted)}, here {format_bytes(found)}"


def _match_versions(provenance: Provenance, here: Mapping[str, str]) -> Iterator[tuple[Level, str]]:
    """Other versions compute the same with other kernels: what was measured may have changed."""
    told = provenance.versions or {}
    for package in PACKAGES:
        if package in told and package in here and _minor(told[package]) != _minor(here[package]):
            yield "compatible", f"measured with {package} {told[package]}, here {here[package]}; {_RECHECK}"


def _match_age(provenance: Provenance, now: datetime | None) -> Iterator[tuple[Level, str]]:
    created = created_at(provenance)
    if now is not None and created is not None and (age := (now - created).days) > RECHECK_DAYS:
        yield "compatible", f"measured {age} days ago; {_RECHECK}"


_RECHECK = "whether it still holds: python -m harness.check --profile FILE"


def created_at(provenance: Provenance | None) -> datetime | None:
    """When the profile was made, with its time zone; None where it does not say so in ISO 8601."""
    try:
        created = datetime.fromisoformat((provenance and provenance.created) or "")
    except ValueError:
        return None
    return created if created.tzinfo is not None else created.replace(tzinfo=UTC)


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
