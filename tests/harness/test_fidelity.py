"""What is drawn, how it is measured beside the default, and what is said of simulator and memory model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_study import measurement, ok

from harness import fidelity
from harness.hardware.memory import MemoryModel
from harness.measure.fidelity_file import Results
from harness.measure.fidelity_runs import COLUMNS, Pair, calibrated, foretold, measure_pairs
from harness.report.fidelity import figures, scatter_png, verdict
from harness.search.hypercube import latin_hypercube
from harness.search.memory_guard import MemoryGuard
from harness.search.outcome import Kind, Measurement, Outcome
from harness.search.space import Params, Setting, Space
from runtime.errors import UsageError
from runtime.profile import Profile

DEFAULT = {"slots": 0}


def space(**fixed: Any) -> Space:
    keys = {name.replace("__", "."): value for name, value in fixed.items()}
    return Space(Setting(256, 128, 8, num_cores=2), Profile.default().with_overrides(keys), fixed=tuple(keys))


def test_a_latin_hypercube_has_every_choice_of_every_knob_about_equally_often() -> None:
    where = space()
    drawn = latin_hypercube(where, 24, seed=0)
    assert len({json.dumps(params) for params in drawn}) == 24
    assert all(where.contains(params) and params != where.default for params in drawn)
    for knob in where.knobs:
        times = Counter(params[knob.name] for params in drawn if knob.name in params)
        assert set(times) == set(knob.choices)
        if not knob.when:  # it acts in every configuration, so that each choice is drawn in turn
            assert max(times.values()) - min(times.values()) <= 2
    assert drawn == latin_hypercube(where, 24, seed=0) != latin_hypercube(where, 24, seed=1)


def test_what_is_refused_is_replaced_and_a_small_space_is_drawn_whole() -> None:
    where = space()
    drawn = latin_hypercube(where, 24, seed=0, accepts=lambda params: int(params["slots"]) < 100)
    assert len(drawn) == 24 and all(int(params["slots"]) < 100 for params in drawn)
    others = [knob.key for knob in where.knobs if knob.name not in ("group", "prefill")]
    small = Space(where.setting, Profile.default(), fixed=[*others, "scheduler.window"])
    assert small.size() == 8
    whole = latin_hypercube(small, 24, seed=0)
    assert len(whole) == 7 and small.default not in whole


@dataclass
class Log:
    """Runs of configurations that are named by their slots; the default's latency is that many ms."""

    default_ms: float = 100.0
    fails: tuple[int, ...] = ()
    order: list[int] = field(default_factory=list)

    def run(self, params: Params) -> Outcome:
        slots = int(params["slots"])
        self.order.append(slots)
        if slots in self.fails:
            return Outcome(Kind.TIMEOUT, "too long")
        return ok(self.default_ms if params == DEFAULT else float(slots))


def measured_pairs(configurations: Sequence[Params], log: Log, done: Sequence[Pair] = ()) -> list[Pair]:
    pairs = list(done)
    measure_pairs(configurations, DEFAULT, log.run, done, pairs.append)
    return pairs


def test_pairs_are_measured_in_turns_and_only_once() -> None:
    configurations = [{"slots": n} for n in (1, 2, 3, 4)]
    log = Log()
    pairs = measured_pairs(configurations, log)
    assert log.order == [0, 1, 1, 0, 0, 2, 2, 0, 0, 3, 3, 0, 0, 4, 4, 0]
    both = [pair.runs({"slots": pair.number}, DEFAULT) for pair in pairs]
    assert [(len(mine.runs), mine.latency_ms_p50) for mine, _ in both] == [(2, 1), (2, 2), (2, 3), (2, 4)]
    assert {(len(other.runs), other.latency_ms_p50) for _, other in both} == {(2, 100)}
    kept = [json.dumps(pair.as_dict()) for pair in pairs]
    assert [json.dumps(Pair.of(json.loads(pair)).as_dict()) for pair in kept] == kept
    again = Log()
    assert sorted(pair.number for pair in measured_pairs(configurations, again, [pairs[0], pairs[2]])) == [0, 1, 2, 3]
    assert again.order == [0, 2, 2, 0, 0, 4, 4, 0]


@dataclass
class Linear:
    """A simulator by which a configuration takes `factor` ms a slot, the default 100."""

    factor: float = 1.0
    seen: list[tuple[Mapping[str, Any], Measurement]] = field(default_factory=list)

    def run(self, overrides: Mapping[str, Any]) -> Measurement:
        slots = overrides["cache.slots"]
        return measurement(100.0 if slots == 0 else self.factor * slots)

    def calibrated(self, observations: Sequence[tuple[Mapping[str, Any], Measurement]]) -> Linear:
        return Linear(self.factor, list(observations))


def overrides(params: Params) -> dict[str, Any]:
    return {"cache.slots": params["slots"]}


def test_the_simulator_sees_the_first_pairs_alone() -> None:
    configurations = [{"slots": n} for n in (10, 20, 30, 40)]
    pairs = measured_pairs(configurations, Log(fails=(20,)))
    simulator = calibrated(Linear(), overrides, configurations, DEFAULT, pairs, 2)
    assert isinstance(simulator, Linear)
    assert [(seen["cache.slots"], run.latency_ms_p50) for seen, run in simulator.seen] == [
        *[(10, 10)] * 2,
        *[(0, 100)] * 2,
    ]


