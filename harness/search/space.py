"""The search space: one table of knobs. Each row says which profile key it sets, from what, and when it can act."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from runtime.predictors.params import TRAINED, default_period
from runtime.profile import MISS_ACTIONS, Profile, Scheduler

Value = int | str
Params = Mapping[str, Value]
When = Mapping[str, tuple[Value, ...]]

POLICIES = ("lru", "lfru", "next_use", "td_next_use")
"""Policies that are tried. The others need a trained predictor, or loaded more than these on every trace and at every
budget that was replayed (results/replay-*.csv, results/LOG.md, 2026-11-26); a profile may still name them."""

HOST_SHARE = "compute.host_share"
MEASURED = "measured"
"""As a choice of the host's share: None in a profile, by the rates that the engine measures on loading."""
_HOST_SHARES = ("0.25", "0.5", "0.75")
_RUNGS = 8
"""Choices of the number of slots beside `Setting.fewer_slots`: the most that fit, and shares of it, each 1/sqrt(2) of
the one above."""
_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_MAX_GROUP = 64


@dataclass(frozen=True)
class Setting:
    """What the space depends on beside the profile: the model, the machine and the workload.

    Attributes:
        num_experts: of the whole model. num_slots_fit: at most that, the most slots that the memory holds.
            fewer_slots: the most beside more sequences, which need KV caches.
        concurrency: requests outstanding. num_cores: that compute.
        predictors: that the model has; empty: nothing to prefetch by. One that cannot do without an artefact is left
            out unless it is the profile's own.
        prefill_kernels, decode_kernels: that compute the model's experts.
        on_gpu: it computes on a GPU, its experts in host memory; has_disk_tier: not all of them have room there.
    """

    num_experts: int
    num_slots_fit: int
    concurrency: int
    num_cores: int = 1
    predictors: tuple[str, ...] = ("gate_lookahead",)
    prefill_kernels: tuple[str, ...] = ("eager", "grouped_mm")
    decode_kernels: tuple[str, ...] = ("eager", "grouped_mm", "gemv")
    fewer_slots: tuple[int, ...] = ()
    on_gpu: bool = False
    has_disk_tier: bool = False

    def __post_init__(self) -> None:
        for name in (
            "predictors",
            "prefill_kernels",
            "decode_kernels",
            "fewer_slots",
        ):  # lists, where it was JSON in between
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class Knob:
    """One row.

    Attributes:
        name: of Optuna's parameter. key: dotted profile key.
        choices: in ascending order where `is_ordered`; at least one.
        default: of `choices`, what the default configuration has where the knob acts.
        idle: what the profile keeps where it does not act; None: nothing.
        when: it acts where each of these knobs, all above it in the table, has one of these values: only there can
            changing it change what is measured.
    """

    name: str
    key: str
    choices: tuple[Value, ...]
    default: Value
    idle: Value | None
    is_ordered: bool = True
    when: When = field(default_factory=dict)

    def acts(self, known: Mapping[str, Value | None]) -> bool:
        """Whether it acts beside the values of the knobs above it."""
        return all(known[name] in allowed for name, allowed in self.when.items())


def params_key(params: Params) -> str:
    """Equal for equal configurations; JSON."""
    return json.dumps(dict(params), sort_keys=True)


def table(setting: Setting, base: Profile, fixed: Collection[str] = ()) -> tuple[Knob, ...]:
    """Every knob for `setting`, in the order in which they are chosen; defaults are those of `base`."""
    caching, prefetching = tuple(_cache_and_batches(setting, base)), tuple(_prefetching(setting, base, fixed))
    io_threads = _ordered("io_threads", "transfer.io_threads", (1, 2, 4), base.transfer.io_threads)
    prefill = _named("prefill", "compute.prefill", setting.prefill_kernels, base.compute.prefill)
    decode = _named("decode", "compute.decode", setting.decode_kernels, base.compute.decode)
    threads = _ordered("threads", "compute.threads", _up_to(setting.num_cores), base.compute.threads)
    if not setting.on_gpu:
        return (*caching, *prefetching, io_threads, prefill, decode, threads)
    # Demand and prefetch have a stream each, or share one: without prefetch one is left.
    streams = _ordered("streams", "transfer.streams", (1, 2), base.transfer.streams, _where_prefetched(prefetching))
    from_disk = (io_threads,) if setting.has_disk_tier else ()
    on_cpu = _missing(caching, base, threads) if base.numerics == "equivalent" else ()
    return (*caching, *prefetching, streams, *from_disk, prefill, decode, *on_cpu)


