"""Where profiles are looked up, and which one is taken for a model that comes without.

The order: a path; the folders of EXPERTFLOW_PROFILES; the user's; those that come with ExpertFlow.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from runtime.errors import ProfileError
from runtime.predictors.params import LEARNING
from runtime.profile.checkpoints import home
from runtime.profile.configuration import LOSSY
from runtime.profile.evidence import Match, ModelIdentity
from runtime.profile.files import load_profile
from runtime.profile.matching import LEVELS, MachineFacts, MatchResult, created_at, match_profile
from runtime.profile.schema import Profile

SUFFIXES = (".yaml", ".yml")
_LIST = "python -m runtime.profile explain lists those that there are"


class Place(NamedTuple):
    """A folder of profiles and what it is called."""

    name: str
    folder: Path


NAMED = Place("named", Path())
"""Of a file that was named: it comes before all others."""


@dataclass(frozen=True)
class Candidate:
    """A file in one of the places; `profile` is None where it cannot be read, and `problem` says why."""

    place: Place
    path: Path
    profile: Profile | None
    problem: str = ""


@dataclass(frozen=True)
class Judged:
    """What became of a candidate. `match` is None where it could not be read; `why` it was not taken, "" if it was."""

    candidate: Candidate
    match: MatchResult | None
    why: str

    @property
    def is_used(self) -> bool:
        """The one that is taken."""
        return not self.why

    @property
    def is_for_model(self) -> bool:
        """It says that it is for the model, and nothing speaks against it here."""
        match = None if self.candidate.profile is None else self.candidate.profile.match
        is_rejected = self.match is None or self.match.level == "rejected"
        return match is not None and match.model is not None and not is_rejected


def places() -> list[Place]:
    """All folders in the order in which they are looked through; they need not exist."""
    named = os.environ.get("EXPERTFLOW_PROFILES", "").split(os.pathsep)
    config = home(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    return [
        *(Place("EXPERTFLOW_PROFILES", home(folder)) for folder in named if folder),
        Place("user", config / "expertflow" / "profiles"),
        # Beside the package, in the repository as where a wheel has put it.
        Place("shipped", Path(__file__).parents[2] / "profiles"),
    ]


def candidates() -> Iterator[Candidate]:
    """Every profile of every place, in order."""
    for place in places():
        for path in _profiles_in(place.folder):
            yield candidate(path, place)


def candidate(path: Path, place: Place = NAMED) -> Candidate:
    """One file, read."""
    try:
        return Candidate(place, path, load_profile(path))
    except ProfileError as error:
        return Candidate(place, path, None, str(error).removeprefix(f"{path}: "))


def find_profile(name: str | Path, beside: Path | None = None) -> Path:
    """The file of a profile that is named by its path, its file's name with or without the suffix, or its id.

    Args:
        beside: a folder that relative paths are tried in first.

    Raises:
        ProfileError: there is none.
    """
    text = str(name)
    path = home(text)
    for explicit in (path,) if beside is None else (beside / path, path):
        if os.path.isfile(explicit):
            return explicit
    if path.name == text:
        for one in (path for place in places() for path in _profiles_in(place.folder)):
            if text in (one.name, one.stem):
                return one
    if text.startswith("sha256:"):
        for found in candidates():
            if found.profile is not None and found.profile.id == text:
                return found.path
    if path.name != text:
        raise ProfileError(f"{text}: there is no such file; {_LIST}")
    searched = ", ".join(str(place.folder) for place in places())
    raise ProfileError(f"no profile is called {text}; looked in the working folder, {searched}; {_LIST}")


def judge(
    found: Sequence[Candidate], model: ModelIdentity, machine: MachineFacts, now: datetime | None = None
) -> list[Judged]:
    """Which of the candidates is taken for `model`, and why each other is not.

    Only one that says which model it is for, is exact or compatible and computes exactly is taken unasked. The better
    level wins, then who says more about where it holds, then the earlier place, then the newer.
    """
    matches = [None if one.profile is None else match_profile(one.profile, model, machine, now) for one in found]
    reasons = [_unfit(one, match) for one, match in zip(found, matches, strict=True)]
    fit = [number for number, reason in enumerate(reasons) if not reason]
    ranks = {number: _rank(found[number], matches[number]) for number in fit}
    best = min(fit, key=lambda number: ranks[number], default=None)
    for number in fit:
        if best is not None and number != best:
            reasons[number] = _lost(ranks[number], ranks[best])
    return [Judged(*one) for one in zip(found, matches, reasons, strict=True)]


class _Rank(NamedTuple):
    """The lowest wins."""

    level: int
    generality: int
    place: int
    age: float
    number: str


def _rank(one: Candidate, match: MatchResult | None) -> _Rank:
    assert one.profile is not None and match is not None
    created = created_at(one.profile.provenance) or datetime.fromtimestamp(0, UTC)
    place = [NAMED, *places()].index(one.place)
    return _Rank(LEVELS.index(match.level), -_specificity(one.profile), place, -created.timestamp(), one.path.name)


def _specificity(profile: Profile) -> int:
    """How many things it says about where it holds."""
    match = profile.match or Match()
    return sum(getattr(match, name) is not None for name in Match.model_fields)


_LOST = {
    "level": "another fits better",
    "generality": "another says more about where it holds",
    "place": "another is looked up earlier",
    "age": "another is newer",
    "number": "another is just as good",
}


def _lost(rank: _Rank, best: _Rank) -> str:
    return next(_LOST[name] for name in _Rank._fields if getattr(rank, name) != getattr(best, name))


def _unfit(one: Candidate, match: MatchResult | None) -> str:
    """Why nobody is given this profile without naming it; "" where it can be taken."""
    if one.profile is None or match is None:
        return f"cannot be read: {one.problem}"
    if match.level == "rejected":
        return f"is for something else; fallback: {one.profile.fallback}"
    if (artifact := missing_artifact(one.profile, one.path)) is not None:
        return f"its predictor's artefact is missing: {artifact}"
    return "" if one.place == NAMED else _unasked(one.profile, match)


def _unasked(profile: Profile, match: MatchResult) -> str:
    """Why a profile that would run is not taken by itself."""
    if profile.match is None or profile.match.model is None:
        return "does not say which model it is for: taken only where it is named"
    if match.level == "stale":
        return "is stale: taken only where it is named"
    if profile.numerics in LOSSY or profile.miss != "copy":
        return f"numerics {profile.numerics} changes results: taken only where it is named"
    return ""


def missing_artifact(profile: Profile, path: Path) -> Path | None:
    """The artefact that a profile at `path` cannot do without and that is not there."""
    section = profile.predictor
    if section.artifact is None or section.kind in LEARNING:
        return None
    artifact = path.parent / section.artifact
    return None if os.path.isfile(artifact) else artifact


def _profiles_in(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if name.endswith(SUFFIXES) and not name.startswith(".")]
