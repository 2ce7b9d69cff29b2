"""The tuner: the loop and the choice on made-up machines, its command line, and once all of it for real."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_study import LIMIT, machine, ok, open_study, space

from harness import tune
from harness.measure.workload import HELDOUT, Part
from harness.search.loop import NothingRunsError, choose, closest, search
from harness.search.outcome import Kind, Outcome
from harness.search.setup import Setup
from harness.search.space import Params
from harness.search.study import Study
from runtime.profile import load_profile


class Silent:
    """A watcher that keeps what it hears."""

    def __init__(self) -> None:
        self.trials: list[int] = []
        self.confirmations: list[str] = []

    def trial(self, number: int, params: Params, outcome: Outcome, best: object) -> None:
        self.trials.append(number)

    def confirmation(self, name: str, outcome: Outcome) -> None:
        self.confirmations.append(name)


def _timed(outcome: Outcome, wall_s: float) -> Outcome:
    return Outcome(outcome.kind, outcome.message, outcome.result, wall_s)


def test_the_search_ends_when_half_a_trial_no_longer_fits(tmp_path: Path) -> None:
    now, watcher = [0.0], Silent()

    def measure(params: Params) -> Outcome:
        now[0] += 10.0
        return _timed(machine(params), 10.0)

    why = search(open_study(tmp_path), measure, watcher, budget_s=46, num_trials=None, clock=lambda: now[0])
    assert why == "time budget of 46 s" and watcher.trials == [1, 2, 3, 4, 5]


def test_the_default_is_measured_however_short_the_time(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    search(study, lambda params: _timed(machine(params), 10.0), Silent(), budget_s=1e-9, num_trials=None)
    assert [record.params for record in study.records()] == [study.space.default]


def test_the_number_of_trials_counts_those_before_a_resume(tmp_path: Path) -> None:
    search(open_study(tmp_path), machine, Silent(), budget_s=60, num_trials=3)
    resumed, watcher = open_study(tmp_path, resume=True), Silent()
    assert search(resumed, machine, watcher, budget_s=60, num_trials=5) == "5 trials"
    assert watcher.trials == [4, 5]


def test_an_interrupted_trial_is_closed_and_the_others_are_kept(tmp_path: Path) -> None:
    study, calls = open_study(tmp_path), itertools.count()

    def interrupted(params: Params) -> Outcome:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return machine(params)

    with pytest.raises(KeyboardInterrupt):
        search(study, interrupted, Silent(), budget_s=60, num_trials=None)
    assert len(study.records()) == 2 and study._study.trials[-1].state.name == "FAIL"


def _searched(folder: Path, measure: Callable[[Params], Outcome] = machine, **options: Any) -> Study:
    study = open_study(folder, space(fit=16), **options)
    search(study, measure, Silent(), budget_s=600, num_trials=6)
    return study


def test_a_proven_gain_is_chosen(tmp_path: Path) -> None:
    study, watcher = _searched(tmp_path), Silent()
    choice = choose(study, machine, machine, watcher, budget_s=60)
    assert choice.params["group"] == 8 and choice.confirmation is not None and choice.confirmation.is_proven
    assert watcher.confirmations[:4] == ["default", "finalist", "finalist", "default"] and choice.drift == 1.0


def test_a_gain_that_is_gone_on_other_text_keeps_the_default(tmp_path: Path) -> None:
    study = _searched(tmp_path)
    choice = choose(study, machine, lambda params: ok(50.0), Silent(), budget_s=60)
    assert choice.params == study.space.default and "not proven" in choice.reason
    failing = choose(study, machine, lambda params: Outcome(Kind.WRONG_TOKENS, "differ"), Silent(), budget_s=60)
    assert failing.params == study.space.default and "wrong_tokens" in failing.reason


def test_nothing_faster_keeps_the_default_without_confirming(tmp_path: Path) -> None:
    def worse_elsewhere(params: Params) -> Outcome:
        return ok(10.0 if params == space(fit=16).default else 20.0)

    study, watcher = _searched(tmp_path, worse_elsewhere), Silent()
    choice = choose(study, worse_elsewhere, machine, watcher, budget_s=60)
    assert choice.params == study.space.default and choice.confirmation is None and not watcher.confirmations


def test_drift_is_the_default_at_the_end_over_the_start(tmp_path: Path) -> None:
    study = _searched(tmp_path)
    before = machine(study.space.default).measurement.latency_ms_p50
    choice = choose(study, lambda params: ok(before * 1.5), machine, Silent(), budget_s=60)
    assert choice.drift == pytest.approx(1.5)


def test_a_default_that_does_not_run_does_not_hide_what_does(tmp_path: Path) -> None:
    study = open_study(tmp_path, space(fit=64))
    search(study, machine, Silent(), budget_s=600, num_trials=6)
    choice = choose(study, machine, machine, Silent(), budget_s=60)
    assert "default does not run" in choice.reason and int(choice.params["slots"]) < 64


def test_where_nothing_runs_there_is_no_choice(tmp_path: Path) -> None:
    def too_large(params: Params) -> Outcome:
        return ok(1.0, LIMIT + 1)

    study = _searched(tmp_path, too_large)
    with pytest.raises(NothingRunsError):
        choose(study, too_large, too_large, Silent(), budget_s=60)
    assert closest(study) == f"the smallest configuration peaked at {LIMIT + 1} bytes"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "3"], "--device cpu"),
        (["--model", "."], "not a checkpoint"),
        (["--max-memory", "much"], "1.5GiB"),
        (["--time-budget", "soon"], "90s, 6m or 1h"),
        (["--trials", "0"], "at least 1"),
        (["--concurrency", "0"], "at least 1"),
        (["--set", "cache.slots"], "KEY=VALUE"),
        (["--set", "cache.polcy=lru"], "cache.policy"),
        (["--set", "numerics=lossy.substitute"], "harness.quality"),
        (["--resume"], "--out"),
        (["--resume", "--out", "nowhere"], "holds no run"),
        (["--workload", "missing.jsonl"], "cannot be read"),
        (["--profile-out", "/dev/null/p.yaml"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    home: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    model = [] if "--model" in arguments else ["--model", str(tiny_checkpoint)]
    assert tune.main([*model, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert list(home.iterdir()) == []


def test_a_limit_below_one_expert_is_one_line_and_leaves_nothing(
    home: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.main(["--model", str(tiny_checkpoint), "--max-memory", "2MB"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no room for one expert" in error and list(home.iterdir()) == []


def test_a_dense_model_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (home / "dense").mkdir()
    (home / "dense" / "config.json").write_text(json.dumps(config))
    assert tune.main(["--model", "dense"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and [path.name for path in home.iterdir()] == ["dense"]


@pytest.fixture
def text(home: Path) -> list[str]:
    """A short workload, as arguments."""
    lines = HELDOUT.read_text().splitlines()
    (home / "text.jsonl").write_text("\n".join(lines[:: len(lines) // 12]))
    return ["--workload", "text.jsonl"]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe of the disk cut short: what it finds does not matter here."""
    from harness import probe

    whole = probe.measure_curve
    monkeypatch.setattr(probe, "measure_curve", lambda *given: whole(*given, budget_s=0.1))


