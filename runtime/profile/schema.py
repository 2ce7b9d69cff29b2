"""The whole profile, its keys, and what is said of one that is wrong."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from textwrap import shorten
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from runtime.errors import ProfileError
from runtime.predictors.params import default_period
from runtime.profile.configuration import (
    MISS_ACTIONS,
    NUMERICS,
    Cache,
    Compute,
    Limits,
    Predictor,
    Prefetch,
    Scheduler,
    Tiers,
    Transfer,
)
from runtime.profile.evidence import Evidence, Match, Objectives, Provenance, Workload
from runtime.profile.fields import OneOf, Section

SCHEMA_VERSION: Final = 1
KIND: Final = "moe-offload-profile"
DEFAULT: Final = "default"
"""As a fallback: the configuration that runs where nothing was tuned."""

CONFIGURATION: Final = (
    "cache",
    "prefetch",
    "predictor",
    "scheduler",
    "compute",
    "transfer",
    "tiers",
    "miss",
    "numerics",
)
"""Keys that act."""


def _check_fixed(keys: tuple[str, ...]) -> tuple[str, ...]:
    for key in keys:
        if key not in _KNOWN_KEYS:
            raise ValueError(f"{key!r} is no key of a profile; {_nearest_key(key)}")
    return keys


class Profile(Section):
    """The whole file. Sections that were not measured are None and not written."""

    schema_version: Literal[1]
    """Of this schema."""
    kind: Literal["moe-offload-profile"]
    """Tells a profile from any other YAML file."""
    match: Match | None = None
    """Where the profile holds."""
    workload: Workload | None = None
    """What it was tuned on."""
    limits: Limits | None = None
    """What the user asked for."""
    cache: Cache = Cache()
    """Which experts are kept."""
    prefetch: Prefetch = Prefetch()
    """What is loaded before it is demanded."""
    predictor: Predictor = Predictor()
    """What prefetching goes by."""
    scheduler: Scheduler = Scheduler()
    """Which requests run together."""
    compute: Compute = Compute()
    """Expert kernels."""
    transfer: Transfer = Transfer()
    """How experts travel."""
    tiers: Tiers | None = None
    """Where experts rest."""
    miss: Annotated[str, OneOf("miss action", MISS_ACTIONS)] = "copy"
    """What is done about an expert that is not on the GPU: `copy` it there, `compute` it on the CPU where its weights
    are, or `auto`, each where it is cheaper. On the CPU, where all are computed in place, they are loaded."""
    numerics: Annotated[str, OneOf("numerics", NUMERICS)] = "exact"
    """How close the result is to that of the resident model: `exact` to the bit; `equivalent`: the same sums rounded
    otherwise, which `miss` compute and auto take. `lossy.substitute`: when decoding, a token whose expert is
    absent goes to the best resident one, and only forecasts bring experts in; `_always`: when prefilling too."""
    fixed: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_check_fixed)] = ()
    """Dotted keys that the user set; the tuner does not touch them."""
    objectives: Objectives | None = None
    """What was measured."""
    evidence: Evidence | None = None
    """How sure the gain is."""
    provenance: Provenance | None = None
    """Where the profile comes from."""
    fallback: Annotated[str, Field(min_length=1)] = DEFAULT
    """What runs instead where the profile is rejected: "default", or the name, path or id of another profile."""

    @classmethod
    def default(cls) -> Profile:
        """The configuration that runs where nothing was tuned."""
        return cls(schema_version=SCHEMA_VERSION, kind=KIND)

    @model_validator(mode="after")
    def _computed_misses_are_not_exact(self) -> Self:
        if self.miss != "copy" and self.numerics == "exact":
            raise ValueError(f"miss {self.miss!r} rounds otherwise than the resident model: set numerics: equivalent")
        return self

    @property
    def id(self) -> str:
        """ "sha256:…" of where it holds and what it sets: profiles with one id run alike, whatever they are called."""
        held = self.model_dump(mode="json", include={"match", "limits", *CONFIGURATION})
        return f"sha256:{hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()}"

    @property
    def is_default(self) -> bool:
        """Whether it sets nothing but what is set where nothing was tuned."""
        return all(getattr(self, name) == getattr(Profile.default(), name) for name in CONFIGURATION)

    @property
    def gpu(self) -> str | None:
        """See `Match.gpu`."""
        return None if self.match is None else self.match.gpu

    @property
    def max_memory_bytes(self) -> int | None:
        """The limit that its user asked for; None: none but what is free."""
        return None if self.limits is None else self.limits.max_memory_bytes

    def with_overrides(self, overrides: Mapping[str, Any]) -> Profile:
        """A copy with dotted keys set, such as {"cache.slots": "25%"}.

        Another predictor comes with its own default period, where this one's was the default.

        Raises:
            ProfileError: an unknown key or a value that its key does not take.
        """
        if not isinstance(overrides, Mapping):
            raise ProfileError(f'overrides {overrides!r}: a mapping is needed, such as {{"cache.slots": "25%"}}')
        tree = self.model_dump(exclude_none=True)
        if (self.predictor.every, self.predictor.every_unit) == default_period(self.predictor.kind):
            del tree["predictor"]["every"], tree["predictor"]["every_unit"]
        for key, value in overrides.items():
            _set(tree, key, deepcopy(value))  # a later key may change what is inside
        return validate(tree, "override")


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a section, the sections' own names among them."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys(kind, f"{prefix}{name}.")


_KNOWN_KEYS = tuple(_keys(Profile))


def validate(tree: Mapping[Any, Any], where: str) -> Profile:
    """The profile that `tree` is.

    Raises:
        ProfileError: `where`, and everything that is wrong in one line.
    """
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        raise ProfileError(f"{where}: {'; '.join(_explain(dict(e)) for e in error.errors())}") from error


def _explain(error: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_nearest_key(key)}"
    if error["type"] == "missing":
        return f"{key!r} is missing"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, not {shorten(repr(error['input']), 80)}"


def _nearest_key(key: str) -> str:
    """Advice on an unknown dotted key: the like-named one of its section, else of any, else all of its section."""
    section, _, name = key.rpartition(".")
    own = {known.rpartition(".")[2]: known for known in _KNOWN_KEYS if known.rpartition(".")[0] == section}
    every = {known.rpartition(".")[2]: known for known in reversed(_KNOWN_KEYS)}
    for names, cutoff in ((own, 0.6), (every, 0.7)):
        if nearest := difflib.get_close_matches(name, names, n=1, cutoff=cutoff):
            return f"the nearest known one is {names[nearest[0]]!r}"
    known = own.values() if own else [known for known in _KNOWN_KEYS if "." not in known]
    return f"known {'there' if own and section else 'keys'}: {', '.join(known)}"


def _set(tree: dict[str, Any], key: str, value: object) -> None:
    *sections, name = key.split(".")
    for depth, section in enumerate(sections):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ProfileError(f"override: {'.'.join(sections[: depth + 1])!r} is no section; {_nearest_key(key)}")
    tree[name] = value
