"""What a run leaves behind, from made-up measurements."""

from __future__ import annotations

import errno
import json
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.measure.provenance import commit
from harness.report import plots, results
from harness.report.messages import failures_text, infeasible_text, limits_text, outcome_text, plan_text, verdict_text
from harness.report.page import page
from harness.report.profiles import objectives, versions
from harness.report.progress import Progress
from harness.report.results import Results, ResultsError, summary, write_profile, write_run
from harness.report.run_file import Confirmed, Point, Run, RunFile, count_outcomes, load_run
from harness.report.tables import front_table, front_text, trials_table
from harness.report.text_plot import text_pareto
from harness.search.agreement import agreement
from harness.search.objective import Objective
from harness.search.outcome import Kind, Limits, Measurement, Outcome, Record, Tried, feasible, front
from harness.search.space import Params, Setting, Space
from runtime.profile import Match, ModelIdentity, Profile, Provenance, Ratio, Workload, load_profile, portable

LIMITS = Limits(max_memory_bytes=600_000_000)


def measurement(latency_ms: float, peak_memory_bytes: int = 1 << 20, ttft_ms: float = 50.0) -> Measurement:
    tpot_ms, tokens_per_s = 0.8 * latency_ms, 1e3 / latency_ms
    stats = {"hit_rate": 0.5, "bytes_per_token": 7.0, "stall_s": 1.0}
    return Measurement(latency_ms, ttft_ms, tpot_ms, tokens_per_s, "sha", peak_memory_bytes, 10, 0.1, 1.0, 100, stats)


def ok(latency_ms: float, peak_memory_bytes: int = 1 << 20) -> Outcome:
    return Outcome(Kind.OK, result=measurement(latency_ms, peak_memory_bytes).as_dict(), wall_s=2.0)


def space() -> Space:
    return Space(Setting(64, 32, 8), Profile.default(), fixed=("compute.prefill",))


def tried_of(records: Sequence[Record]) -> list[Tried]:
    runs: dict[str, tuple[Params, list[Measurement]]] = {}
    for one in records:
        if one.outcome.kind is Kind.OK and not one.reused:
            runs.setdefault(json.dumps(one.params), (one.params, []))[1].append(one.outcome.measurement)
    return [Tried(params, tuple(measured)) for params, measured in runs.values()]