def _cache_and_batches(setting: Setting, base: Profile) -> Iterator[Knob]:
    slots, scheduler, outstanding = _default_slots(setting, base), base.scheduler, setting.concurrency
    rungs = [max(1, round(setting.num_slots_fit * 2 ** (-i / 2))) for i in range(_RUNGS)]
    yield (by_slots := _ordered("slots", "cache.slots", (*rungs, *setting.fewer_slots), slots))
    powers = [2**i for i in range(_MAX_GROUP.bit_length()) if 2**i <= outstanding]
    yield (by_group := _ordered("group", "scheduler.group", powers, scheduler.group))
    groups = [int(group) for group in by_group.choices]
    # One batch that holds every request leaves nothing to choose, batches of one nothing to group.
    split: When = {"group": tuple(group for group in groups if 1 < group < outstanding)}
    yield _named("scheduler", "scheduler.kind", ("fifo", "route_overlap"), scheduler.kind, split)
    # Two batches are the least; more can only hold more requests where two do not hold all.
    wide: When = {"scheduler": ("route_overlap",), "group": tuple(g for g in groups if g > 1 and 2 * g < outstanding)}
    window = scheduler.window or Scheduler(kind="route_overlap").num_batches
    yield replace(_ordered("window", "scheduler.window", (2, 4), window, wide), idle=scheduler.window)
    # With a slot for every expert nothing is ever evicted.
    evicting: When = {"slots": tuple(value for value in by_slots.choices if int(value) < setting.num_experts)}
    yield _named("policy", "cache.policy", POLICIES, base.cache.policy, evicting)


def _missing(caching: Iterable[Knob], base: Profile, threads: Knob) -> Iterator[Knob]:
    """What is done about an expert that is not on the GPU, where results may be rounded otherwise: where any is not."""
    evicting = next(knob.when for knob in caching if knob.name == "policy")
    yield _named("miss", "miss", MISS_ACTIONS, base.miss, evicting)
    share = MEASURED if base.compute.host_share is None else str(base.compute.host_share)
    yield _named("host_share", HOST_SHARE, (MEASURED, *_HOST_SHARES), share, {"miss": ("auto",)})
    yield replace(threads, when={"miss": ("compute", "auto")})


def _where_prefetched(prefetching: Iterable[Knob]) -> When:
    return next(knob.when for knob in prefetching if knob.name == "count")


def _prefetching(setting: Setting, base: Profile, fixed: Collection[str]) -> Iterator[Knob]:
    predictors, own = _predictors(setting, base, fixed), base.predictor
    depth = base.prefetch.depth if own.kind in predictors or "prefetch.depth" in fixed else 0
    by_depth = _ordered("depth", "prefetch.depth", (0, 1, 2, 3) if predictors else (), depth)
    yield by_depth
    on: When = {"depth": tuple(value for value in by_depth.choices if predictors and value)}
    kind = own.kind if own.kind in predictors or not predictors else predictors[0]
    yield _named("predictor", "predictor.kind", predictors, kind, on)
    yield _ordered("count", "prefetch.count", (1, 2, 3, 4), base.prefetch.count, on)
    # `periodic` counts prompts, and forecasts itself as often as it means to.
    stepwise: When = {**on, "predictor": tuple(name for name in predictors if default_period(name)[1] == "step")}
    every = own.every if own.every_unit == "step" else 1
    yield replace(_ordered("every", "predictor.every", (1, 2, 4, 8), every, stepwise), idle=own.every)


def _predictors(setting: Setting, base: Profile, fixed: Collection[str]) -> tuple[str, ...]:
    """Those that can be had: an artefact is for the predictor that `base` names, and no other."""
    own = base.predictor
    usable = [name for name in setting.predictors if not TRAINED.get(name) or (name == own.kind and own.artifact)]
    if {"predictor.kind", "predictor.artifact", "predictor.params", "predictor.every_unit"} & set(fixed):
        # Only of gate_lookahead does the setting know better than the user that it is not there.
        has_it = own.kind in usable or own.kind not in ("none", "gate_lookahead")
        return (own.kind,) if has_it else ()
    return tuple(dict.fromkeys(usable))


def _ordered(name: str, key: str, choices: Iterable[int], default: int, when: When | None = None) -> Knob:
    return Knob(name, key, tuple(sorted({*choices, default})), default, default, True, when or {})


def _named(name: str, key: str, choices: Iterable[str], default: str, when: When | None = None) -> Knob:
    return Knob(name, key, tuple(dict.fromkeys((*choices, default))), default, default, False, when or {})