@pytest.mark.slow
def test_all_of_it_for_real(
    home: Path,
    tiny_checkpoint: Path,
    text: list[str],
    brief: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("harness.search.plan._MAX_PAIRS", 3)
    arguments = ["--model", str(tiny_checkpoint), "--trials", "3", "--out", "run", "--concurrency", "2", *text]
    assert tune.main([*arguments, "--set", "prefetch.depth=1", "--time-budget", "1h"]) == 0
    out = capsys.readouterr().out
    profile_path = home / "profiles" / f"{tiny_checkpoint.name}-cpu.yaml"
    assert out.splitlines()[-1].startswith("next: ") and str(profile_path.relative_to(home)) in out.splitlines()[-1]
    assert "tuning for the CPU" in out and "latency p50" in out
    profile = load_profile(profile_path)
    assert profile.fixed == ("prefetch.depth",) and profile.prefetch.depth == 1
    assert profile.evidence is not None and profile.evidence.trials == 4 and profile.evidence.seed == 0
    assert profile.objectives is not None and (profile.objectives.peak_memory_bytes or 0) > 100e6
    assert profile.workload is not None and profile.workload.concurrency == 2
    assert profile.match is not None and profile.match.model is not None and profile.match.model.experts == 8
    table = pd.read_csv(home / "run" / "trials.csv")
    assert list(table["outcome"]) == ["ok"] * 4 and table["tokens_sha256"].notna().all()
    assert set((home / "run").iterdir()) >= {home / "run" / name for name in ("pareto.csv", "pareto.png")}
    environment = json.loads((home / "run" / "environment.json").read_text())
    assert environment["probe"]["curve"]["series"] and environment["stop_reason"] == "3 trials"

    import runtime

    with runtime.load(profile_path) as engine:
        assert engine.profile.cache.slots == profile.cache.slots


def test_ctrl_c_keeps_what_was_measured_and_resume_goes_on(
    home: Path,
    tiny_checkpoint: Path,
    text: list[str],
    brief: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = itertools.count()

    def measurer(setup: Setup) -> Any:
        class Fake:
            def remember(self, records: object) -> None: ...

            def __call__(self, params: Params, part: Part = "search") -> Outcome:
                if next(calls) == 2:
                    raise KeyboardInterrupt
                return ok(100.0 / float(params.get("group", 1)), 300 << 20)

        return Fake()

    monkeypatch.setattr(Setup, "measurer", measurer)
    arguments = ["--model", str(tiny_checkpoint), "--trials", "4", "--out", "run", *text]
    assert tune.main(arguments) == 130
    error = capsys.readouterr().err
    assert "2 trials are kept in run" in error and "unconfirmed" in error and error.rstrip().endswith("interrupted")
    assert len(pd.read_csv(home / "run" / "trials.csv")) == 2
    best = load_profile(home / "run" / "best.yaml")
    assert best.scheduler.group == 8 and best.evidence is not None and best.evidence.ratio is None
    assert not (home / "profiles").exists()

    command = next(line for line in error.splitlines() if line.startswith("go on with: ")).removeprefix("go on with: ")
    again = shlex.split(command)
    assert again[-1] == "--resume" and again[-2] != "--out"
    assert tune.main(again[again.index("harness.tune") + 1 :]) == 0
    assert len(pd.read_csv(home / "run" / "trials.csv")) == 5
    profile = load_profile(home / "profiles" / f"{tiny_checkpoint.name}-cpu.yaml")
    assert profile.scheduler.group == 8 and profile.evidence is not None and profile.evidence.ratio is not None
