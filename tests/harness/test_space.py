"""The table of knobs: what is in it for a setting, what acts, and what stays at its default."""

from __future__ import annotations

import dataclasses

import pytest

from harness.search.space import POLICIES, Setting, Space
from runtime.profile import Profile

BASE = Profile.default()


def _space(experts: int = 256, fit: int = 256, concurrency: int = 8, **fixed: object) -> Space:
    keys = {name.replace("__", "."): value for name, value in fixed.items()}
    return Space(Setting(experts, fit, concurrency), BASE.with_overrides(keys), fixed=tuple(keys))


def _choices(space: Space, name: str) -> tuple[object, ...]:
    return next((knob.choices for knob in space.knobs if knob.name == name), ())


def test_slots_fall_from_all_that_fit() -> None:
    slots = _choices(_space(fit=100), "slots")
    assert slots[-1] == 100 and list(slots) == sorted(set(slots)) and 50 in slots and min(map(int, slots)) >= 1


def test_the_default_is_the_profile_that_runs_untuned() -> None:
    space = _space(fit=100)
    profile = BASE.with_overrides(space.overrides(space.default))
    assert profile.with_overrides({"cache.slots": "100%"}) == BASE.with_overrides({"cache.slots": "100%"})
    assert profile.cache.slots == 100


def test_group_is_left_out_for_one_request_at_a_time() -> None:
    space = _space(concurrency=1)
    assert _choices(space, "group") == () and space.overrides(space.default)["scheduler.group"] == 1
    assert _choices(_space(concurrency=3), "group") == (1, 2) and _choices(_space(), "group") == (1, 2, 4, 8)


def test_prefetch_count_and_predictor_act_only_with_depth() -> None:
    space = _space(fit=64)
    for params in space.configurations():
        assert ({"count", "every"} <= params.keys()) == (params["depth"] != 0)
        if not params["depth"]:
            overrides = space.overrides(params)
            assert (overrides["prefetch.count"], overrides["predictor.every"]) == (2, 1)


def test_policy_acts_only_where_something_is_evicted() -> None:
    space = _space(experts=64, fit=64)
    assert all(("policy" in params) == (params["slots"] != 64) for params in space.configurations())


def test_without_a_predictor_nothing_is_prefetched() -> None:
    setting = dataclasses.replace(Setting(64, 32, 1), can_prefetch=False)
    space = Space(setting, BASE)
    assert {knob.name for knob in space.knobs} == {"slots", "policy"}
    assert space.overrides(space.default)["prefetch.depth"] == 0


def test_what_the_user_fixed_is_never_touched() -> None:
    space = _space(cache__policy="lfu", prefetch__depth=0, cache__slots=7)
    assert {knob.name for knob in space.knobs} == {"group"}
    assert all(space.overrides(p)["cache.policy"] == "lfu" for p in space.configurations())
    assert all(space.overrides(p)["cache.slots"] == 7 for p in space.configurations())


@pytest.mark.parametrize(("wanted", "slots"), [("25%", 64), (1000, 100), (None, 100)])
def test_default_slots_are_resolved_as_the_engine_does(wanted: object, slots: int) -> None:
    space = _space(fit=100, cache__slots=wanted)
    assert space.overrides({})["cache.slots"] == slots


def test_seeds_begin_with_the_default_and_are_configurations() -> None:
    space = _space(fit=100)
    seeds = list(space.seeds())
    assert seeds[0] == space.default and all(seed in list(space.configurations()) for seed in seeds)
    assert {seed["group"] for seed in seeds[1:]} == {8} and {seed["slots"] for seed in seeds} == {100, 50, 25}


def test_configurations_are_distinct_and_counted() -> None:
    space = _space(fit=3, concurrency=1)
    found = [tuple(sorted(params.items())) for params in space.configurations()]
    assert len(set(found)) == len(found) == space.size() == 3 * len(POLICIES) * (1 + 3 * 4 * 8)


def test_the_digest_tells_spaces_apart() -> None:
    assert _space().digest() == _space().digest() != _space(fit=99).digest()
    assert _space(cache__policy="next_use").digest() != _space().digest()