def test_a_row_has_what_was_measured_and_what_was_foretold() -> None:
    where = space()
    configurations = [{**where.default, "slots": slots} for slots in where.knobs[0].choices[:3]]
    model = MemoryModel(256, 1 << 20, 0, 1 << 20, 0)
    guard = MemoryGuard(model, model, where, 1 << 40)
    log = Log(fails=(int(configurations[1]["slots"]),))
    pairs = measured_pairs(configurations, log)
    table = foretold(Linear(2.0), overrides, guard, configurations, DEFAULT, pairs, 1)
    assert list(table.columns) == COLUMNS
    assert table["number"].tolist() == [0, 2]  # the pair that failed is left out
    assert table["is_calibration"].tolist() == [True, False]
    slots = [int(configurations[n]["slots"]) for n in (0, 2)]
    assert table["latency_ms"].tolist() == slots
    assert table["simulated_latency_ms"].tolist() == [2.0 * n for n in slots]
    assert table["simulated_default_latency_ms"].tolist() == [100.0, 100.0]
    assert table["peak_bytes"].tolist() == [1 << 20, 1 << 20]
    assert table["predicted_peak_bytes"].tolist() == pytest.approx([(1 + n) << 20 for n in slots], rel=1e-6)


def table_of(measured: Sequence[float], simulated: Sequence[float], *, calibration: int = 0) -> pd.DataFrame:
    measured_ms, simulated_ms = np.array(measured), np.array(simulated)
    count = len(measured)
    columns = {
        "number": range(count),
        "is_calibration": [number < calibration for number in range(count)],
        "bytes_per_s": np.linspace(1e9, 2e9, count),
        "peak_bytes": np.full(count, 1000),
        "predicted_peak_bytes": np.full(count, 1000),
        "params": "{}",
    }
    for metric in ("tpot", "latency"):
        columns |= {
            f"{metric}_ms": measured_ms,
            f"default_{metric}_ms": np.full(count, 10.0),
            f"simulated_{metric}_ms": simulated_ms,
            f"simulated_default_{metric}_ms": np.full(count, 20.0),
        }
    return pd.DataFrame(columns)


def test_figures_are_of_the_ratios_to_the_default() -> None:
    found = figures(table_of([5, 10, 20, 40], [10, 20, 40, 80]))
    assert found["all"]["tpot"] == {
        "kendall_tau": 1.0,
        "median_ratio_error": 0.0,
        "median_absolute_error": 1.0,
    }
    assert found["bytes_per_s"] == {"low": 1.25e9, "median": 1.5e9, "high": 1.75e9}
    assert "FAILS" not in verdict(found)
    turned = figures(table_of([5, 10, 20, 40], [80, 40, 20, 10]))
    assert turned["all"]["tpot"]["kendall_tau"] == -1.0
    assert verdict(turned).count("FAILS") == 4  # order and ratio, of the unseen and of all


def test_what_was_calibrated_on_is_told_apart() -> None:
    found = figures(table_of([5, 10, 20, 40], [400, 20, 40, 80], calibration=1))
    assert found["unseen"]["num_configurations"] == 3 and found["unseen"]["tpot"]["kendall_tau"] == 1.0
    assert found["all"]["num_configurations"] == 4 and found["all"]["tpot"]["kendall_tau"] == 0.0


def test_memory_that_is_underestimated_counts_against_the_model() -> None:
    table = table_of([5, 10, 20], [10, 20, 40])
    table["predicted_peak_bytes"] = [970, 1000, 1050]
    found = figures(table)["memory"]
    assert found == {"largest_underprediction": pytest.approx(0.03), "median_error": pytest.approx(0.03)}
    table["predicted_peak_bytes"] = [1010, 1020, 1050]
    assert figures(table)["memory"]["largest_underprediction"] == 0.0


def test_nothing_measured_is_no_verdict_in_favour() -> None:
    found = figures(table_of([], []))
    assert found["unseen"]["tpot"]["kendall_tau"] is None
    assert verdict(found).count("FAILS") == 6
    assert scatter_png(table_of([5, 10], [9, 21], calibration=1)).startswith(b"\x89PNG")


def test_a_file_of_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    results = Results.open(path, {"seed": 0})
    results.declared = {"configurations": [{"slots": 1}]}
    results.pairs = measured_pairs(results.configurations, Log())
    results.save()
    reopened = Results.open(path, {"seed": 0})
    assert reopened.configurations == [{"slots": 1}]
    assert [[one.measurement for one in pair.configuration] for pair in reopened.pairs] == [
        [one.measurement for one in pair.configuration] for pair in results.pairs
    ]
    with pytest.raises(UsageError, match="seed 0, now 1"):
        Results.open(path, {"seed": 1})
    path.write_text('{"pairs": []}')
    with pytest.raises(UsageError, match=r"no result of harness\.fidelity"):
        Results.open(path, {"seed": 0})


@pytest.mark.slow
def test_the_command_measures_declares_and_goes_on(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fidelity.json"
    arguments = [
        f"--model={tiny_checkpoint}",
        f"--out={out}",
        "--max-memory=2GiB",
        "--configurations=3",
        "--calibration=1",
        "--concurrency=2",
        "--context=96",
    ]
    assert fidelity.main(arguments) == 0
    found = json.loads(out.read_text())
    assert [pair["number"] for pair in found["pairs"]] == [0, 1, 2]
    assert found["figures"]["all"]["num_configurations"] == 3 and found["num_failed"] == 0
    assert str(tiny_checkpoint.parent) not in out.read_text()
    table = pd.read_csv(out.with_suffix(".csv"))
    assert (table[["tpot_ms", "simulated_tpot_ms", "latency_ms", "peak_bytes"]] > 0).all(axis=None)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    found["pairs"].pop()
    out.write_text(json.dumps(found))
    assert fidelity.main(arguments) == 0
    again = json.loads(out.read_text())
    assert again["declared"] == found["declared"] and again["pairs"][:2] == found["pairs"]
    assert len(again["pairs"]) == 3
    assert fidelity.main([*arguments, "--seed=1"]) == 2
    assert "name another file" in capsys.readouterr().err
