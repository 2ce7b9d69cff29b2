"""From the parts of the tuner to its outputs: a real study on a made-up machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_report import measurement

from harness.measure.stats import Ratio
from harness.report.results import summary, write_profile, write_run
from harness.report.run_file import load_run
from harness.report.run_folder import best_so_far, collect, resume_command
from harness.search.confirm import Confirmation, Screened
from harness.search.loop import Choice
from harness.search.objective import Objective
from harness.search.outcome import Kind, Limits, Measurement, Outcome, Tried
from harness.search.plan import Sizes
from harness.search.space import Params, Setting, Space
from harness.search.study import Study
from runtime.profile import ModelIdentity, Profile, load_profile

LIMITS = Limits(max_memory_bytes=38 << 20)


def machine(params: Params) -> Outcome:
    """More slots are faster and larger, groups help, and beyond 40 MiB there is no memory."""
    slots, group = int(params["slots"]), int(params.get("group", 1))
    if slots + group > 40:
        return Outcome(Kind.OUT_OF_MEMORY, "no memory")
    latency_ms = (100 - slots) / group**0.5
    result = measurement(latency_ms, (slots + group) << 20).as_dict()
    return Outcome(Kind.OK, result=result, wall_s=1.0, foretold_ms=latency_ms)


def setup_of(folder: Path) -> Any:
    """What the adapter reads of a `Setup`."""
    identity = ModelIdentity(architecture="A", layers=2, experts=32, top_k=2, expert_bytes=9, dtype="bfloat16")
    return SimpleNamespace(
        settings=SimpleNamespace(
            folder=folder,
            model="org/model",
            command="python -m harness.tune --trials 20",
            objective=Objective.LATENCY,
            fixed={"transfer.streams": 2},
            seed=3,
            concurrency=8,
            context=1024,
            gpu=None,
            hardware={"device": "cpu"},
        ),
        base=Profile.default(),
        workload=SimpleNamespace(name="text", sha256="0" * 64),
        facts=SimpleNamespace(identity=identity),
        probe=SimpleNamespace(curve=SimpleNamespace(engine_bytes_per_s=1e9), as_dict=lambda: {"curve": "…"}),
        sizes=Sizes(64, 32, 16),
        bandwidth_bytes_per_s=1e9,
        host_bytes=0,
        memory_limit_bytes=LIMITS.max_memory_bytes,
        guard=SimpleNamespace(error_of=lambda one: one.peak_memory_bytes / (36 << 20) - 1),
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Twenty trials."""
    folder = tmp_path_factory.mktemp("study")
    found = Study(folder, Space(Setting(64, 32, 8), Profile.default()), {"model": "m"}, limits=LIMITS, seed=0)
    while len(found.records()) < 20:
        proposal = found.ask()
        assert proposal is not None
        found.tell(proposal, machine(proposal.params))
    return found


def best_of(study: Study) -> Tried:
    return min((one for one in study.tried() if LIMITS.allow(one)), key=lambda one: one.latency_ms_p50)


def runs(latency_ms: float, peak_memory_bytes: int) -> tuple[Measurement, ...]:
    return (measurement(latency_ms, peak_memory_bytes),) * 6


def test_a_confirmed_choice_becomes_a_folder_and_a_profile(study: Study, tmp_path: Path) -> None:
    best, other = best_of(study).params, {**study.space.default, "group": 2}
    confirmation = Confirmation(
        runs(40.0, 30 << 20),
        runs(80.0, 31 << 20),
        Ratio(0.5, 0.45, 0.55, 6),
        params=best,
        screening=(Screened(best, 0.5, 1.0), Screened(other, None, failure="the finalist 2 ended with crash")),
        failed=(other,),
    )
    results = collect(setup_of(tmp_path), study, Choice(best, "proven", confirmation, 1.02), "20 trials")
    write_run(results)
    profile = write_profile(results, tmp_path / "p.yaml")
    assert load_profile(tmp_path / "p.yaml") == profile and load_run(tmp_path) == results.run
    evidence, measured = profile.evidence, profile.objectives
    assert evidence is not None and evidence.ratio is not None and measured is not None
    assert (evidence.ratio.high, evidence.pairs, evidence.simulator_rank_correlation) == (0.55, 6, 1.0)
    assert evidence.trials == sum(one.outcome.was_launched and not one.reused for one in study.records())
    assert measured.latency_ms_p50 == 40.0 and measured.peak_memory_bytes == best_of(study).peak_memory_bytes
    assert evidence.memory_model_error == pytest.approx(best_of(study).peak_memory_bytes / (36 << 20) - 1, abs=1e-4)
    assert profile.workload is not None and profile.workload.context == 1024 and profile.fixed == ("transfer.streams",)
    assert profile.match is not None and profile.match.bandwidth_at_expert_size_bytes_per_s is not None
    assert results.run.failed == (other,) and results.environment["probe"] == {"curve": "…"}
    assert results.environment["confirmation"]["screening"][1]["failure"] == "the finalist 2 ended with crash"
    told = summary(results, tmp_path / "p.yaml")
    assert told["ratio"]["estimate"] == 0.5 and told["is_default"] is False and told["drift"] == 1.02


