"""Tables, plot, profile and the confirmation behind it, from made-up measurements."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from test_study import machine, measurement, ok, open_study, run, space

from harness.measure.stats import Ratio
from harness.report.plots import pareto_png
from harness.report.profiles import commit, evidence, near, objectives, versions
from harness.report.progress import Progress
from harness.report.tables import front_table, front_text, trials_table
from harness.search.confirm import Confirmation, confirm
from harness.search.outcome import Kind, Outcome, Record, Tried
from harness.search.space import Params


def test_the_trials_table_has_every_trial_and_every_knob(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    run(study, 6)
    table = trials_table(study.records(), study.space)
    assert list(table["number"]) == sorted(table["number"]) and len(table) == len(study.records())
    assert {"slots", "group", "policy", "depth", "count", "every", "outcome", "latency_ms_p50"} <= set(table.columns)
    failed = table[table["outcome"] == "out_of_memory"]
    assert len(failed) and failed["latency_ms_p50"].isna().all() and (failed["message"] == "no memory").all()


def test_the_front_table_is_relative_to_the_default_and_marks_the_choice() -> None:
    where = space()
    default, other = where.default, {**where.default, "group": 8}
    front = [Tried(other, (measurement(5.0, 9_000_000),)), Tried(default, (measurement(10.0, 8_000_000),))]
    table = front_table(front, where, front[1], other)
    assert list(table["latency_ratio"]) == [0.5, 1.0] and list(table["chosen"]) == [True, False]
    text = front_text(table, 64).splitlines()
    assert len(text) == 3 and text[1].lstrip().startswith("*") and "0.50x" in text[1] and "32 (50%)" in text[2]
    assert "default" in text[2] and "default" not in text[1]


def test_the_front_without_a_default_has_no_ratio() -> None:
    table = front_table([Tried({"slots": 4}, (measurement(5.0),))], space(), None, {})
    assert pd.isna(table["latency_ratio"][0]) and "5.0 ms" in front_text(table, 64)


def test_the_plot_is_a_png() -> None:
    tried = [Tried({"slots": n}, (measurement(10.0 / n, n << 20),)) for n in (1, 2, 3)]
    assert pareto_png(tried, {"slots": 3}, {"slots": 2}, 2 << 20).startswith(b"\x89PNG")


def _runner(latencies: dict[str, list[float]]) -> tuple[list[str], object]:
    order: list[str] = []

    def run_one(params: Params) -> Outcome:
        order.append(str(params["name"]))
        return ok(latencies[str(params["name"])].pop(0))

    return order, run_one


def _confirm(default: list[float], finalist: list[float]) -> tuple[list[str], Confirmation]:
    order, run_one = _runner({"A": list(default), "B": list(finalist)})
    return order, confirm(run_one, {"name": "B"}, {"name": "A"}, len(default), lambda *_: None)  # type: ignore[arg-type]


def test_confirmation_is_interleaved_and_paired() -> None:
    order, found = _confirm([10, 20, 40], [8, 16, 32])
    assert "".join(order) == "ABBAAB" and found.is_proven
    assert found.ratio is not None and found.ratio.estimate == pytest.approx(0.8)
    assert (found.confidence, len(found.default)) == (0.75, 3)


def test_a_gain_that_one_pair_contradicts_is_not_proven() -> None:
    _, found = _confirm([10, 10, 10], [8, 8, 11])
    assert not found.is_proven and found.ratio is not None and found.ratio.estimate == pytest.approx(0.8)


def test_a_run_that_fails_proves_nothing_and_says_why() -> None:
    outcomes = [ok(1.0), Outcome(Kind.CRASH, "ended by SIGSEGV")]
    found = confirm(lambda _: outcomes.pop(0), {}, {}, 3, lambda *_: None)
    assert not found.is_proven and found.ratio is None and "finalist ended with crash" in found.failure


def test_evidence_holds_only_what_was_proven() -> None:
    runs = (measurement(10.0), measurement(12.0), measurement(11.0))
    records = [
        Record(0, {}, ok(1.0), False),
        Record(1, {}, Outcome(Kind.OUT_OF_MEMORY), False),
        Record(2, {}, ok(1.0), True),
    ]
    proven = Confirmation(runs, runs, Ratio(0.5, 0.4, 0.6, 3))
    found = evidence(records, runs, proven, seed=7, memory_model_error=0.01)
    assert (found.trials, found.oom, found.seed, found.pairs) == (2, 1, 7, 3)
    assert found.ratio is not None and (found.ratio.low, found.ratio.confidence) == (0.4, 0.75)
    assert found.baseline is not None and found.baseline.latency_ms_p50 == 11.0
    doubtful = Confirmation(runs, runs, Ratio(0.9, 0.8, 1.1, 3))
    kept = evidence(records, (), doubtful, seed=7, memory_model_error=None)
    assert kept.ratio is None and kept.pairs is None and kept.baseline is None


def test_objectives_are_medians_and_the_highest_peak() -> None:
    found = objectives([measurement(1.0, 5), measurement(3.0, 9), measurement(2.0, 7)])
    assert (found.latency_ms_p50, found.peak_memory_bytes, found.hit_rate) == (2.0, 9, None)


def test_provenance_names_versions_and_no_path_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert near(str(tmp_path / "models" / "m")) == "models/m" and near("org/name") == "org/name"
    assert {"python", "torch", "optuna"} <= versions().keys()
    assert commit() is None or len(commit() or "") >= 12


def test_progress_without_a_terminal_is_a_line_for_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(60, None)
    progress.trial(1, {"slots": 4}, machine({"slots": 4}), Tried({"slots": 4}, (measurement(96.0),)))
    progress.trial(2, {"slots": 60}, machine({"slots": 60}), None)
    progress.confirmation("default", ok(math.pi))
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 3
        and "best 96.0 ms" in lines[0]
        and "out_of_memory: no memory" in lines[1]
        and "3.1 ms" in lines[2]
    )
