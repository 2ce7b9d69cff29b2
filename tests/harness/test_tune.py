"""The tuner: the loop and the choice on made-up machines, its command line, and once all of it for real."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_study import LIMIT, machine, ok, open_study, space

from harness import tune
from harness.measure.environment import GPU_LOST
from harness.measure.workload import HELDOUT, Part
from harness.probe import take_probe
from harness.search.confirm import MIN_PAIRS, Confirmation, Contender, Segment, confirm
from harness.search.loop import PATIENCE, PATIENT_TRIALS, Choice, GpuLostError, NothingRunsError, choose, search
from harness.search.measurer import Measurer
from harness.search.objective import SLOWDOWN, Objective
from harness.search.outcome import Kind, Limits, Outcome
from harness.search.setup import Setup
from harness.search.space import Params
from harness.search.study import SAMPLERS, Study
from harness.search.trial import TrialRunner
from runtime.profile import load_profile

Machine = Callable[[Params], Outcome]


class Silent:
    """A watcher that keeps what it hears."""

    def __init__(self) -> None:
        self.trials: list[int] = []
        self.sources: list[str] = []

    def trial(self, number: int, params: Params, outcome: Outcome, best: object, source: str) -> None:
        self.trials.append(number)
        self.sources.append(source)

    def confirmation(self, name: str, outcome: Outcome) -> None: ...


def _search(study: Study, measure: Machine, watcher: Silent | None = None, **options: Any) -> str:
    options = {"objective": Objective.LATENCY, "budget_s": 600, "num_trials": None, **options}
    return search(study, measure, None, watcher or Silent(), **options)


def _timed(outcome: Outcome, wall_s: float) -> Outcome:
    return replace(outcome, wall_s=wall_s)


def test_the_search_ends_when_half_a_trial_no_longer_fits(tmp_path: Path) -> None:
    now, watcher = [0.0], Silent()

    def measure(params: Params) -> Outcome:
        now[0] += 10.0
        return _timed(machine(params), 10.0)

    why = _search(open_study(tmp_path), measure, watcher, budget_s=46, clock=lambda: now[0])
    assert why == "time budget of 46 s" and watcher.trials == [1, 2, 3, 4, 5]
    assert watcher.sources[0] == "default"


def test_the_default_is_measured_however_short_the_time(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    _search(study, lambda params: _timed(machine(params), 10.0), budget_s=1e-9)
    assert [record.params for record in study.records()] == [study.space.default]


def test_the_number_of_trials_counts_those_before_a_resume(tmp_path: Path) -> None:
    _search(open_study(tmp_path), machine, num_trials=3)
    resumed, watcher = open_study(tmp_path, resume=True), Silent()
    assert _search(resumed, machine, watcher, num_trials=5) == "5 trials"
    assert watcher.trials == [4, 5]


def test_what_was_not_launched_does_not_count(tmp_path: Path) -> None:
    study = open_study(tmp_path)

    def measure(params: Params) -> Outcome:
        found = machine(params)
        return found if found.kind is Kind.OK else Outcome(Kind.TOO_LARGE, "predicted")

    assert _search(study, measure, num_trials=12) == "12 trials"
    assert sum(record.outcome.kind is Kind.OK for record in study.records()) == 12


def test_it_ends_when_nothing_becomes_better(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    assert _search(study, lambda params: ok(10.0)) == f"nothing better in {PATIENCE} trials"
    assert len(study.records()) == PATIENT_TRIALS


def test_it_stops_after_the_trial_in_which_it_was_asked_to(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    assert _search(study, machine, stop=lambda: len(study.records()) == 2) == "interrupted"
    assert len(study.records()) == 2


def test_an_interrupted_trial_is_closed_and_the_others_are_kept(tmp_path: Path) -> None:
    study, calls = open_study(tmp_path), itertools.count()

    def interrupted(params: Params) -> Outcome:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return machine(params)

    with pytest.raises(KeyboardInterrupt):
        _search(study, interrupted)
    assert len(study.records()) == 2 and study._study.trials[-1].state.name == "FAIL"


def test_a_lost_gpu_ends_the_search_and_what_was_measured_is_kept(tmp_path: Path) -> None:
    study, calls = open_study(tmp_path), itertools.count()

    def lost(params: Params) -> Outcome:
        return machine(params) if next(calls) < 2 else Outcome(Kind.ENVIRONMENT, f"{GPU_LOST}: NVML says GPU lost")

    with pytest.raises(GpuLostError, match=GPU_LOST):
        _search(study, lost)
    assert len(study.tried()) == 2


def test_the_guard_learns_from_every_trial_the_last_one_too(tmp_path: Path) -> None:
    class Guard:
        def learn(self, tried: Sequence[object], num_out_of_memory: int) -> None:
            learned.append((len(tried), num_out_of_memory))

    learned: list[tuple[int, int]] = []
    outcomes = iter([ok(1.0), Outcome(Kind.OUT_OF_MEMORY, "no memory"), ok(1.0)])
    _search(open_study(tmp_path), lambda params: next(outcomes), guard=Guard(), num_trials=3)
    assert learned == [(0, 0), (1, 0), (1, 1), (2, 1)]


def test_the_guide_is_asked_when_nothing_waits_any_more(tmp_path: Path) -> None:
    rounds = [[], list(itertools.islice(space().configurations(), 3)), []]

    class Guide:
        def propose(self, records: object, tried: object) -> list[Params]:
            return rounds.pop(0)

        def foretell(self, params: Params) -> None: ...

    watcher = Silent()
    guided = {"objective": Objective.LATENCY, "budget_s": 600, "num_trials": 5}
    search(open_study(tmp_path), machine, Guide(), watcher, **guided)  # type: ignore[arg-type]
    assert watcher.sources == ["default", *["simulator"] * 3, "sampler"] and rounds == []


def test_what_was_foretold_is_kept_with_the_trial(tmp_path: Path) -> None:
    class Guide:
        def propose(self, records: object, tried: object) -> list[Params]:
            return []

        def foretell(self, params: Params) -> float:
            return 42.0

    study = open_study(tmp_path)
    search(study, machine, Guide(), Silent(), objective=Objective.LATENCY, budget_s=600, num_trials=2)  # type: ignore[arg-type]
    again = open_study(tmp_path, resume=True)
    assert [record.outcome.foretold_ms for record in again.records()] == [42.0, 42.0]


def _searched(folder: Path, measure: Machine = machine, **options: Any) -> Study:
    study = open_study(folder, space(fit=16), **options)
    study.enqueue([params for params in study.space.seeds() if params != study.space.default], "seed")
    _search(study, measure, num_trials=6)
    return study


@dataclass
class _Contender:
    measure: Machine
    params: Params

    def run(self, requests: Segment, /) -> Outcome:
        return self.measure(self.params)


def _choose(
    study: Study,
    measure: Machine = machine,
    unseen: Machine | None = None,
    verify: Machine = lambda params: ok(1.0),
    objective: Objective = Objective.LATENCY,
) -> Choice:
    """`unseen` is the machine on the text kept for confirming."""

    def contender(params: Params) -> AbstractContextManager[Contender]:
        return nullcontext(_Contender(unseen or measure, params))

    def confirms(finalists: Sequence[Params], default: Params) -> Confirmation:
        return confirm(
            finalists,
            default,
            [()] * 20,
            open_contender=contender,
            fit_together=lambda several: True,
            num_pairs=MIN_PAIRS,
            objective=objective,
            limits=study.limits,
            on_run=lambda name, outcome: None,
        )

    return choose(study, measure, verify, confirms, objective=objective, num_finalists=3)


def test_a_proven_gain_is_chosen(tmp_path: Path) -> None:
    choice = _choose(_searched(tmp_path))
    assert choice.params["group"] == 8 and choice.confirmation is not None and choice.confirmation.is_proven
    assert choice.drift == 1.0


def test_a_gain_that_is_gone_on_other_text_keeps_the_default(tmp_path: Path) -> None:
    study = _searched(tmp_path)
    choice = _choose(study, unseen=lambda params: ok(50.0))
    assert choice.params == study.space.default and "not proven" in choice.reason
    failing = _choose(study, unseen=lambda params: Outcome(Kind.WRONG_TOKENS, "differ"))
    assert failing.params == study.space.default and "wrong_tokens" in failing.reason


def test_a_finalist_that_computes_something_else_is_passed_over_and_the_study_knows(tmp_path: Path) -> None:
    study = _searched(tmp_path)

    def verify(params: Params) -> Outcome:
        return Outcome(Kind.WRONG_TOKENS, "differ") if params["group"] == 8 else ok(1.0)

    choice = _choose(study, verify=verify)
    assert choice.params.get("group", 1) != 8
    assert not [one for one in study.tried() if one.params.get("group") == 8]
    none = _choose(study, verify=lambda params: Outcome(Kind.WRONG_TOKENS, "differ"))
    assert none.params == study.space.default


def test_nothing_faster_keeps_the_default_without_confirming(tmp_path: Path) -> None:
    def worse_elsewhere(params: Params) -> Outcome:
        return ok(10.0 if params == space(fit=16).default else 20.0)

    study = _searched(tmp_path, worse_elsewhere)
    choice = _choose(study, worse_elsewhere)
    assert choice.params == study.space.default and choice.confirmation is None


def test_a_gpu_lost_at_the_end_is_no_word_on_the_finalists(tmp_path: Path) -> None:
    study, lost = _searched(tmp_path), Outcome(Kind.ENVIRONMENT, f"{GPU_LOST}: NVML says GPU lost")
    with pytest.raises(GpuLostError, match=GPU_LOST):
        _choose(study, lambda params: lost)
    with pytest.raises(GpuLostError, match=GPU_LOST):
        _choose(study, verify=lambda params: lost)


def test_memory_is_saved_as_long_as_it_is_hardly_slower(tmp_path: Path) -> None:
    def flat(params: Params) -> Outcome:
        slots = int(params.get("slots", 16))
        return ok(100.0 if slots > 8 else 100.0 * SLOWDOWN * 1.1, (10 + slots) << 20)

    study = open_study(tmp_path, space(fit=16, scheduler__group=1, cache__policy="lru", prefetch__depth=0))
    _search(study, flat)
    choice = _choose(study, flat, objective=Objective.MEMORY)
    assert choice.params["slots"] == 11 and "smaller" in choice.reason


def test_limits_on_times_exclude_what_is_faster_by_the_client_but_slower_by_the_token(tmp_path: Path) -> None:
    def measure(params: Params) -> Outcome:
        group = int(params.get("group", 1))
        found = ok(100.0 / group)
        assert found.result is not None
        return replace(found, result={**found.result, "tpot_ms_p50": 10.0 * group})

    study = _searched(tmp_path, measure, limits=Limits(LIMIT, slo_tpot_ms=25.0))
    assert any(one.params.get("group") == 8 for one in study.tried())
    assert _choose(study, measure).params.get("group", 1) <= 2


def test_drift_is_the_default_at_the_end_over_the_start(tmp_path: Path) -> None:
    study = _searched(tmp_path)
    before = machine(study.space.default).measurement.latency_ms_p50
    choice = _choose(study, lambda params: ok(before * 1.5), machine)
    assert choice.drift == pytest.approx(1.5)


def test_a_default_that_does_not_run_does_not_hide_what_does(tmp_path: Path) -> None:
    study = open_study(tmp_path, space(fit=64))
    study.enqueue([params for params in study.space.seeds() if params != study.space.default], "seed")
    _search(study, machine, num_trials=6)
    choice = _choose(study)
    assert "default does not run" in choice.reason and int(choice.params["slots"]) < 64


def test_a_search_that_tried_nothing_else_says_so(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    _search(study, machine, budget_s=1e-9)
    assert "nothing but the default was tried" in _choose(study).reason


def test_where_nothing_runs_there_is_no_choice(tmp_path: Path) -> None:
    def too_large(params: Params) -> Outcome:
        return ok(1.0, LIMIT + 1)

    study = _searched(tmp_path, too_large)
    with pytest.raises(NothingRunsError):
        _choose(study, too_large)


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
        (["--max-memory", ""], "is not a size"),
        (["--time-budget", "soon"], "90s, 6m or 1h"),
        (["--trials", "0"], "at least 1"),
        (["--slo-tpot", "-5"], "above 0"),
        (["--sampler", "brute", "--storage", "nonsense"], "is no URL"),
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
    monkeypatch.setattr("harness.search.setup.take_probe", partial(take_probe, budget_s=0.3))


@pytest.mark.slow
def test_all_of_it_for_real(
    home: Path,
    tiny_checkpoint: Path,
    text: list[str],
    brief: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("harness.search.plan.NUM_PAIRS", MIN_PAIRS)
    arguments = ["--model", str(tiny_checkpoint), "--trials", "3", "--out", "run", "--concurrency", "2", *text]
    assert tune.main([*arguments, "--set", "prefetch.depth=1", "--time-budget", "1h"]) == 0
    out = capsys.readouterr().out
    profile_path = home / "profiles" / f"{tiny_checkpoint.name}-cpu.yaml"
    assert json.loads(out.splitlines()[-1])["profile"] == str(profile_path.relative_to(home))
    assert "tuning for the CPU" in out and "ms/token p50" in out and "harness.check --profile" in out
    profile = load_profile(profile_path)
    assert profile.fixed == ("prefetch.depth",) and profile.prefetch.depth == 1
    assert profile.evidence is not None and profile.evidence.trials == 4 and profile.evidence.seed == 0
    assert profile.objectives is not None and (profile.objectives.peak_memory_bytes or 0) > 100e6
    assert profile.workload is not None and profile.workload.concurrency == 2
    assert profile.match is not None and profile.match.model is not None and profile.match.model.experts == 8
    table = pd.read_csv(home / "run" / "trials.csv")
    assert len(table) == 4 and set(table["outcome"]) <= {"ok", "hopeless"} and list(table["outcome"])[::3] == ["ok"] * 2
    assert table["tokens_sha256"].notna().equals(table["outcome"] == "ok")
    assert set((home / "run").iterdir()) >= {home / "run" / name for name in ("pareto.csv", "pareto.png")}
    environment = json.loads((home / "run" / "environment.json").read_text())
    assert environment["probe"]["curve"]["series"] and environment["stop_reason"] == "3 trials"

    import runtime

    with runtime.load(profile_path) as engine:
        assert engine.profile.cache.slots == profile.cache.slots


def _pretend(monkeypatch: pytest.MonkeyPatch, on_call: Callable[[int], None]) -> None:
    """Trials and contenders that only pretend: groups help. `on_call` is told which trial begins."""
    calls = itertools.count()

    def measured(params: Params) -> Outcome:
        return ok(100.0 / float(params.get("group", 1)), 300 << 20)

    class Fake:
        def remember(self, records: object) -> None: ...

        def verify(self, params: Params) -> Outcome:
            return measured(params)

        def __call__(self, params: Params, part: Part = "search") -> Outcome:
            on_call(next(calls))
            return measured(params)

    def confirmed(setup: Setup, on_run: Callable[[str, Outcome], None], *which: Any) -> Confirmation:
        def contender(params: Params) -> AbstractContextManager[Contender]:
            return nullcontext(_Contender(measured, params))

        together = {"open_contender": contender, "fit_together": lambda several: True, "on_run": on_run}
        wanted = {"objective": setup.settings.objective, "limits": setup.settings.limits}
        return confirm(*which, [()] * 9, num_pairs=MIN_PAIRS, **together, **wanted)

    monkeypatch.setattr(Setup, "measurer", lambda setup: Fake())
    monkeypatch.setattr(Setup, "confirm", confirmed)


@pytest.mark.slow
@pytest.mark.parametrize(("presses", "kept"), [(1, 3), (2, 2)])
def test_ctrl_c_keeps_what_was_measured_and_resume_goes_on(
    home: Path,
    tiny_checkpoint: Path,
    text: list[str],
    brief: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    presses: int,
    kept: int,
) -> None:
    """Once: the trial that runs is measured to its end. Twice: it is lost."""

    def press(call: int) -> None:
        for _ in range(presses if call == 2 else 0):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("runtime.interrupt.ECHO_S", 0.0)  # the second press is no echo of the first
    _pretend(monkeypatch, press)
    (home / "run").mkdir()  # may be there, as long as it holds no run
    arguments = ["--model", str(tiny_checkpoint), "--trials", "4", "--out", "run", "--no-simulator", *text]
    assert tune.main(arguments) == 130
    error = capsys.readouterr().err
    assert (
        f"{kept} trials are kept in run" in error and "unconfirmed" in error and error.rstrip().endswith("interrupted")
    )
    assert len(pd.read_csv(home / "run" / "trials.csv")) == kept
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
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["chosen"]["scheduler.group"] == 8 and last["ratio"]["high"] < 1 and last["trials"]["ok"] == 5


def test_a_gpu_that_is_lost_is_one_line_and_what_was_measured_is_kept(
    home: Path,
    tiny_checkpoint: Path,
    text: list[str],
    brief: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose(call: int) -> None:
        if call == 2:
            raise GpuLostError(f"{GPU_LOST}: NVML says GPU lost")

    _pretend(monkeypatch, lose)
    assert tune.main(["--model", str(tiny_checkpoint), "--out", "run", "--no-simulator", *text]) == 2
    error = capsys.readouterr().err
    assert "2 trials are kept in run" in error and error.splitlines()[-1].startswith(f"error: {GPU_LOST}")
    assert json.loads((home / "run" / "environment.json").read_text())["stop_reason"].startswith(GPU_LOST)


@pytest.mark.slow
def test_kill_9_in_a_trial_loses_that_trial_alone(
    home: Path,
    tiny_checkpoint: Path,
    text: list[str],
    brief: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real trials in a command of its own, then the same command with --resume."""
    brief_trials = ["--concurrency", "2", "--trials", "4", "--no-simulator"]
    arguments = ["--model", str(tiny_checkpoint), *brief_trials, "--out", "run", *text]
    here = str(Path(__file__).parent)
    program = (
        f"import sys; sys.path.append({here!r}); from test_tune import tune_until_killed as tune; tune(sys.argv[1:])"
    )
    # Not as a file, which every trial would import.
    killed = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "trial   2/4" in killed.stdout and "trial   3/4" not in killed.stdout
    until = time.monotonic() + 10  # what it was measuring goes with it
    while _writers(home / "run" / "trials.log") and time.monotonic() < until:
        time.sleep(0.1)
    assert _writers(home / "run" / "trials.log") == []

    calls: list[int] = []
    _pretend(monkeypatch, calls.append)
    assert tune.main([*arguments, "--resume"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(calls) == 3 and sum(last["trials"].values()) == 5  # two were kept; the last is the default's again


def _writers(file: Path) -> list[Path]:
    """Who has it open."""

    def leads_there(link: Path) -> bool:
        try:
            return os.readlink(link) == str(file.resolve())
        except OSError:
            return False

    return [link for link in Path("/proc").glob("[0-9]*/fd/*") if leads_there(link)]


@pytest.mark.slow
def test_who_joins_a_study_confirms_and_writes_what_all_have_found(
    home: Path, tiny_checkpoint: Path, text: list[str], brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    _pretend(monkeypatch, calls.append)
    shared = ["--storage", f"journal://{home}/shared.journal", "--trials", "4", "--no-simulator", *text]
    for name, memory_bytes in (("first", 16 << 30), ("second", (16 << 30) - (1 << 20))):
        monkeypatch.setattr("runtime.machine.total_memory_bytes", lambda size=memory_bytes: size)
        where = ["--out", name, "--profile-out", f"{name}.yaml"]
        assert tune.main(["--model", str(tiny_checkpoint), *shared, *where]) == 0
        profile = load_profile(home / f"{name}.yaml")
        assert profile.scheduler.group == 8 and profile.evidence is not None and profile.evidence.ratio is not None
    assert len(calls) == 4 + 1 + 1  # the second has but to run the default again
    assert [len(pd.read_csv(home / name / "trials.csv")) for name in ("first", "second")] == [5, 6]


def test_where_nothing_keeps_the_limits_it_says_which_by_how_much_and_what_comes_closest(
    home: Path,
    tiny_checkpoint: Path,
    text: list[str],
    brief: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _pretend(monkeypatch, lambda call: None)
    arguments = ["--model", str(tiny_checkpoint), "--trials", "3", "--out", "run", "--no-simulator", *text]
    assert tune.main([*arguments, "--slo-ttft", "0.5"]) == 2
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and "exceeds --slo-ttft 0.5 ms by 100.0%" in error and "group" in error
    assert json.loads(out.splitlines()[-1])["chosen"] is None
    assert (home / "run" / "report.html").exists() and not (home / "profiles").exists()


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(
    home: Path, tiny_checkpoint: Path, text: list[str], brief: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "run").mkdir()
    before = set(home.rglob("*"))
    arguments = ["--model", str(tiny_checkpoint), "--set", "cache.policy=lru", "--out", "run", *text]
    assert tune.main([*arguments, "--max-memory", "100TiB", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "--max-memory is 110 TB, this machine has " in out and "free: the latter counts" in out
    assert "predicted not to fit" in out and "cache.policy" in out and "to confirm" in out
    assert set(home.rglob("*")) == before


def test_what_the_command_line_offers_is_what_there_is() -> None:
    assert tune.SAMPLERS == SAMPLERS and tuple(Objective) == tune.OBJECTIVES


def tune_until_killed(arguments: list[str]) -> int:
    """Killed when the first request of the third trial has finished."""
    trials: list[Params] = []
    measure, run = Measurer.__call__, TrialRunner.run

    def counted(measurer: Measurer, params: Params, part: Part = "search") -> Outcome:
        trials.append(params)
        return measure(measurer, params, part)

    def kill(progress: object) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    def run_until_killed(runner: TrialRunner, work: Any, argument: Any, timeout_s: float, watch: Any = None) -> Outcome:
        return run(runner, work, argument, timeout_s, kill if len(trials) == 3 else watch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measurer, "__call__", counted)
        patch.setattr(TrialRunner, "run", run_until_killed)
        patch.setattr("harness.search.setup.take_probe", partial(take_probe, budget_s=0.3))
        return tune.main(arguments)