def _up_to(most: int) -> list[int]:
    return [*(step for step in _STEPS if step < most), most]


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

    Attributes:
        knobs: those that act in some configuration and have more than one choice, in order.
    """

    def __init__(self, setting: Setting, base: Profile, fixed: Collection[str] = ()) -> None:
        self.setting, self._base, self._fixed = setting, base, tuple(fixed)
        self._rows = table(setting, base, fixed)
        self._free = frozenset(row.name for row in self._rows if len(row.choices) > 1 and row.key not in fixed)
        self._size, acting = self._count()
        self.knobs = tuple(row for row in self._rows if row.name in acting)

    def within(self, setting: Setting) -> Space:
        """The space of the same profile and fixed keys for another setting."""
        return Space(setting, self._base, self._fixed)

    @property
    def default(self) -> dict[str, Value]:
        """The knobs of the default configuration that act in it."""
        return self.near({})

    def choose(self, pick: Callable[[Knob], Value]) -> dict[str, Value]:
        """Ask `pick` for every knob that acts, given what was picked before; {name: value}."""
        known: dict[str, Value | None] = {}
        picked: dict[str, Value] = {}
        for knob in self._rows:
            known[knob.name] = knob.idle
            if self._acts(knob, known):
                known[knob.name] = picked[knob.name] = pick(knob)
        return picked

    def _acts(self, knob: Knob, known: Mapping[str, Value | None]) -> bool:
        return knob.name in self._free and knob.acts(known)

    def sample(self, draw: random.Random) -> dict[str, Value]:
        """A configuration, each knob that acts drawn evenly."""
        return self.choose(lambda knob: draw.choice(knob.choices))

    def contains(self, params: Params) -> bool:
        """Whether it is a configuration: just the knobs that act, each at one of its choices."""
        try:
            return self.choose(lambda knob: params[knob.name]) == params and all(
                params[knob.name] in knob.choices for knob in self.knobs if knob.name in params
            )
        except KeyError:
            return False

    def complete(self, params: Params) -> dict[str, Value]:
        """Every row of the table: those that `params` leaves out as the engine then has them."""
        found = {knob.name: params.get(knob.name, knob.idle) for knob in self._rows}
        if found["window"] is None:
            found["window"] = Scheduler(kind=str(found["scheduler"])).num_batches
        return {name: value for name, value in found.items() if value is not None}

    def overrides(self, params: Params) -> dict[str, Any]:
        """Dotted profile keys and values of a configuration."""
        found: dict[str, Any] = {knob.key: params.get(knob.name, knob.idle) for knob in self._rows}
        kind = found["predictor.kind"]
        if kind != self._base.predictor.kind:  # what the profile says of its own predictor is not for another
            every, unit = default_period(kind)
            found |= {"predictor.artifact": None, "predictor.params": {}, "predictor.every_unit": unit}
            found["predictor.every"] = params.get("every", every)
        if (share := found.get(HOST_SHARE)) is not None:
            found[HOST_SHARE] = None if share == MEASURED else float(share)
        return {key: value for key, value in found.items() if value is not None or key != "scheduler.window"}

    def seeds(self) -> Iterator[dict[str, Value]]:
        """Configurations worth a first look where nothing foretells any: the default, larger groups, then fewer slots
        with the largest group."""
        yield self.default
        by_name = {knob.name: knob for knob in self.knobs}
        slots, group = by_name.get("slots"), by_name.get("group")
        largest = {} if group is None else {"group": group.choices[-1]}
        ladder = (1.0,) if slots is None else (1.0, 0.5, 0.25)
        for share in ladder:
            near = {} if slots is None else {"slots": _nearest(slots.choices, share * self.setting.num_slots_fit)}
            yield self.near({**largest, **near})

    def near(self, params: Params) -> dict[str, Value]:
        """The configuration that has these values where their knobs act, the others at their default."""
        return self.choose(lambda knob: params.get(knob.name, knob.default))

    def size(self) -> int:
        """Number of distinct configurations."""
        return self._size

    def _count(self) -> tuple[int, set[str]]:
        """Configurations, and the names of the knobs that act in any: what one knob's choices do is multiplied out, and
        only the values that a later row asks about are told apart."""
        counts: dict[tuple[tuple[str, Value | None], ...], int] = {(): 1}
        acting: set[str] = set()
        for index, knob in enumerate(self._rows):
            asked = {name for row in self._rows[index + 1 :] for name in row.when}
            following: dict[tuple[tuple[str, Value | None], ...], int] = {}
            for state, number in counts.items():
                acts = self._acts(knob, dict(state))
                acting |= {knob.name} if acts else set()
                for value in knob.choices if acts else (knob.idle,):
                    extended = tuple(pair for pair in (*state, (knob.name, value)) if pair[0] in asked)
                    following[extended] = following.get(extended, 0) + number
            counts = following
        return sum(counts.values()), acting

    def configurations(self) -> Iterator[dict[str, Value]]:
        """Every configuration once."""
        yield from self._extend(0, {}, {})

    def _extend(self, row: int, known: dict[str, Value | None], picked: dict[str, Value]) -> Iterator[dict[str, Value]]:
        if row == len(self._rows):
            yield dict(picked)
            return
        knob = self._rows[row]
        if not self._acts(knob, known):
            yield from self._extend(row + 1, known | {knob.name: knob.idle}, picked)
            return
        for value in knob.choices:
            yield from self._extend(row + 1, known | {knob.name: value}, picked | {knob.name: value})

    def digest(self) -> str:
        """Short hash of the table: studies over different spaces must not be mixed."""
        rows = [[row.name, row.key, row.choices, row.default, row.idle, sorted(row.when.items())] for row in self._rows]
        acting = [knob.name for knob in self.knobs]
        return hashlib.sha256(json.dumps([rows, acting]).encode()).hexdigest()[:12]


def _nearest(choices: Collection[Value], wanted: float) -> Value:
    return min(choices, key=lambda value: abs(int(value) - wanted))
