"""Which profile a model is loaded with: the one that is named, its fallback, or the best that is found."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from runtime.devices import device_facts, find_device, gpu_number, is_gpu
from runtime.errors import ArtifactError, ProfileError
from runtime.facts import ModelFacts, facts_of
from runtime.machine import format_bytes
from runtime.model import checkpoint_files, meta_model
from runtime.probe import PROBE_S, engine_bandwidth, gpu_bandwidth
from runtime.profile import (
    MachineFacts,
    MatchResult,
    Profile,
    checkpoint_of,
    find_profile,
    load_profile,
    match_profile,
)
from runtime.profile.lookup import SUFFIXES, Judged, candidates, judge, missing_artifact
from runtime.profile.matching import is_same_kind
from runtime.profile.schema import DEFAULT

Source = str | Path | Profile


@dataclass(frozen=True)
class Chosen:
    """What is going to run.

    Attributes:
        profile: its overrides applied, its artefact's path absolute or from the working folder.
        device: that computes.
        match: how the profile that was named, or found, fits; None: none was.
        notes: what its user should know.
    """

    profile: Profile
    checkpoint: str
    facts: ModelFacts
    device: torch.device
    match: MatchResult | None
    notes: tuple[str, ...]


class _Named(NamedTuple):
    """A profile and its file; None: it comes from the program."""

    profile: Profile
    path: Path | None

    @property
    def name(self) -> str:
        """For messages."""
        return "the profile" if self.path is None else f"profile {self.path}"


def choose(
    source: Source,
    model: str | Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    strict: bool = False,
    probe: bool | float = False,
) -> Chosen:
    """The profile and the checkpoint that `runtime.load` is given; its arguments.

    Raises:
        ExpertFlowError: one of its kinds, saying what is wrong and the way out.
    """
    named = _named(source)
    checkpoint = _checkpoint(source, model, named)
    place = find_device(device, Profile.default() if named is None else named.profile)
    loaded = meta_model(checkpoint, dtype=dtype)
    facts, here = facts_of(loaded), device_facts(place)
    if probe:
        seconds = PROBE_S if probe is True else float(probe)
        if is_gpu(place):
            found = gpu_bandwidth(facts.expert_bytes, place, budget_s=seconds)
        else:
            io_threads = (Profile.default() if named is None else named.profile).transfer.io_threads
            files = checkpoint_files(checkpoint)
            found = engine_bandwidth(loaded, files, io_threads=io_threads, budget_s=seconds)
        here = replace(here, bandwidth_at_expert_size_bytes_per_s=found)
    again = _Again(checkpoint, gpu_number(place))
    settled = _found(facts, here, checkpoint) if named is None else _settled(named, facts, here, again, strict)
    profile = _beside(settled.named).with_overrides(overrides or {})
    _check_artifact(profile)
    return Chosen(profile, checkpoint, facts, place, settled.match, tuple(settled.notes))


class _Settled(NamedTuple):
    named: _Named
    match: MatchResult | None
    notes: Sequence[str]


def _named(source: Source) -> _Named | None:
    """The profile that `source` names; None where it is a checkpoint."""
    if isinstance(source, Profile):
        return _Named(source, None)
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise ProfileError(
            f"{source!r} names nothing to load; give a profile (.yaml), a checkpoint's folder or a hub id"
        )
    if str(source).endswith(SUFFIXES) or str(source).startswith("sha256:") or os.path.isfile(source):
        path = find_profile(source)
        return _Named(load_profile(path), path)
    return None


def _checkpoint(source: Source, model: str | Path | None, named: _Named | None) -> str:
    if named is None:
        if model is not None:
            raise ProfileError(
                f"{source} is not a profile (.yaml) but a model is named as well: {model}; give only one"
            )
        return str(source)
    checkpoint = str(model) if model is not None else checkpoint_of(named.profile)
    if checkpoint is None:
        raise ProfileError("the profile does not say where its model is; name the checkpoint as well (--model)")
    return checkpoint


def _settled(named: _Named, facts: ModelFacts, here: MachineFacts, again: _Again, strict: bool) -> _Settled:
    """The profile that was named, or what stands in for it."""
    match = match_profile(named.profile, facts.identity, here, datetime.now(UTC))
    if strict and match.level in ("stale", "rejected"):
        raise ProfileError(f"{_verdict(named, match)}; {again.tune(named.profile)}")
    if match.level == "rejected":
        named, notes = _without_foreign_limit(named, here)
        try:
            instead, more = _fallback(named, facts, here)
        except ProfileError as error:
            raise ProfileError(f"{_verdict(named, match)}, and its fallback cannot run: {error}") from error
        what = "the default configuration" if instead.profile.is_default else instead.name
        said = f"{_verdict(named, match)}: {what} runs instead; {again.tune(named.profile)}"
        return _Settled(instead, match, [said, *notes, *more])
    is_worth_telling = match.level != "exact" and named.profile.match is not None
    return _Settled(named, match, _reasons(match) if is_worth_telling else [])


def _without_foreign_limit(named: _Named, here: MachineFacts) -> tuple[_Named, list[str]]:
    """A limit of a GPU's memory says nothing of the host's, nor the other way round; a note where there was one."""
    most, match = named.profile.max_memory_bytes, named.profile.match
    if most is None or match is None or is_same_kind(match, here):
        return named, []
    note = f"its limit of {format_bytes(most)} is of {match.device}'s memory and does not count on {here.device}"
    return named._replace(profile=named.profile.with_overrides({"limits.max_memory_bytes": None})), [note]


def _fallback(named: _Named, facts: ModelFacts, here: MachineFacts) -> tuple[_Named, list[str]]:
    """What runs instead of a rejected profile, within its limit of memory; and notes on that."""
    one, tried = named, [named.path]
    while one.profile.fallback != DEFAULT:
        path = find_profile(one.profile.fallback, beside=None if one.path is None else one.path.parent)
        if any(path.samefile(before) for before in tried if before is not None):
            chain = " -> ".join(str(before) for before in (*tried, path))
            raise ProfileError(f"fallbacks go in a circle: {chain}; let one of them be {DEFAULT!r}")
        one = _Named(load_profile(path), path)
        tried.append(path)
        match = match_profile(one.profile, facts.identity, here, datetime.now(UTC))
        if match.level != "rejected":
            notes = [] if match.level == "exact" else _reasons(match)
            return one._replace(profile=_within(one.profile, named.profile.max_memory_bytes)), notes
    asked = {"limits": named.profile.limits, "workload": named.profile.workload}
    kept = {name: section.model_dump(exclude_none=True) for name, section in asked.items() if section is not None}
    return _Named(Profile.default().with_overrides(kept), None), []


def _within(profile: Profile, most_bytes: int | None) -> Profile:
    """A fallback promises no less than what it stands in for: the smaller limit of memory holds."""
    if most_bytes is None:
        return profile
    limit = min(most_bytes, profile.max_memory_bytes or most_bytes)
    return profile.with_overrides({"limits.max_memory_bytes": limit})


def _found(facts: ModelFacts, here: MachineFacts, checkpoint: str) -> _Settled:
    """The best profile that is found for a checkpoint; else the default."""
    judged = judge(list(candidates()), facts.identity, here, datetime.now(UTC))
    for one in judged:
        if one.is_used and one.candidate.profile is not None and one.match is not None:
            named = _Named(one.candidate.profile, one.candidate.path)
            how = f"{one.match.level}: {'; '.join(one.match.reasons)}" if one.match.reasons else one.match.level
            most = named.profile.max_memory_bytes
            within = "" if most is None else f", within {format_bytes(most)}"
            without = f"runtime.load('default.yaml', {checkpoint!r})"
            return _Settled(named, one.match, [f"{named.name} is used ({how}){within}; without it: {without}"])
    return _Settled(_Named(Profile.default(), None), None, [note for one in judged if (note := _passed_over(one))])


def _passed_over(one: Judged) -> str:
    """A note on a profile that its owner may expect to be used; "" where it is for something else."""
    if one.match is None:
        return f"{one.candidate.path} is not used: {one.why}"
    if one.is_for_model:
        return f"{one.candidate.path} is not used: {'; '.join([one.why, *one.match.reasons])}"
    return ""


def _verdict(named: _Named, match: MatchResult) -> str:
    what = "is for another model or machine" if match.level == "rejected" else "is stale here"
    return f"{named.name} {what} ({'; '.join(match.reasons)})"


class _Again(NamedTuple):
    """What another profile would be tuned for; `gpu` is its number for `--gpu`, None: the CPU."""

    checkpoint: str
    gpu: int | None

    def tune(self, profile: Profile) -> str:
        """The way out, within the memory that `profile` was allowed."""
        words = ["python", "-m", "harness.tune", "--model", self.checkpoint]
        if self.gpu is not None:
            words += ["--gpu", str(self.gpu)]
        if profile.max_memory_bytes is not None:
            words += ["--max-memory", str(profile.max_memory_bytes)]
        return f"tune one: {shlex.join(words)}"


def _reasons(match: MatchResult) -> list[str]:
    return [f"profile {match.level}: {reason}" for reason in match.reasons]


def _beside(named: _Named) -> Profile:
    """The profile with its artefact found beside its file."""
    artifact = named.profile.predictor.artifact
    if artifact is None or named.path is None:
        return named.profile
    return named.profile.with_overrides({"predictor.artifact": str(named.path.parent / artifact)})


def _check_artifact(profile: Profile) -> None:
    """Before weights are loaded: what was trained is there. What it is, is checked where it is read."""
    missing = missing_artifact(profile, Path())
    if missing is not None:
        raise ArtifactError(
            f"{missing}: cannot read the predictor: it is not there; it comes with the profile: copy it too, or train "
            f"one: python -m harness.fit {profile.predictor.kind}"
        )
