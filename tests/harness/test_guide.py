"""The guide: what it proposes, when it holds its tongue, and the memory guard that it goes by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from test_study import measurement, ok, space

from harness.hardware.memory import MemoryModel
from harness.search.agreement import MIN_PAIRS
from harness.search.guide import FIRST_ROUND, LATER_ROUND, Guide, neighbours
from harness.search.memory_guard import MARGIN, MemoryGuard
from harness.search.objective import Objective
from harness.search.outcome import Kind, Limits, Measurement, Outcome, Record, Tried
from harness.search.space import Params, Space
from harness.search.study import explore

MIB = 1 << 20
MODEL = MemoryModel(num_experts=64, slot_bytes=MIB, dense_bytes=2 * MIB, buffer_bytes=MIB, kv_bytes_per_sequence=0)


@dataclass(frozen=True)
class Foretold:
    latency_ms_p50: float
    ttft_ms_p50: float = 1.0
    tpot_ms_p50: float | None = 1.0


def true_latency(overrides: Mapping[str, Any]) -> float:
    """A made-up machine: slots and groups help, depth 2 is best, so is next_use."""
    latency = 200.0 - 2 * overrides["cache.slots"] + 4 * abs(overrides["prefetch.depth"] - 2)
    latency *= {"next_use": 0.9}.get(overrides["cache.policy"], 1.0)
    return float(latency / overrides["scheduler.group"] ** 0.5)


class Simulator:
    """Right up to a factor, or wrong altogether."""

    def __init__(self, sign: float = 1.0) -> None:
        self.sign, self.num_observed, self.num_runs = sign, 0, 0

    def run(self, overrides: Mapping[str, Any]) -> Foretold:
        self.num_runs += 1
        return Foretold(100.0 + self.sign * 0.7 * true_latency(overrides))

    def calibrated(self, observations: Sequence[tuple[Mapping[str, Any], Measurement]]) -> Simulator:
        self.num_observed = len(observations)
        return self


def guard(where: Space, limit_bytes: int = 43 * MIB) -> MemoryGuard:
    return MemoryGuard(MODEL, MODEL, where, limit_bytes)


def guide(
    where: Space,
    simulator: Simulator,
    limits: Limits | None = None,
    objective: Objective = Objective.LATENCY,
    **options: Any,
) -> Guide:
    return Guide(
        where,
        simulator,
        where.overrides,
        guard(where),
        limits or Limits(43 * MIB),
        objective,
        explore,
        num_simulated=60,
        **options,
    )


def tried(where: Space, params: Params, error: float = 0.0) -> Tried:
    overrides = where.overrides(params)
    peak = MODEL.predict(int(overrides["cache.slots"]), 1).total_bytes * (1 + error)
    return Tried(params, (measurement(true_latency(overrides), round(peak)),))


def records(where: Space, done: Sequence[Params], simulator: Simulator | None = None) -> list[Record]:
    return [
        Record(
            number,
            params,
            replace(
                ok(true_latency(where.overrides(params))),
                foretold_ms=None if simulator is None else simulator.run(where.overrides(params)).latency_ms_p50,
            ),
            False,
        )
        for number, params in enumerate(done)
    ]


def narrow() -> Space:
    return space(
        40,
        8,
        **{
            "compute.prefill": "eager",
            "compute.decode": "eager",
            "compute.threads": 1,
            "transfer.io_threads": 2,
            "scheduler.kind": "fifo",
        },
    )


def test_the_first_round_holds_the_optimum_of_what_fits_and_smaller_ones() -> None:
    where = narrow()
    default = tried(where, where.default)
    proposed = guide(where, Simulator()).propose(records(where, [where.default]), [default])
    assert len(proposed) == FIRST_ROUND and where.default not in proposed
    watch = guard(where)
    watch.learn([default])
    fitting = [params for params in where.configurations() if watch.allows(params)]
    optimum = min(true_latency(where.overrides(params)) for params in fitting)
    assert min(true_latency(where.overrides(params)) for params in proposed) == optimum
    assert min(int(params["slots"]) for params in proposed) < 20
    assert all(watch.allows(params) for params in proposed)


def test_between_two_rounds_the_sampler_has_its_turn() -> None:
    where = narrow()
    lead = guide(where, Simulator())
    assert lead.propose([], []) == []  # the default comes first
    done = [where.default]
    done += lead.propose(records(where, done), [tried(where, where.default)])
    measured = [tried(where, params) for params in done]
    assert lead.propose(records(where, done), measured) == []
    second = lead.propose(records(where, done), measured)
    assert len(second) == LATER_ROUND and not [params for params in second if params in done]


def test_for_memory_what_is_much_slower_than_the_default_is_not_the_best() -> None:
    where = narrow()

    class Cliff(Simulator):
        def run(self, overrides: Mapping[str, Any]) -> Foretold:
            return Foretold(100.0 if overrides["cache.slots"] >= 14 else 200.0)

    proposed = guide(where, Cliff(), objective=Objective.MEMORY).propose(
        records(where, [where.default]), [tried(where, where.default)]
    )
    assert [params["slots"] for params in proposed[: FIRST_ROUND // 2]] == [14] * (FIRST_ROUND // 2)


def test_it_is_calibrated_by_every_run_before_each_round() -> None:
    where, simulator = narrow(), Simulator()
    lead = guide(where, simulator)
    assert lead.foretell(where.default) is None
    lead.propose(records(where, [where.default]), [Tried(where.default, (measurement(10.0), measurement(11.0)))])
    assert simulator.num_observed == 2
    assert lead.foretell(where.default) == pytest.approx(100.0 + 0.7 * true_latency(where.overrides(where.default)))


@pytest.mark.parametrize(("sign", "is_heard"), [(1.0, True), (-0.5, False)])
def test_it_is_heard_as_long_as_its_order_is_that_of_what_is_measured(sign: float, is_heard: bool) -> None:
    where = narrow()
    lead = guide(where, Simulator(sign))
    some = [params for params in where.configurations() if where.overrides(params)["prefetch.depth"] == 2]
    distinct = {true_latency(where.overrides(params)): params for params in some}
    done = [where.default, *list(distinct.values())[:: len(distinct) // MIN_PAIRS]]
    assert bool(lead.propose(records(where, done), [tried(where, params) for params in done])) is is_heard


def test_it_begins_with_what_it_guesses_where_the_default_does_not_run() -> None:
    where = narrow()
    failed = Record(0, where.default, Outcome(Kind.OUT_OF_MEMORY, "no memory"), False)
    assert len(guide(where, Simulator()).propose([failed], [])) == FIRST_ROUND


@pytest.mark.parametrize("off", [1.0, 5.0, 0.2])
def test_limits_on_times_hold_for_what_is_proposed(off: float) -> None:
    """Whatever the simulator is off by for all configurations; the default was measured at 1 ms."""
    where = narrow()

    class Slow(Simulator):
        def run(self, overrides: Mapping[str, Any]) -> Foretold:
            return Foretold(true_latency(overrides), ttft_ms_p50=off * overrides["scheduler.group"])

    proposed = guide(where, Slow(), Limits(slo_ttft_ms=2.0)).propose(
        records(where, [where.default]), [tried(where, where.default)]
    )
    assert {where.overrides(params)["scheduler.group"] for params in proposed} >= {2}
    assert all(where.overrides(params)["scheduler.group"] <= 2 for params in proposed)


def test_neighbours_differ_in_one_knob_and_in_what_it_brings_with_it() -> None:
    where = narrow()
    params = {**where.default, "depth": 0}
    params = where.choose(lambda knob: params.get(knob.name, knob.default))
    for other in neighbours(where, params):
        assert where.contains(other)
        assert sum(other[name] != params[name] for name in other.keys() & params.keys()) == 1


def test_the_guard_learns_how_wrong_the_model_is() -> None:
    where = narrow()
    watch = guard(where, limit_bytes=MODEL.predict(40, 1).total_bytes)
    assert watch.excess(where.default) == "" and not watch.allows(where.default) and watch.error is None
    watch.learn([tried(where, where.default, error=0.04)])
    assert watch.error == pytest.approx(0.04, abs=1e-6)
    assert "+4.0%" in watch.excess(where.default)
    smaller = where.choose(lambda knob: {**where.default, "slots": 28}.get(knob.name, knob.default))
    assert watch.allows(smaller) and watch.excess(smaller) == ""
    assert watch.expected_bytes(smaller) == pytest.approx(1.04 * MODEL.predict(28, 1).total_bytes, rel=1e-6)
    exact = MODEL.predict(28, 1).total_bytes
    assert guard(where, round(1.04 * exact)).allows(smaller)
    assert not guard(where, round((1 + MARGIN / 2) * exact)).allows(smaller)
    failing = guard(where, round(1.04 * exact))
    failing.learn([], num_out_of_memory=1)
    assert not failing.allows(smaller) and failing.error is None
