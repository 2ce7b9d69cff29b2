"""The search space: one table of knobs. Each row says which profile key it sets, from what, and when it can act."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.profile import Profile

Value = int | str
Params = Mapping[str, Value]

POLICIES = ("lru", "lfru", "next_use", "td_next_use")
"""Policies that are tried. The others need a trained predictor, or loaded more than these on every trace and at every
budget that was replayed (results/replay-*.csv, results/LOG.md, 2026-11-26); a profile may still name them."""

_RUNGS = 8
"""Choices of the number of slots: the most that fit, and shares of it, each 1/sqrt(2) of the one above."""


@dataclass(frozen=True)
class Setting:
    """What the space depends on beside the profile: the model, the memory and the workload.

    Attributes:
        num_experts: of the whole model. num_slots_fit: at most that, the most slots that the memory holds.
        concurrency: requests outstanding.
        can_prefetch: whether the model has a predictor to go by.
    """

    num_experts: int
    num_slots_fit: int
    concurrency: int
    can_prefetch: bool = True


@dataclass(frozen=True)
class Knob:
    """One row.

    Attributes:
        name: of Optuna's parameter. key: dotted profile key.
        choices: in ascending order where `is_ordered`; at least one.
        default: the value of a knob that is left out or cannot act.
        acts: whether, given the knobs above it in the table, changing it can change what is measured.
    """

    name: str
    key: str
    choices: tuple[Value, ...]
    default: Value
    is_ordered: bool
    acts: Callable[[Params], bool]


def _always(params: Params) -> bool:
    return True


def _evicts(setting: Setting) -> Callable[[Params], bool]:
    """With a slot for every expert nothing is ever evicted."""
    return lambda params: int(params["slots"]) < setting.num_experts


def _prefetches(params: Params) -> bool:
    return int(params["depth"]) > 0


def table(setting: Setting, base: Profile) -> tuple[Knob, ...]:
    """Every knob for `setting`, in the order in which they are chosen; defaults are those of `base`.

    A knob with one choice cannot act; `Space` leaves it out.
    """
    groups = tuple(sorted({base.scheduler.group, *(group for group in (1, 2, 4, 8) if group <= setting.concurrency)}))
    policies = tuple(dict.fromkeys((*POLICIES, base.cache.policy)))
    depths = (0, 1, 2, 3) if setting.can_prefetch else (0,)
    depth = base.prefetch.depth if setting.can_prefetch else 0
    rungs = {max(1, round(setting.num_slots_fit * 2 ** (-i / 2))) for i in range(_RUNGS)}
    slots = _default_slots(setting, base)
    return (
        Knob("slots", "cache.slots", tuple(sorted(rungs | {slots})), slots, True, _always),
        Knob("group", "scheduler.group", groups, base.scheduler.group, True, _always),
        Knob("policy", "cache.policy", policies, base.cache.policy, False, _evicts(setting)),
        Knob("depth", "prefetch.depth", depths, depth, True, _always),
        Knob("count", "prefetch.count", (1, 2, 3, 4), base.prefetch.count, True, _prefetches),
        Knob("every", "predictor.every", tuple(range(1, 9)), base.predictor.every, True, _prefetches),
    )


def _default_slots(setting: Setting, base: Profile) -> int:
    """What the engine makes of `cache.slots`: None is as many as fit, a share is of all experts."""
    slots = base.cache.slots
    if slots is None:
        return setting.num_slots_fit
    wanted = round(setting.num_experts * float(slots.rstrip("%")) / 100) if isinstance(slots, str) else slots
    return max(1, min(wanted, setting.num_slots_fit))


class Space:
    """The knobs that can act for a setting, and the values of those that cannot.

    Args:
        fixed: profile keys that the user set; their knobs are left out at the value that `base` has.
    """

    def __init__(self, setting: Setting, base: Profile, fixed: Collection[str] = ()) -> None:
        self.setting = setting
        rows = table(setting, base)
        self._rows = rows
        self.knobs = tuple(knob for knob in rows if len(knob.choices) > 1 and knob.key not in fixed)
        acting = {name for params in self.configurations() for name in params}
        self.knobs = tuple(knob for knob in self.knobs if knob.name in acting)

    @property
    def default(self) -> dict[str, Value]:
        """The knobs of the default configuration that act in it."""
        return self._default_but({})

    def choose(self, pick: Callable[[Knob], Value]) -> dict[str, Value]:
        """Ask `pick` for every knob that acts, given what was picked before; {name: value}."""
        known: dict[str, Value] = {}
        picked: dict[str, Value] = {}
        for knob in self._rows:
            known[knob.name] = knob.default
            if knob in self.knobs and knob.acts(known):
                known[knob.name] = picked[knob.name] = pick(knob)
        return picked

    def complete(self, params: Params) -> dict[str, Value]:
        """Every row of the table: those that `params` leaves out at their default."""
        return {knob.name: params.get(knob.name, knob.default) for knob in self._rows}

    def overrides(self, params: Params) -> dict[str, Value]:
        """Dotted profile keys and values of a configuration."""
        return {knob.key: params.get(knob.name, knob.default) for knob in self._rows}

    def seeds(self) -> Iterator[dict[str, Value]]:
        """Configurations worth a first look: the default, larger groups, then fewer slots with the largest group."""
        yield self.default
        by_name = {knob.name: knob for knob in self.knobs}
        slots, group = by_name.get("slots"), by_name.get("group")
        largest = {} if group is None else {"group": group.choices[-1]}
        ladder = (1.0,) if slots is None else (1.0, 0.5, 0.25)
        for share in ladder:
            near = {} if slots is None else {"slots": _nearest(slots.choices, share * self.setting.num_slots_fit)}
            yield self._default_but({**largest, **near})

    def _default_but(self, params: Params) -> dict[str, Value]:
        return self.choose(lambda knob: params.get(knob.name, knob.default))

    def size(self) -> int:
        """Number of distinct configurations."""
        return sum(1 for _ in self.configurations())

    def configurations(self) -> Iterator[dict[str, Value]]:
        """Every configuration once."""
        yield from self._extend(0, {}, {})

    def _extend(self, row: int, known: dict[str, Value], picked: dict[str, Value]) -> Iterator[dict[str, Value]]:
        if row == len(self._rows):
            yield dict(picked)
            return
        knob = self._rows[row]
        known = {**known, knob.name: knob.default}
        if knob not in self.knobs or not knob.acts(known):
            yield from self._extend(row + 1, known, picked)
            return
        for value in knob.choices:
            yield from self._extend(row + 1, known | {knob.name: value}, picked | {knob.name: value})

    def digest(self) -> str:
        """Short hash of the table: studies over different spaces must not be mixed."""
        rows: list[Any] = [[knob.name, knob.key, knob.choices, knob.default] for knob in self._rows]
        return hashlib.sha256(json.dumps([rows, [k.name for k in self.knobs]]).encode()).hexdigest()[:12]


def _nearest(choices: Collection[Value], wanted: float) -> Value:
    return min(choices, key=lambda value: abs(int(value) - wanted))
