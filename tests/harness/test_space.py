"""The table of knobs: what is in it for a setting, what acts, and what stays at its default."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from harness.search.space import POLICIES, Params, Setting, Space, Value
from runtime.profile import Profile

BASE = Profile.default()
KERNELS = ("compute.prefill", "compute.decode")


def _space(experts: int = 256, fit: int = 256, concurrency: int = 8, **fixed: object) -> Space:
    return _of(Setting(experts, fit, concurrency), **fixed)


def _of(setting: Setting, **fixed: object) -> Space:
    keys = {name.replace("__", "."): value for name, value in fixed.items()}
    return Space(setting, BASE.with_overrides(keys), fixed=tuple(keys))


def _small(**fixed: object) -> Space:
    """Small enough to look at every configuration."""
    kept: dict[str, object] = {"compute__prefill": "eager", "compute__decode": "eager", "transfer__io_threads": 1}
    return _of(Setting(64, 40, 8, predictors=("gate_lookahead", "previous_token")), **kept, **fixed)


def _choices(space: Space, name: str) -> tuple[object, ...]:
    return next((knob.choices for knob in space.knobs if knob.name == name), ())


def test_slots_fall_from_all_that_fit() -> None:
    slots = _choices(_space(fit=100), "slots")
    assert slots[-1] == 100 and list(slots) == sorted(set(slots)) and 50 in slots and min(map(int, slots)) >= 1


def test_the_default_is_the_profile_that_runs_untuned() -> None:
    for concurrency in (1, 8):
        space = _space(fit=100, concurrency=concurrency)
        profile = BASE.with_overrides(space.overrides(space.default))
        assert profile.with_overrides({"cache.slots": "100%"}) == BASE.with_overrides({"cache.slots": "100%"})
        assert profile.cache.slots == 100


def test_every_knob_of_the_table_is_searched_where_it_can_act() -> None:
    setting = Setting(256, 100, 8, num_cores=6, predictors=("gate_lookahead", "previous_token"))
    assert [knob.name for knob in Space(setting, BASE).knobs] == [
        *("slots", "group", "scheduler", "window", "policy", "depth", "predictor", "count", "every"),
        *("io_threads", "prefill", "decode", "threads"),
    ]
    assert _choices(Space(setting, BASE), "threads") == (1, 2, 3, 4, 6)


def test_group_is_left_out_for_one_request_at_a_time() -> None:
    space = _space(concurrency=1)
    assert _choices(space, "group") == () and space.overrides(space.default)["scheduler.group"] == 1
    assert _choices(_space(concurrency=3), "group") == (1, 2) and _choices(_space(concurrency=20), "group")[-1] == 16


def test_batches_are_scheduled_only_where_requests_are_left_to_choose_from() -> None:
    seen: dict[tuple[int, str], set[object]] = {}
    for params in _small(cache__policy="lru", cache__slots=9).configurations():
        found = seen.setdefault((int(params["group"]), str(params.get("scheduler"))), set())
        found.add(params.get("window"))
    assert seen == {
        (1, "None"): {None},
        (2, "fifo"): {None},
        (2, "route_overlap"): {2, 4},
        (4, "fifo"): {None},
        (4, "route_overlap"): {None},
        (8, "None"): {None},
    }


def test_where_the_window_does_not_act_the_engine_has_its_own() -> None:
    space = _small()
    for kind, batches in (("fifo", 1), ("route_overlap", 2)):
        params = space.choose(_picking(group=4, scheduler=kind))
        assert "scheduler.window" not in space.overrides(params) and space.complete(params)["window"] == batches
        assert BASE.with_overrides(space.overrides(params)).scheduler.num_batches == batches
    fixed = _small(scheduler__window=4)
    assert fixed.overrides(fixed.default)["scheduler.window"] == 4


def _picking(**wanted: Value):  # type: ignore[no-untyped-def]
    return lambda knob: wanted.get(knob.name, knob.default)


def test_prefetch_count_and_predictor_act_only_with_depth() -> None:
    for params in _small().configurations():
        assert ({"predictor", "count", "every"} <= params.keys()) == (params["depth"] != 0)
    space = _small()
    overrides = space.overrides(space.choose(_picking(depth=0)))
    assert (overrides["prefetch.count"], overrides["predictor.every"]) == (2, 1)


def test_policy_acts_only_where_something_is_evicted() -> None:
    space = _of(Setting(64, 64, 1), prefetch__depth=0, transfer__io_threads=2)
    assert all(("policy" in params) == (params["slots"] != 64) for params in space.configurations())


def test_without_a_predictor_nothing_is_prefetched() -> None:
    space = Space(Setting(64, 32, 1, predictors=()), BASE, fixed=(*KERNELS, "transfer.io_threads"))
    assert {knob.name for knob in space.knobs} == {"slots", "policy"}
    assert space.overrides(space.default)["prefetch.depth"] == 0


def test_a_predictor_that_the_profile_lacks_takes_nothing_over_from_it(tmp_path: Path) -> None:
    artifact = str(tmp_path / "trained.npz")
    own = {"predictor.kind": "routing_path", "predictor.artifact": artifact, "predictor.params": {"context": 64}}
    base = BASE.with_overrides(own)
    setting = Setting(64, 32, 1, predictors=("routing_path", "gate_lookahead", "sequence", "periodic"))
    space = Space(setting, base, fixed=(*KERNELS, "transfer.io_threads", "cache.slots"))
    assert _choices(space, "predictor") == ("routing_path", "gate_lookahead", "periodic")
    assert space.default["predictor"] == "routing_path"
    profiles = {}
    for params in space.configurations():
        assert ("every" in params) == (params["depth"] != 0 and params["predictor"] != "periodic")
        profiles[params.get("predictor", "")] = base.with_overrides(space.overrides(params)).predictor
    assert profiles["routing_path"].artifact == artifact and profiles["routing_path"].params == {"context": 64}
    assert profiles["gate_lookahead"].artifact is None and profiles["gate_lookahead"].params == {}
    assert (profiles["periodic"].every, profiles["periodic"].every_unit) == (40, "prompt")
    fixed = Space(setting, base, fixed=("predictor.artifact",))
    assert _choices(fixed, "predictor") == () and fixed.default["depth"] == 1


def test_a_default_predictor_that_the_model_lacks_is_not_the_default() -> None:
    space = Space(Setting(64, 32, 1, predictors=("previous_token",)), BASE)
    assert space.default["depth"] == 0 and _choices(space, "depth") == (0, 1, 2, 3)
    params = space.choose(_picking(depth=2))
    assert space.overrides(params)["predictor.kind"] == "previous_token"


def test_what_the_user_fixed_is_never_touched() -> None:
    fixed = {"cache__policy": "lfu", "prefetch__depth": 5, "cache__slots": 7, "scheduler__group": 3}
    space = _small(**fixed)
    assert {knob.name for knob in space.knobs} == {"scheduler", "window", "predictor", "count", "every"}
    for params in space.configurations():
        overrides = space.overrides(params)
        assert [overrides[name.replace("__", ".")] for name in fixed] == list(fixed.values())


def test_a_predictor_that_the_user_fixed_is_kept_whatever_the_setting_says() -> None:
    space = _of(Setting(64, 32, 1, predictors=("gate_lookahead",)), predictor__kind="activation_matrix")
    assert _choices(space, "predictor") == () and "every" in space.default
    assert space.overrides(space.default)["predictor.kind"] == "activation_matrix"
    assert _choices(_of(Setting(64, 32, 1), predictor__kind="none"), "depth") == ()


@pytest.mark.parametrize(("wanted", "slots"), [("25%", 64), (1000, 100), (None, 100)])
def test_default_slots_are_resolved_as_the_engine_does(wanted: object, slots: int) -> None:
    space = _space(fit=100, cache__slots=wanted)
    assert space.overrides({})["cache.slots"] == slots


def test_seeds_begin_with_the_default_and_are_configurations() -> None:
    space = _space(fit=100)
    seeds = list(space.seeds())
    assert seeds[0] == space.default and all(map(space.contains, seeds))
    assert {seed["group"] for seed in seeds[1:]} == {8} and {seed["slots"] for seed in seeds} == {100, 50, 25}


def test_configurations_are_distinct_and_counted_without_looking_at_each() -> None:
    for space in (_small(), _small(scheduler__kind="route_overlap"), _of(Setting(64, 64, 2), prefetch__count=2)):
        found = [tuple(sorted(params.items())) for params in space.configurations()]
        assert len(set(found)) == len(found) == space.size()
    by_hand = _of(Setting(64, 3, 1), compute__prefill="eager", compute__decode="eager")
    assert by_hand.size() == 3 * len(POLICIES) * (1 + 3 * 4 * 4) * 3
    huge = Setting(4096, 2048, 64, num_cores=64, predictors=("gate_lookahead", "previous_token", "activation_matrix"))
    assert Space(huge, BASE).size() > 10**7


def test_every_configuration_is_a_profile_and_no_two_are_the_same() -> None:
    space = _small(cache__policy="lru")
    profiles = {
        json.dumps(BASE.with_overrides(space.overrides(params)).model_dump()) for params in space.configurations()
    }
    assert len(profiles) == space.size()


def test_samples_are_configurations_and_reach_every_choice() -> None:
    space, draw = _small(), random.Random(0)
    samples = [space.sample(draw) for _ in range(400)]
    assert all(map(space.contains, samples))
    for knob in space.knobs:
        assert {params[knob.name] for params in samples if knob.name in params} == set(knob.choices)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"slots": 99}, {"depth": 0}, {"window": 4}, {"scheduler": "fifo"}, {"unknown": 1}, {"policy": "belady"}],
)
def test_what_is_no_configuration_is_told(wrong: Params) -> None:
    space = _small()
    assert space.contains(space.default) and not space.contains({**space.default, **wrong} if wrong else {})


def test_another_setting_of_the_same_profile() -> None:
    space = _space(fit=100, cache__policy="lfu")
    other = space.within(dataclasses.replace(space.setting, num_slots_fit=90))
    assert other.digest() == _space(fit=90, cache__policy="lfu").digest() != space.digest()


def test_a_setting_survives_json() -> None:
    setting = Setting(64, 32, 8, num_cores=4, predictors=("gate_lookahead", "previous_token"))
    again = Setting(**json.loads(json.dumps(dataclasses.asdict(setting))))
    assert again == setting and hash(again) == hash(setting)


def test_the_digest_tells_spaces_apart() -> None:
    assert _space().digest() == _space().digest() != _space(fit=99).digest()
    assert _space(cache__policy="next_use").digest() != _space().digest()
    assert _space(concurrency=4).digest() != _space().digest()
