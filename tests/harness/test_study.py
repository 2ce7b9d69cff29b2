"""The search: what is told, in which order, what is run again, and what survives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from harness.search.outcome import Kind, Measurement, Outcome, Tried, feasible, front
from harness.search.space import Params, Setting, Space
from harness.search.study import CONSTRAINTS, JOURNAL, MAX_RUNS, Proposal, Study, remembered
from runtime.errors import UsageError
from runtime.profile import Profile

LIMIT = 40 << 20


def measurement(latency_ms: float, peak_memory_bytes: int = 1 << 20) -> Measurement:
    return Measurement(latency_ms, 1.0, 1.0, 1e3 / latency_ms, "sha", peak_memory_bytes, 1, 0.1, 1.0, 10)


def ok(latency_ms: float, peak_memory_bytes: int = 1 << 20) -> Outcome:
    return Outcome(Kind.OK, result=measurement(latency_ms, peak_memory_bytes).as_dict())


def space(fit: int = 32, concurrency: int = 8, **fixed: Any) -> Space:
    keys = {name.replace("__", "."): value for name, value in fixed.items()}
    return Space(Setting(64, fit, concurrency), Profile.default().with_overrides(keys), fixed=tuple(keys))


def tiny() -> Space:
    """Six configurations: slots 1-3 and two groups."""
    return space(3, 2, cache__policy="lru", prefetch__depth=0)


def open_study(folder: Path, where: Space | None = None, **options: Any) -> Study:
    options = {"max_memory_bytes": LIMIT, "seed": 0, **options}
    return Study(folder, where or space(), {"model": "m"}, **options)


def machine(params: Params) -> Outcome:
    """A made-up machine: more slots are faster and larger, groups help; beyond 40 MiB there is no memory."""
    slots, group = int(params["slots"]), int(params.get("group", 1))
    if slots + group > 38:
        return Outcome(Kind.OUT_OF_MEMORY, "no memory")
    return ok((100 - slots) / group**0.5, (slots + group) << 20)


def run(study: Study, num_trials: int) -> list[Proposal]:
    proposals = []
    for _ in range(num_trials):
        proposal = study.ask()
        if proposal is None:
            break
        proposals.append(proposal)
        study.tell(proposal, machine(proposal.params))
    return proposals


def test_the_default_comes_first_and_seeds_next(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    proposals = run(study, 4)
    assert [p.params for p in proposals] == [dict(seed) for seed in study.space.seeds()][:4]


def test_it_finds_what_is_fast_on_a_machine_that_has_cliffs(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    run(study, 30)
    outcomes = [machine(params) for params in study.space.configurations()]
    optimum = min(one.measurement.latency_ms_p50 for one in outcomes if one.kind is Kind.OK)
    assert feasible(study.tried(), LIMIT)[0].latency_ms_p50 <= 1.1 * optimum
    assert sum(record.outcome.kind is Kind.OK for record in study.records()) >= 20


def test_every_trial_sets_every_constraint_in_one_order(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    outcomes = [ok(5.0, LIMIT + (3 << 20)), *(Outcome(kind, "why") for kind in Kind if kind is not Kind.OK)]
    for outcome in outcomes:
        proposal = study.ask()
        assert proposal is not None
        study.tell(proposal, outcome)
    trials = study._study.get_trials()
    told = [trial for trial in trials if trial.state.is_finished()]
    assert [tuple(trial.constraints) for trial in told] == [CONSTRAINTS] * len(outcomes)
    assert [trial.state.name for trial in told] == ["COMPLETE"] + ["PRUNED"] * 5
    assert told[0].constraints == {"memory": 3.0, "failure": 0.0}
    by_kind = {record.outcome.kind: trial.constraints for record, trial in zip(study.records(), told, strict=True)}
    assert by_kind[Kind.OUT_OF_MEMORY] == {"memory": 1.0, "failure": 1.0}
    assert by_kind[Kind.CRASH] == {"memory": 0.0, "failure": 1.0}


def test_latency_is_told_as_its_logarithm(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    proposal = study.ask()
    assert proposal is not None
    study.tell(proposal, ok(12.5, 7 << 20))
    assert study._study.trials[0].values == [math.log(12.5), float(7 << 20)]


def test_a_duplicate_is_run_at_most_twice_more_and_told_the_pooled_median(tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny())
    run(study, 100)
    runs: dict[str, int] = {}
    for record in study.records():
        runs[json.dumps(record.params, sort_keys=True)] = runs.get(json.dumps(record.params, sort_keys=True), 0) + (
            not record.reused
        )
    assert max(runs.values()) <= MAX_RUNS and len(runs) == tiny().size() == 6


def test_a_repeat_is_told_the_median_of_all_runs(tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny())
    run(study, 1)
    params = study.space.default
    study.tell(study.propose(params), ok(10.0))
    study.tell(study.propose(params), ok(1000.0))
    latencies = sorted([97.0, 10.0, 1000.0])
    assert study._study.trials[-1].values[0] == pytest.approx(math.log(latencies[1]))
    (pooled,) = [one for one in study.tried() if one.params == params]
    assert (len(pooled.runs), pooled.latency_ms_p50) == (3, 97.0)


def test_a_configuration_that_failed_is_not_run_again(tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny())
    for _ in range(100):
        proposal = study.ask()
        if proposal is None:
            break
        study.tell(proposal, Outcome(Kind.CRASH, "ended by SIGSEGV"))
    run_once = [record for record in study.records() if not record.reused]
    assert len(run_once) == 6 and study.ask() is None


def test_resume_goes_on_with_what_was_told_and_drops_the_open_trial(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    run(study, 5)
    study.ask()
    study.remember("sizes", [1, 2])
    resumed = open_study(tmp_path, resume=True)
    assert [r.params for r in resumed.records()] == [r.params for r in study.records()]
    assert not [t for t in resumed._study.trials if t.state.name == "RUNNING"]
    assert remembered(tmp_path)["sizes"] == [1, 2]
    run(resumed, 2)
    assert len(resumed.records()) >= 7


def test_a_torn_last_line_is_put_aside(tmp_path: Path) -> None:
    run(open_study(tmp_path), 3)
    journal = tmp_path / JOURNAL
    with journal.open("ab") as file:
        file.write(b'{"op_code": 6, "worker')
    resumed = open_study(tmp_path, resume=True)
    run(resumed, 1)
    assert len(open_study(tmp_path, resume=True).records()) == 4
    assert journal.with_suffix(".corrupt").read_bytes() == b'{"op_code": 6, "worker'


@pytest.mark.parametrize(
    ("first", "options", "said"),
    [
        (True, {}, "holds a run already; add --resume"),
        (False, {"resume": True}, "holds no run"),
    ],
)
def test_a_folder_is_not_mistaken(tmp_path: Path, first: bool, options: dict[str, Any], said: str) -> None:
    if first:
        open_study(tmp_path)
    with pytest.raises(UsageError, match=said):
        open_study(tmp_path, **options)


def test_another_study_is_not_gone_on_with(tmp_path: Path) -> None:
    open_study(tmp_path)
    with pytest.raises(UsageError, match=r"other settings \(model\)"):
        Study(tmp_path, space(), {"model": "other"}, max_memory_bytes=None, seed=0, resume=True)
    with pytest.raises(UsageError, match=r"other settings \(the space\)"):
        open_study(tmp_path, space(fit=31), resume=True)


def test_an_interrupted_trial_says_nothing_of_its_configuration(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    proposal = study.ask()
    assert proposal is not None
    study.abandon(proposal)
    assert study.records() == [] and study._study.trials[0].state.name == "FAIL"


def test_the_front_holds_what_nothing_beats() -> None:
    made = [
        Tried({"slots": n}, (measurement(*pair),))
        for n, pair in enumerate([(3, 10), (1, 30), (2, 20), (2.5, 25), (4, 10)])
    ]
    assert [one.params["slots"] for one in front(made)] == [1, 2, 0]
    assert [one.params["slots"] for one in feasible(made, 25)] == [2, 3, 0, 4]