def searched(number: int = 30) -> list[Record]:
    """The default, then configurations at random: more slots are faster and larger, some fail."""
    where, draw = space(), random.Random(1)
    records = [Record(0, where.default, ok(100.0, 500_000_000), False)]
    kinds = [kind for kind in Kind if kind is not Kind.OK]
    for i in range(1, number):
        params = where.sample(draw)
        slots = int(params["slots"])
        outcome = ok(300 / slots**0.5 * draw.uniform(0.8, 1.2), round(4e8 + slots * 1e7))
        if i % 5 == 0:
            outcome = Outcome(kinds[i // 5 - 1], "the <reason> & why", environment={"steal_share": 0.1})
        records.append(Record(i, params, outcome, False))
    return records


def confirmed(params: Params, ratio: tuple[float, float, float] = (0.8, 0.75, 0.85)) -> Confirmed:
    estimate, low, high = ratio
    return Confirmed(
        params=dict(params),
        objectives=objectives([measurement(100 * estimate, 450_000_000)]),
        baseline=objectives([measurement(100.0, 510_000_000)]),
        ratio=Ratio(estimate=estimate, low=low, high=high, confidence=0.98),
        pairs=12,
        is_proven=high < 1,
    )


def run_file(records: Sequence[Record], chosen: Params | None, **changed: Any) -> RunFile:
    where = space()
    identity = ModelIdentity(architecture="A", layers=2, experts=32, top_k=2, expert_bytes=9, dtype="bfloat16")
    found = RunFile(
        base=Profile.default(),
        num_experts=64,
        fixed=("compute.prefill",),
        objective=Objective.LATENCY,
        limits=LIMITS,
        workload=Workload(name="text", sha256="0" * 64, concurrency=8, context=96),
        match=Match(device="cpu", model=identity),
        provenance=Provenance(created="2026-01-01T00:00:00+00:00", model="m", command="python -m harness.tune --out R"),
        default=where.default,
        chosen=None if chosen is None else dict(chosen),
        reason="proven",
        drift=1.01,
        stop_reason="30 trials",
        seed=7,
        outcomes=count_outcomes(records),
        simulator_rank_correlation=0.75,
        points=tuple(
            Point(
                params=dict(one.params),
                values=where.complete(one.params),
                overrides=where.overrides(one.params),
                runs=tuple(Run.of(run) for run in one.runs),
                memory_model_error=0.01,
            )
            for one in tried_of(records)
        ),
    )
    return found.model_copy(update=changed)


def finished(folder: Path, **changed: Any) -> Results:
    """A whole run."""
    records = searched()
    tried = tried_of(records)
    chosen = feasible(tried, LIMITS)[0].params
    run = run_file(records, chosen, **{"confirmed": confirmed(chosen), **changed})
    return Results(
        folder=folder,
        run=run,
        records=records,
        tried=tried,
        space=space(),
        simulated=[(one.params, 1.1 * one.latency_ms_p50) for one in tried],
        importances={"latency": {"slots": 0.7, "group": 0.3}, "memory": {"slots": 0.9, "group": 0.1}},
        environment={"command": "python -m harness.tune --set 'cache.policy=lru'", "hardware": {"cpu": "<C> & D"}},
        again="python -m harness.tune --out R --resume",
    )


def test_the_trials_table_has_every_trial_and_every_knob() -> None:
    records = searched()
    simulated = [(records[1].params, 42.0)]
    table = trials_table(records, space(), Limits(600_000_000, slo_tpot_ms=40.0), simulated)
    assert list(table["number"]) == list(range(30))
    assert set(space().complete(space().default)) <= set(table.columns)
    failed = table[table["outcome"] != "ok"]
    assert len(failed) == 5 and failed["latency_ms_p50"].isna().all() and (failed["message"] != "").all()
    assert (failed["environment_steal_share"] == 0.1).all()
    assert table["slo_tpot_excess"][0] == pytest.approx(1.0) and table["memory_excess"][0] == pytest.approx(-1 / 6)
    assert table["simulated_latency_ms"][1] == 42.0 and table["simulated_latency_ms"].count() == 1
    assert set(table["source"]) == {"sampler"}


def test_the_front_table_is_relative_to_the_default_and_marks_the_choice() -> None:
    where = space()
    default, other = where.default, {**where.default, "group": 8}
    shown = [Tried(other, (measurement(5.0, 9_000_000),)), Tried(default, (measurement(10.0, 8_000_000),))]
    table = front_table(shown, shown[1], other, where.complete)
    assert list(table["latency_ratio"]) == [0.5, 1.0] and list(table["chosen"]) == [True, False]
    text = front_text(table, where.complete(default), 64).splitlines()
    assert len(text) == 3 and text[1].lstrip().startswith("*") and "0.50x" in text[1] and "32 (50%)" in text[2]
    assert "default" in text[2] and "default" not in text[1]
    assert "group" in text[0] and not {"policy", "depth", "threads"} & set(text[0].split())


def test_a_long_front_still_shows_the_choice_and_the_default() -> None:
    where = space()
    shown = [Tried({**where.default, "slots": n}, (measurement(50.0 - n, n),)) for n in range(32, 4, -1)]
    table = front_table(shown, shown[0], shown[-1].params, where.complete)
    text = front_text(table, where.complete(where.default), 64).splitlines()
    assert len(text) == 16 and "default" in text[1] and text[-1].lstrip().startswith("*")


def test_the_front_without_a_default_has_no_ratio() -> None:
    where = space()
    table = front_table([Tried({"slots": 4}, (measurement(5.0),))], None, None, where.complete)
    assert pd.isna(table["latency_ratio"][0]) and "5.0" in front_text(table, where.complete(where.default), 64)
    assert front_text(front_table([], None, None, where.complete), {}, 64) == ""


def _marks(text: str) -> dict[str, list[tuple[int, int]]]:
    rows = [line.split("|", 1)[1] for line in text.splitlines() if "|" in line]
    found: dict[str, list[tuple[int, int]]] = {}
    for i, row in enumerate(rows):
        for column, mark in enumerate(row):
            found.setdefault(mark, []).append((column, i))
    return found


def test_the_text_plot_puts_marks_where_the_figures_are() -> None:
    points = ((10.0, 500), (20.0, 400), (40.0, 300), (40.0, 450), (14.0, 700))
    tried = [Tried({"slots": i}, (measurement(ms, mb * 10**6),)) for i, (ms, mb) in enumerate(points)]
    text = text_pareto(tried, LIMITS, tried[1], tried[0])
    marks = _marks(text)
    assert marks["*"] == [(0, 7)] and marks["o"] == [(59, 14)] and marks["."] == [(59, 9)]
    (x, y), (excess, top) = marks["D"][0], marks["x"][0]
    assert (x, y) in ((29, 10), (30, 10)) and top == 0 and 0 < excess < x
    assert {row for _, row in marks["-"]} == {4} and len(marks["-"]) == 60
    lines = text.splitlines()
    assert len(lines) == 20 and max(map(len, lines)) <= 80 and text.isascii()
    assert "peak memory" in lines[0] and "latency per output token" in lines[18]
    assert lines[1].split("|")[0].strip() == "700" and lines[15].split("|")[0].strip() == "300"
    assert lines[17].split() == ["10", "20", "40", "ms"] and "chosen" in lines[19]


def test_there_is_no_text_plot_of_one_point_and_equal_ones_are_no_trouble() -> None:
    one = Tried({"slots": 1}, (measurement(10.0, 10**6),))
    assert text_pareto([one], Limits(), one, None) == ""
    assert _marks(text_pareto([one, replace(one, params={"slots": 2})], Limits(), None, None))["o"] == [(0, 14)]


def _figures() -> dict[str, Any]:
    return finished(Path("R")).figures()


def test_every_figure_is_a_png_and_its_ids_are_its_own() -> None:
    figures = _figures()
    assert set(figures) == {"pareto", "history", "importance", "simulated"}
    seen: set[str] = set()
    for name, figure in figures.items():
        assert plots.png(figure).startswith(b"\x89PNG")
        text = plots.svg(figure, name)
        ids = [element.attrib["id"] for element in ET.fromstring(text).iter() if "id" in element.attrib]
        assert ids and len(ids) == len(set(ids)) and not seen & set(ids)
        seen |= set(ids)
        assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text)) <= set(ids)