def test_which_knobs_matter_is_told_after_enough_trials(study: Study, tmp_path: Path) -> None:
    shares = collect(setup_of(tmp_path), study, None, "20 trials").importances
    assert set(shares) == {"latency", "memory"}
    for knobs in shares.values():
        assert sum(knobs.values()) == pytest.approx(1.0) and set(knobs) <= {knob.name for knob in study.space.knobs}
        assert knobs["slots"] + knobs["group"] > 0.5


def test_before_there_is_a_choice_the_best_so_far_stands_for_it(study: Study, tmp_path: Path) -> None:
    results = collect(setup_of(tmp_path), study, None, "interrupted")
    assert results.run.chosen == best_of(study).params == best_so_far(study, Objective.LATENCY)
    profile = write_profile(results, tmp_path / "best.yaml")
    assert profile.evidence is not None and profile.evidence.ratio is None and "unconfirmed" in results.run.reason
    smallest = best_so_far(study, Objective.MEMORY)
    assert smallest is not None and int(smallest["slots"]) <= int(results.run.chosen["slots"])


def test_a_default_that_does_not_run_hides_no_best_so_far(tmp_path: Path) -> None:
    fresh = Study(tmp_path, Space(Setting(64, 32, 8), Profile.default()), {"model": "m"}, limits=LIMITS, seed=0)
    smaller = {**fresh.space.default, "slots": 16}
    fresh.tell(fresh.propose(fresh.space.default), Outcome(Kind.OUT_OF_MEMORY, "no memory"))
    fresh.tell(fresh.propose(smaller), machine(smaller))
    assert best_so_far(fresh, Objective.LATENCY) == smaller


def test_before_anything_was_measured_there_is_nothing_to_choose(tmp_path: Path) -> None:
    fresh = Study(tmp_path, Space(Setting(64, 32, 8), Profile.default()), {"model": "m"}, limits=LIMITS, seed=0)
    results = collect(setup_of(tmp_path), fresh, None, "interrupted")
    write_run(results)
    assert results.run.chosen is None and "nothing was measured" in results.run.reason and not results.importances
    with pytest.raises(ValueError, match="measured"):
        write_profile(results, tmp_path / "p.yaml")


def test_a_finalist_that_failed_is_kept_as_failed(study: Study, tmp_path: Path) -> None:
    best = best_of(study).params
    confirmation = Confirmation(
        (), runs(80.0, 31 << 20)[:1], None, "the finalist ended with crash", best, failed=(best,)
    )
    kept = Choice(study.space.default, "the default is kept", confirmation, None)
    run = collect(setup_of(tmp_path), study, kept, "20 trials").run
    assert run.confirmed is None and run.failed == (best,) and run.chosen == study.space.default


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python -m harness.tune", "python -m harness.tune --out R --resume"),
        ("tune --out 'a b'", "tune --out 'a b' --resume"),
        ("tune --out=R", "tune --out=R --resume"),
        ("tune --out R --resume", "tune --out R --resume"),
    ],
)
def test_the_command_that_goes_on_is_the_command_and_resume(command: str, expected: str) -> None:
    settings: Any = SimpleNamespace(command=command, folder=Path("R"))
    assert resume_command(settings) == expected
