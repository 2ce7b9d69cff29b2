"""The search: what is told, in which order, what is run again, and what survives."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from harness.search.history import MAX_RUNS
from harness.search.outcome import FAILURES, OUT_OF_MEMORY, Kind, Limits, Measurement, Outcome, Tried, feasible, front
from harness.search.space import Params, Setting, Space
from harness.search.storage import JOURNAL, redacted
from harness.search.study import CONSTRAINTS, MAX_BRUTE, SAMPLERS, Proposal, Study, StudyError, explore, remembered
from runtime.errors import UsageError
from runtime.profile import Profile

LIMIT = 40 << 20
KERNELS = {"prefill_kernels": ("grouped_mm",), "decode_kernels": ("gemv",)}


def measurement(latency_ms: float, peak_memory_bytes: int = 1 << 20) -> Measurement:
    return Measurement(latency_ms, 1.0, 1.0, 1e3 / latency_ms, "sha", peak_memory_bytes, 1, 0.1, 1.0, 10)


def ok(latency_ms: float, peak_memory_bytes: int = 1 << 20) -> Outcome:
    return Outcome(Kind.OK, result=measurement(latency_ms, peak_memory_bytes).as_dict())


def space(fit: int = 32, concurrency: int = 8, **fixed: Any) -> Space:
    keys = {name.replace("__", "."): value for name, value in fixed.items()}
    keys.setdefault("transfer.io_threads", 2)
    return Space(Setting(64, fit, concurrency, **KERNELS), Profile.default().with_overrides(keys), fixed=tuple(keys))


def tiny() -> Space:
    """Six configurations: slots 1-3 and two groups."""
    return space(3, 2, cache__policy="lru", prefetch__depth=0)


def open_study(folder: Path, where: Space | None = None, **options: Any) -> Study:
    options = {"limits": Limits(LIMIT), "seed": 0, **options}
    return Study(folder, where or space(), {"model": "m"}, **options)


def machine(params: Params) -> Outcome:
    """A made-up machine: more slots are faster and larger, groups help; beyond 40 MiB there is no memory."""
    slots, group = int(params.get("slots", 32)), int(params.get("group", 1))
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


def test_the_default_comes_first_then_what_was_enqueued_then_the_sampler(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    seeds = [seed for seed in study.space.seeds() if seed != study.space.default]
    study.enqueue([*seeds, study.space.default, *seeds[:1]], "seed")
    proposals = run(study, 2 + len(seeds))
    assert [p.params for p in proposals[:-1]] == [study.space.default, *seeds]
    assert [r.source for r in study.records()][: len(seeds) + 2] == ["default", *["seed"] * len(seeds), "sampler"]


def test_what_has_run_or_waits_is_not_enqueued_again(tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny())
    study.enqueue([{"slots": 1, "group": 1}], "simulator")
    study.enqueue([{"slots": 1, "group": 1}], "simulator")
    run(study, 2)
    study.enqueue([{"slots": 1, "group": 1}, study.space.default], "simulator")
    assert [t.state.name for t in study._study.trials] == ["COMPLETE"] * 2
    with pytest.raises(ValueError, match="no configuration of the space"):
        study.enqueue([{"slots": 99, "group": 1}], "simulator")


def test_a_proposal_leaves_the_queue_alone(tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny())
    queue = [{"slots": slots, "group": 1} for slots in (1, 2)]
    study.enqueue(queue, "simulator")
    for params in (study.space.default, {"slots": 1, "group": 2}):
        proposal = study.propose(params)
        assert proposal.params == params
        study.tell(proposal, ok(3.0))
    assert [p.params for p in run(study, 2)] == queue


def test_it_finds_what_is_fast_on_a_machine_that_has_cliffs(tmp_path: Path) -> None:
    study = open_study(tmp_path, space(cache__policy="lru", prefetch__depth=0))
    run(study, 25)
    outcomes = [machine(params) for params in study.space.configurations()]
    optimum = min(one.measurement.latency_ms_p50 for one in outcomes if one.kind is Kind.OK)
    assert feasible(study.tried(), study.limits)[0].latency_ms_p50 <= 1.1 * optimum
    assert sum(record.outcome.kind is Kind.OK for record in study.records()) >= 12


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_proposes_configurations_of_the_space(tmp_path: Path, sampler: str) -> None:
    study = open_study(tmp_path, space(cache__policy="lru", cache__slots=32), sampler=sampler)
    study.enqueue([study.space.sample(random.Random(0))], "simulator")
    proposals = run(study, 13)
    assert len(proposals) == 13 and all(study.space.contains(proposal.params) for proposal in proposals)
    sources = [record.source for record in study.records() if not record.reused]
    assert sources == ["default", "simulator", *["sampler"] * 11]
    assert Kind.OK in {record.outcome.kind for record in study.records()}


def test_brute_runs_every_configuration_once(tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny(), sampler="brute")
    found = [p.params for p in run(study, 100)]
    assert found[0] == study.space.default and len(found) == 6
    assert sorted(map(str, found)) == sorted(map(str, study.space.configurations())) and study.ask() is None


def test_a_sampler_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"are more than {MAX_BRUTE}; fix some knobs"):
        open_study(tmp_path, space(), sampler="brute")
    with pytest.raises(UsageError, match=r"'best' is unknown; take one of tpe, gp"):
        open_study(tmp_path, sampler="best")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_every_trial_sets_every_constraint_in_one_order(tmp_path: Path, sampler: str) -> None:
    study = open_study(tmp_path, sampler=sampler, limits=Limits(LIMIT, slo_tpot_ms=4.0))
    slow = Measurement(5.0, 1.0, 6.0, 9.0, "sha", 2 * LIMIT, 1, 0.1, 1.0, 10)
    outcomes = [
        Outcome(Kind.OK, result=slow.as_dict()),
        *(Outcome(kind, "why") for kind in Kind if kind is not Kind.OK),
    ]
    configurations = list(study.space.configurations())[: len(outcomes)]
    for params, outcome in zip(configurations, outcomes, strict=True):
        study.tell(study.propose(params), outcome)
    told = {r.outcome.kind: study._study.trials[r.number] for r in study.records()}
    assert len(told) == len(Kind) and {tuple(trial.constraints) for trial in told.values()} == {CONSTRAINTS}
    assert told[Kind.OK].constraints == {"memory": 1.0, "slo_tpot": 0.5, "slo_ttft": -1.0, "failure": 0.0}
    assert {kind for kind, trial in told.items() if trial.constraints["failure"] > 0} == FAILURES
    assert {kind for kind in FAILURES if told[kind].constraints["memory"] > 0} == OUT_OF_MEMORY
    assert all(value <= 0 for value in told[Kind.HOPELESS].constraints.values())
    states = {kind: trial.state.name for kind, trial in told.items()}
    assert (states.pop(Kind.OK), states.pop(Kind.ENVIRONMENT)) == ("COMPLETE", "FAIL")
    assert set(states.values()) == {"COMPLETE" if sampler == "gp" else "PRUNED"}


def test_a_gaussian_process_is_told_the_worst_for_what_failed_and_nobody_else(tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny(), sampler="gp")
    configurations = list(study.space.configurations())
    for params, latency_ms, mib in zip(configurations, (5.0, 9.0), (7, 3), strict=False):
        study.tell(study.propose(params), ok(latency_ms, mib << 20))
    study.tell(study.propose(configurations[2]), Outcome(Kind.OUT_OF_MEMORY, "no memory"))
    imputed = study._study.trials[-1]
    assert imputed.values == [math.log(9.0), float(7 << 20)] and imputed.user_attrs["imputed"]
    assert [one.params for one in study.tried()] == configurations[:2]


def test_a_changed_environment_says_nothing_and_the_configuration_runs_again_twice(tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny(), sampler="brute")
    run(study, 1)
    params = {"slots": 1, "group": 2}
    study.enqueue([params], "simulator")
    asked = []
    while (proposal := study.ask()) and proposal.params == params:
        asked.append(proposal.source)
        study.tell(proposal, Outcome(Kind.ENVIRONMENT, "throttled"))
    assert asked == ["simulator"] * MAX_RUNS
    assert [one.params for one in study.tried()] == [study.space.default]


def test_a_hopeless_configuration_is_not_run_again(tmp_path: Path) -> None:
    study = open_study(tmp_path, tiny(), sampler="brute")
    while (proposal := study.ask()) is not None:
        study.tell(proposal, Outcome(Kind.HOPELESS, "beaten"))
    assert len(study.records()) == 6 and study.tried() == []


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


def test_resume_goes_on_with_what_was_told(tmp_path: Path) -> None:
    study = open_study(tmp_path, decisions={"sizes": [1, 2]})
    run(study, 5)
    resumed = open_study(tmp_path, resume=True, decisions={"sizes": "others"})
    assert [r.params for r in resumed.records()] == [r.params for r in study.records()]
    kept = remembered(tmp_path)
    assert kept["sizes"] == resumed.decisions["sizes"] == [1, 2]
    assert Setting(**kept["setting"]) == study.space.setting
    run(resumed, 2)
    assert len(resumed.records()) >= 7


def test_a_resumed_study_keeps_to_the_slots_that_fitted_when_it_began(tmp_path: Path) -> None:
    open_study(tmp_path)
    resumed = open_study(tmp_path, space(fit=31), resume=True)
    assert resumed.space.setting.num_slots_fit == 32 and resumed.space.digest() == space().digest()


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
        Study(tmp_path, space(), {"model": "other"}, limits=Limits(), seed=0, resume=True)
    with pytest.raises(UsageError, match=r"other settings \(the space\)"):
        open_study(tmp_path, space(concurrency=4), resume=True)


def test_a_disk_that_is_full_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(tmp_path, tiny())
    proposal = study.ask()
    assert proposal is not None

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StudyError, match=r"No space left on device; what was told before is safe, resume it"):
        study.tell(proposal, ok(1.0))
    with pytest.raises(StudyError, match="No space left on device"):
        open_study(tmp_path / "another")


def test_a_journal_that_is_damaged_in_the_middle_is_one_line(tmp_path: Path) -> None:
    """Its writer ran out of disk, and another one went on after that."""
    study = open_study(tmp_path)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code": 6, "worker{}\n')
    with pytest.raises(StudyError):
        run(study, 1)
    with pytest.raises(UsageError, match="a line in the middle of it is damaged; begin another study"):
        open_study(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("study.db", r"'study.db' is no URL, such as postgresql://USER@HOST/DATABASE"),
        ("nosuch://host/db", r"nosuch://host/db cannot be used: Can't load plugin"),
        ("postgresql+nosuch://u:sec%40ret@host/db", r"postgresql\+nosuch://u:\*\*\*@host/db cannot be used"),
        ("postgresql+pg8000://u:secret@host/db", r"its driver is not installed: pip install 'expertflow\[postgres\]'"),
        ("sqlite:////nowhere/at/all.db", r"cannot be used: unable to open database file"),
        ("journal:///proc/nowhere/at/all", r"the study cannot be kept there"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line_without_its_password(
    tmp_path: Path, storage: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        open_study(tmp_path, storage=storage)
    assert "ret" not in str(caught.value).replace("at/all", "") and "\n" not in str(caught.value)


def test_passwords_are_left_out_of_what_is_shown() -> None:
    command = "harness.tune --storage 'postgresql://me:p%40s/s@db.example/x?password=abc&ssl=1' --set a=b"
    assert redacted(command) == "harness.tune --storage 'postgresql://me:***@db.example/x?password=***&ssl=1' --set a=b"
    assert redacted("postgresql://me@db.example:5432/x") == "postgresql://me@db.example:5432/x"


def test_a_url_is_begun_by_the_first_and_joined_by_the_next(tmp_path: Path) -> None:
    for storage in (f"journal://{tmp_path}/shared.journal", f"sqlite:///{tmp_path}/shared.db"):
        assert remembered(tmp_path / "a", storage, {"model": "m"}) == {}
        first = open_study(tmp_path / "a", storage=storage, decisions={"sizes": 1})
        run(first, 3)
        kept = remembered(tmp_path / "b", storage, {"model": "m"})
        assert kept["sizes"] == 1 and Setting(**kept["setting"]) == first.space.setting
        second = open_study(tmp_path / "b", space(fit=31), storage=storage, decisions={"sizes": 2})
        assert (second.name, second.decisions, second.space.digest()) == (
            first.name,
            first.decisions,
            first.space.digest(),
        )
        assert second.records() == first.records() and len(first.records()) == 3
        assert Study(tmp_path, space(), {"model": "n"}, limits=Limits(), seed=0, storage=storage).name != first.name


def test_sqlite_is_for_one_process(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/shared.db"
    first = open_study(tmp_path, storage=storage)
    proposal = first.ask()
    assert proposal is not None
    with pytest.raises(UsageError, match="SQLite is for one process; for several take journal:///FILE"):
        open_study(tmp_path, storage=storage)
    first.tell(proposal, ok(1.0))
    assert len(open_study(tmp_path, storage=storage).records()) == 1


def test_optuna_alone_reads_the_journal(tmp_path: Path) -> None:
    """As optuna-dashboard does."""
    study = open_study(tmp_path, tiny())
    run(study, 1)
    study.tell(study.propose({"slots": 1, "group": 2}), Outcome(Kind.OUT_OF_MEMORY, "no memory"))
    storage = JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL)))
    (found,) = optuna.get_all_study_summaries(storage)
    loaded = optuna.load_study(study_name=found.study_name, storage=storage)
    good, bad = loaded.trials
    assert found.study_name == study.name and len(loaded.directions) == 2
    assert good.values == [math.log(97.0 / 1.0), float(4 << 20)] and good.params == {"slots": 3, "group": 1}
    assert good.user_attrs["outcome"]["result"]["latency_ms_p50"] == 97.0 and good.user_attrs["source"] == "default"
    assert bad.state.name == "PRUNED" and bad.constraints["memory"] == 1.0
    assert [trial.number for trial in loaded.best_trials] == [0]


def test_exploring_finds_the_optimum_of_a_large_space_and_asks_once_of_each() -> None:
    where, asked = space(concurrency=32), []

    def evaluate(params: Params) -> tuple[float, float] | None:
        asked.append(json.dumps(params, sort_keys=True))
        slots, group, depth = int(params["slots"]), int(params["group"]), int(params["depth"])
        if slots + group > 38:
            return None
        return (100 - slots) / group**0.5 * (1 - 0.02 * depth) + 5 * (params.get("policy") == "lru"), slots + group

    found = explore(where, evaluate, 200, seed=1, start=[where.default])
    best = min(value[0] for _, value in found)
    optimum = min(value[0] for params in where.configurations() if (value := evaluate(params)))
    asked = asked[: len(set(asked[:200]))]
    assert best <= 1.03 * optimum and len(set(asked)) == len(asked) <= 200
    assert all(where.contains(params) for params, _ in found)


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
    assert [one.params["slots"] for one in feasible(made, Limits(25))] == [2, 3, 0, 4]