def test_the_pareto_plot_keeps_what_exceeds_a_limit_off_the_front() -> None:
    tried = [Tried({"slots": n}, (measurement(10.0 / n, n * 10**6),)) for n in (1, 2, 3)]
    figure = plots.pareto(tried, Limits(max_memory_bytes=2_000_000), tried[1], None)
    line = next(line for line in figure.axes[0].lines if line.get_label() == "Pareto front")
    assert list(line.get_ydata()) == [2.0, 1.0]
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"exceeds a limit", "memory limit, 2 MB"}


def test_the_history_shows_the_best_so_far_and_every_failure() -> None:
    records = [
        Record(0, {"slots": 1}, ok(10.0, 1), False),
        Record(1, {"slots": 9}, ok(1.0, 9), False),
        Record(2, {"slots": 2}, Outcome(Kind.CRASH, "why"), False),
        Record(3, {"slots": 3}, ok(5.0, 3), False),
        Record(4, {"slots": 3}, ok(5.0, 3), True),
    ]
    axes = plots.history(records, Limits(max_memory_bytes=5)).axes[0]
    best = next(line for line in axes.lines if line.get_label() == "best so far")
    assert list(best.get_xdata()) == [0, 3, 3] and list(best.get_ydata()) == [10.0, 5.0, 5.0]
    shown = {points.get_label(): [int(x) for x, _ in points.get_offsets()] for points in axes.collections}
    assert shown == {"measured": [0, 3], "exceeds a limit": [1], "crash": [2]}


def test_a_search_without_a_measurement_still_has_its_plots() -> None:
    records = [Record(0, space().default, Outcome(Kind.OUT_OF_MEMORY, "why"), False)]
    assert plots.png(plots.history(records, LIMITS)).startswith(b"\x89PNG")


def test_agreement_is_of_what_was_both_foretold_and_measured() -> None:
    tried = [Tried({"slots": n}, (measurement(100.0 - n),)) for n in range(20)]
    foretold = [({"slots": n}, 1.1 * (100.0 - n)) for n in range(12)] + [({"slots": 99}, 1.0)]
    found = agreement(foretold, tried)
    assert found is not None and len(found.pairs) == 12 and found.rank_correlation == pytest.approx(1.0)
    assert found.median_error == pytest.approx(0.1)
    assert agreement(foretold[:5], tried) is None
    assert agreement([({"slots": n}, 7.0) for n in range(12)], tried) is None


class _Reader(HTMLParser):
    """Checks that elements are closed in order, and keeps what a browser would fetch."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        names = dict(attributes)
        self.ids += [str(names["id"])] if "id" in names else []
        links = [names.get(name) for name in ("src", "href", "xlink:href")]
        self.fetched += [link for link in links if link and not link.startswith("#")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    hostile = pd.DataFrame({"message": ["<script>alert(1)</script>"], "empty": [None]})
    text = page(
        title="Run <1>",
        verdict="a & b",
        command="tune --set 'x=<y>'",
        figures=_figures(),
        front=pd.DataFrame(),
        trials=hostile,
        environment={"cpu": "</pre><b>"},
    )
    reader = _Reader()
    reader.feed(text)
    assert text.startswith("<!DOCTYPE html>") and not reader.open and not reader.fetched
    assert len(reader.ids) == len(set(reader.ids)) > 20 and text.count("<svg") == 4
    assert "<script" not in text and "url(http" not in text and "@import" not in text and "empty" not in text
    shown = "".join(reader.text)
    assert all(part in shown for part in ("Run <1>", "a & b", "'x=<y>'", "<script>alert(1)</script>", "</pre><b>"))


def test_a_run_folder_is_complete_and_can_be_read_back(tmp_path: Path) -> None:
    found = finished(tmp_path / "R")
    write_run(found)
    assert {path.name for path in (tmp_path / "R").iterdir()} == {
        "run.json", "environment.json", "trials.csv", "pareto.csv", "report.html",
        "pareto.png", "history.png", "importance.png", "simulated.png",
    }  # fmt: skip
    assert load_run(tmp_path / "R") == found.run
    table = pd.read_csv(tmp_path / "R" / "pareto.csv")
    assert len(table) == len(front(feasible(found.tried, LIMITS))) and table["chosen"].sum() == 1
    assert table["peak_memory_bytes"].max() <= 600_000_000 and table["latency_ms_p50"].is_monotonic_increasing
    assert len(pd.read_csv(tmp_path / "R" / "trials.csv")) == 30
    html = (tmp_path / "R" / "report.html").read_text()
    assert "cache.policy=lru" in html and "&lt;C&gt; &amp; D" in html and "12 interleaved pairs" in html
    assert "m (A, 64 experts)" in html and "--max-memory 600 MB" in html


def test_a_run_in_which_nothing_ran_is_written_too(tmp_path: Path) -> None:
    records = [Record(0, space().default, Outcome(Kind.TOO_LARGE, "no room"), False)]
    run = run_file(records, None, simulator_rank_correlation=None, reason="nothing can be used", drift=None)
    found = replace(finished(tmp_path / "R"), run=run, records=records, tried=[], simulated=[], importances={})
    write_run(found)
    assert load_run(tmp_path / "R").points == () and not (tmp_path / "R" / "pareto.png").exists()
    told = summary(found, None)
    assert told["profile"] is None and told["chosen"] is None and told["trials"] == {"too_large": 1}
    assert found.text() == "chosen     nothing can be used\nended      30 trials"


@pytest.mark.parametrize("failing", ["run.json", "report.html", "p.yaml"])
def test_a_full_disk_is_one_line_and_leaves_no_part_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    found = finished(tmp_path / "R")
    whole = results.write_atomic

    def full(path: Path, data: bytes | str) -> None:
        if path.name != failing:
            whole(path, data)
            return
        monkeypatch.setattr("os.fsync", _no_space)
        whole(path, data)

    monkeypatch.setattr(results, "write_atomic", full)
    with pytest.raises(ResultsError) as caught:
        if failing == "p.yaml":
            write_profile(found, tmp_path / "p.yaml")
        write_run(found)
    said = str(caught.value)
    assert failing in said and "No space left on device" in said and "safe in the study" in said
    assert said.endswith("python -m harness.tune --out R --resume")
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert failing not in left and not [name for name in left if name.endswith(".tmp")]


def _no_space(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_profile_of_the_choice_has_what_was_confirmed(tmp_path: Path) -> None:
    found = finished(tmp_path, limits=Limits(600_000_000, slo_tpot_ms=90.0))
    profile = write_profile(found, tmp_path / "p.yaml")
    assert load_profile(tmp_path / "p.yaml") == profile
    evidence, limits = profile.evidence, profile.limits
    assert evidence is not None and evidence.ratio is not None and limits is not None
    assert (evidence.ratio.low, evidence.ratio.confidence, evidence.pairs) == (0.75, 0.98, 12)
    launched = sum(one.outcome.was_launched for one in found.records)
    memory = sum(one.outcome.kind in (Kind.TOO_LARGE, Kind.OUT_OF_MEMORY) for one in found.records)
    assert (evidence.trials, evidence.oom, evidence.seed) == (launched, memory, 7) and memory and launched < 30
    assert (evidence.simulator_rank_correlation, evidence.memory_model_error) == (0.75, 0.01)
    assert (limits.max_memory_bytes, limits.slo_tpot_ms, limits.slo_ttft_ms) == (600_000_000, 90.0, None)
    assert profile.objectives is not None and profile.objectives.latency_ms_p50 == pytest.approx(80.0)
    assert profile.objectives.fraction_of_bound is None and profile.fixed == ("compute.prefill",)
    assert evidence.baseline is not None and evidence.baseline.latency_ms_p50 == 100.0


def test_a_default_that_was_kept_claims_nothing() -> None:
    records = searched()
    other = tried_of(records)[3].params
    run = run_file(records, space().default, confirmed=confirmed(other, (0.97, 0.9, 1.05)))
    point = run.point(space().default)
    assert point is not None
    profile = run.profile(point)
    assert profile.evidence is not None and profile.evidence.ratio is None and profile.evidence.pairs is None
    assert profile.objectives == profile.evidence.baseline == run.confirmed.baseline  # type: ignore[union-attr]
    assert "the finalist's latency 0.97 [0.90, 1.05]" in verdict_text(run)


def test_limits_that_were_not_set_are_not_in_the_profile() -> None:
    run = run_file(searched(), space().default, limits=Limits())
    assert run.profile(run.points[0]).limits is None


def test_another_predictor_leaves_the_artifact_of_the_profile_s_own(tmp_path: Path) -> None:
    kind = {"predictor.kind": "routing_path", "predictor.artifact": "a.npz"}
    base = Profile.default().with_overrides(kind)
    where = Space(Setting(64, 32, 8, predictors=("gate_lookahead", "routing_path")), base)
    params = {**where.default, "predictor": "gate_lookahead"}
    point = run_file(searched(), None).points[0].model_copy(update={"overrides": where.overrides(params)})
    run = run_file(searched(), None, base=base, points=(point,))
    (tmp_path / "run.json").write_text(run.to_json())
    again = load_run(tmp_path)
    assert again.profile(again.points[0]).predictor.artifact is None


def test_the_summary_is_json_and_says_what_was_found(tmp_path: Path) -> None:
    found = finished(tmp_path)
    told = json.loads(json.dumps(summary(found, tmp_path / "p.yaml")))
    assert told["ratio"]["low"] == 0.75 and told["objective"] == "latency" and told["is_default"] is False
    assert told["limits"] == {"max_memory_bytes": 600_000_000, "slo_tpot_ms": None, "slo_ttft_ms": None}
    assert sum(told["trials"].values()) == 30 and told["stop_reason"] == "30 trials"
    assert told["chosen"]["cache.slots"] == found.run.chosen["slots"]  # type: ignore[index]
    assert told["simulator_rank_correlation"] == 0.75 and told["run"] == str(tmp_path)


def test_the_text_for_the_terminal_has_plot_table_and_verdict() -> None:
    text = finished(Path("R")).text()
    assert "memory limit" in text and "vs default" in text and "latency 0.80 [0.75, 0.85] of the default's" in text
    assert "98.0% interval, 12 interleaved pairs" in text and "1.01 of its time" in text


def test_objectives_are_medians_and_the_highest_peak() -> None:
    found = objectives([measurement(1.0, 5), measurement(3.0, 9), measurement(2.0, 7)])
    assert (found.latency_ms_p50, found.peak_memory_bytes, found.hit_rate) == (2.0, 9, 0.5)


def test_provenance_names_versions_and_no_path_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert portable(str(tmp_path / "models" / "m")) == "models/m" and portable("org/name") == "org/name"
    assert {"python", "torch", "optuna"} <= versions().keys()
    assert commit() is None or len(commit() or "") >= 12


def test_what_cannot_be_kept_names_the_limit_the_excess_and_the_closest() -> None:
    slow, large = measurement(125.0, 550_000_000), measurement(50.0, 900_000_000)
    tried = [Tried({"slots": 4}, (slow,)), Tried({"slots": 60}, (large,))]
    said = infeasible_text(tried, Limits(500_000_000, slo_tpot_ms=80.0))
    assert "(slots 4)" in said and "--max-memory 500 MB by 10.0% (550 MB)" in said
    assert "--slo-tpot 80 ms by 25.0% (100.0 ms)" in said and "slo-ttft" not in said and "each limit" not in said
    either = infeasible_text(tried, Limits(600_000_000, slo_tpot_ms=80.0))
    assert "--max-memory" not in either and "each limit alone can be kept" in either


def test_where_nothing_ran_the_outcomes_are_counted() -> None:
    kinds = (Kind.TIMEOUT, Kind.OUT_OF_MEMORY)
    records = [Record(i, {}, Outcome(kind, f"reason {i}"), False) for i, kind in enumerate(kinds)]
    assert failures_text(records) == "1 out of memory, 1 timeout; the last one: reason 1"
    assert failures_text([]) == "nothing was tried"
    assert outcome_text(Outcome(Kind.WRONG_TOKENS, "differ")) == "wrong tokens"
    assert limits_text(Limits(slo_ttft_ms=1500)) == "--slo-ttft 1500 ms"


def _plan(**changed: Any) -> str:
    given: dict[str, Any] = {
        "fixed": {"compute.prefill": "eager"},
        "objective": Objective.BALANCED,
        "limits": LIMITS,
        "trial": "16 requests of 64 + 32 tokens, 8 outstanding",
        "trial_s": 10.0,
        "budget_s": 300.0,
        "num_trials": None,
        "confirm_s": 90.0,
        "share_infeasible": 0.25,
    }
    return plan_text(space(), **{**given, **changed})


def test_the_plan_has_every_knob_what_is_fixed_and_how_long_it_takes() -> None:
    text = _plan()
    assert f"{space().size():,} configurations, 25% of them predicted not to fit" in text
    for knob in space().knobs:
        line = next(line for line in text.splitlines() if line.split()[0] == knob.name)
        assert knob.key in line and f"[{knob.default}]" in line
    assert "  fixed" in text and "balanced; limits: --max-memory 600 MB" in text
    assert "about 29 others" in text and "about 6:30: 5:00 to search, 1:30 to confirm" in text
    few = _plan(num_trials=4, limits=Limits())
    assert "about 3 others" in few and "about 2:10: 0:40 to search" in few and "memory that is free" in few


def test_progress_without_a_terminal_is_a_line_for_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    now, default = [100.0], {"slots": 4, "group": 1}
    best = Tried({"slots": 8, "group": 1}, (measurement(48.0, 2_000_000),))
    progress = Progress(60, None, default, clock=lambda: now[0])
    now[0] += 6
    progress.trial(1, default, ok(96.0), Tried(default, (measurement(96.0),)), "default")
    now[0] += 12
    progress.simulated(240)
    now[0] += 2
    progress.trial(2, best.params, ok(48.0), best, "simulator")
    progress.trial(3, {"slots": 60, "group": 1}, Outcome(Kind.TOO_LARGE, "the sum"), None, "sampler")
    progress.finalists([best.params])
    progress.confirmation("finalist 1", ok(3.14))
    progress.confirmation("finalist 2", Outcome(Kind.CRASH, "ended by SIGSEGV"))
    progress.close()
    first, simulated, second, third, why, finalist, last, crash, signal = capsys.readouterr().out.splitlines()
    assert "best 96.0 ms, 1 MB (1.00x default)" in first and first.endswith("0:54 left  the default")
    assert simulated == "simulated 240 configurations, 12 s"
    assert "simulator" in second and "best 48.0 ms, 2 MB (0.50x default)" in second and second.endswith("left  slots 8")
    assert third.startswith("trial   -  sampler") and "too large" in third and "none within the limits" in third
    assert why.strip() == "the sum" and finalist == "finalist 1  slots 8"
    assert "finalist 1" in last and "3.1 ms" in last
    assert "crash" in crash and signal.strip() == "ended by SIGSEGV"


def test_progress_by_trials_foretells_from_how_long_they_took(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = Progress(3600, 11, {"slots": 9}, default_ms=20.0, clock=lambda: now[0])
    now[0] += 10
    progress.trial(7, {"slots": 4}, ok(10.0), Tried({"slots": 4}, (measurement(10.0),)), "sampler")
    progress.close()
    said = capsys.readouterr().out
    assert "trial   7/11" in said and "0:40 left" in said and "(0.50x default)" in said
