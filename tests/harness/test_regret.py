"""The machine with a known optimum, and searches on it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.measure.regret_file import Results
from harness.measure.regret_runs import Variant
from harness.regret import TRACE, main
from harness.report.regret import figures, verdict
from harness.search.hidden import LEAST_BIAS, MOST_BIAS, NOISE, HiddenMachine, biased
from harness.search.memory_guard import MemoryGuard
from harness.search.outcome import Kind
from harness.search.problem import FIXED, Problem, served
from harness.search.simulator import Simulator
from runtime.errors import TraceError, UsageError
from runtime.trace import read_trace

SMALL = {
    "transfer.io_threads": 2,
    "scheduler.kind": "fifo",
    "cache.policy": "lru",
    "prefetch.count": 2,
    "compute.decode": "eager",
}
"""What leaves slots, group and depth."""


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(TRACE, num_output_tokens=4, concurrency=2, fixed=tuple({**FIXED, **SMALL}.items()))


def machine(problem: Problem, seed: int = 0) -> tuple[HiddenMachine, MemoryGuard]:
    guard = problem.guard()
    return problem.hidden(seed, guard), guard


def test_every_coefficient_is_biased_by_10_to_30_percent_either_way(problem: Problem) -> None:
    costs = problem.simulator.costs
    hidden = biased(costs, seed=3)
    factors = [hidden.seconds[path] / seconds for path, seconds in costs.seconds.items()]
    factors += [hidden.ratios[path] / ratio for path, ratio in costs.ratios.items()]
    assert all(LEAST_BIAS - 1e-9 <= abs(factor - 1) <= MOST_BIAS + 1e-9 for factor in factors)
    assert min(factors) < 1 < max(factors)
    assert len({round(factor, 9) for factor in factors}) == len(factors)
    assert hidden.experts == costs.experts  # their ratio is what is biased
    assert biased(costs, seed=3) == hidden != biased(costs, seed=4)


def test_the_tabulated_optimum_is_the_least_of_what_fits(problem: Problem) -> None:
    hidden, guard = machine(problem)
    grid = list(problem.space.configurations())
    optimum = hidden.optimum(grid)
    simulator = Simulator(problem.workload, problem.base, problem.concurrency, biased(problem.simulator.costs, 0))
    latencies = {
        json.dumps(params): simulator.run(problem.space.overrides(params)).latency_ms_p50
        for params in grid
        if 1.04 * guard.expected_bytes(params) <= problem.limit_bytes + 1
    }
    assert optimum.latency_ms == min(latencies.values()) == latencies[json.dumps(optimum.params)]
    assert optimum.num_fit == len(latencies) < len(grid)


def test_about_a_third_of_the_product_s_grid_does_not_fit() -> None:
    whole = Problem(TRACE)
    hidden, _ = machine(whole)
    grid = list(whole.space.configurations())
    assert len(grid) == whole.space.size() <= 20_000
    assert 0.25 <= sum(not hidden.fits(params) for params in grid) / len(grid) <= 0.45


def test_runs_scatter_by_their_seed_and_not_by_their_order(problem: Problem) -> None:
    small, large = ({"slots": problem.space.knobs[0].choices[i], "group": 1, "depth": 0} for i in (0, -2))

    def latencies(seed: int, order: list[dict[str, int]]) -> dict[str, list[float]]:
        hidden, _ = machine(problem, seed)
        found: dict[str, list[float]] = {}
        for params in order:
            found.setdefault(json.dumps(params), []).append(hidden.measure(params).measurement.latency_ms_p50)
        return found

    one = latencies(1, [small, small, large, small])
    assert one == latencies(1, [large, small, small, small]) != latencies(2, [large, small, small, small])
    assert len(set(one[json.dumps(small)])) == 3

    hidden, _ = machine(problem)
    true_ms = hidden.truth(small).latency_ms_p50
    logs = [math.log(hidden.measure(small).measurement.latency_ms_p50 / true_ms) for _ in range(400)]
    assert abs(np.std(logs) / NOISE - 1) < 0.15
    assert abs(np.mean(logs)) < 3 * NOISE / 400**0.5


def test_what_the_model_refuses_is_not_launched_and_what_it_underestimates_runs_out_of_memory(
    problem: Problem,
) -> None:
    hidden, guard = machine(problem)
    outcomes = {json.dumps(params): hidden.measure(params) for params in problem.space.configurations()}
    for text, outcome in outcomes.items():
        predicted = guard.expected_bytes(json.loads(text))
        wanted = (
            Kind.TOO_LARGE
            if predicted > problem.limit_bytes
            else Kind.OUT_OF_MEMORY
            if round(1.04 * predicted) > problem.limit_bytes
            else Kind.OK
        )
        assert outcome.kind is wanted
        if wanted is Kind.OK:
            assert outcome.measurement.peak_memory_bytes == round(1.04 * predicted)
    assert {outcome.kind for outcome in outcomes.values()} == {Kind.TOO_LARGE, Kind.OUT_OF_MEMORY, Kind.OK}


def test_requests_of_a_trace_are_cut_and_a_trace_without_phases_is_refused() -> None:
    trace = read_trace(TRACE)
    workload = served(trace, 5)
    assert {(len(one.prompt), one.num_output_tokens) for one in workload.requests} == {(24, 5)}
    assert all(b > a for one in workload.requests for a, b in pairwise((*one.prompt, *one.decoded)))
    with pytest.raises(TraceError, match="phase"):
        served(replace(trace, phase=None), 5)


def test_a_grid_too_large_to_tabulate_is_refused() -> None:
    with pytest.raises(UsageError, match="more than 20000"):
        _ = Problem(TRACE, fixed=()).space


def rows(regrets: list[float], num_infeasible: int = 1) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "sampler": "tpe",
            "is_guided": True,
            "regret": regrets,
            "num_launched": 40,
            "num_infeasible": num_infeasible,
            "sampler_s": 1.0,
        }
    )


def test_figures_and_verdicts() -> None:
    good = figures(rows([0.0, 0.01, 0.02, 0.03])).iloc[0]
    assert good["median_regret"] == pytest.approx(0.015)
    assert good["p90_regret"] == pytest.approx(0.03)
    assert good["infeasible_share"] == pytest.approx(1 / 40)
    assert "FAILS" not in verdict(good.to_dict())
    bad = verdict(figures(rows([0.01, 0.06, float("inf")], num_infeasible=5)).iloc[0].to_dict())
    assert bad.count("FAILS") == 3


def test_a_search_that_ends_at_the_optimum_has_no_regret(problem: Problem, tmp_path: Path) -> None:
    hidden, _ = machine(problem)
    optimum = hidden.optimum(problem.space.configurations())
    chosen_ms = hidden.truth(optimum.params).latency_ms_p50
    found = {
        "latency_ms": chosen_ms,
        "params": optimum.params,
        "num_launched": 9,
        "num_infeasible": 0,
        "sampler_s": 1.0,
    }
    nothing = {**found, "latency_ms": None, "params": None}
    variant = {"sampler": "tpe", "is_guided": True}
    searches = [{"seed": 0, **variant, **found}, {"seed": 1, **variant, **nothing}, {"seed": 2, **variant, **found}]
    optima = {0: optimum._asdict(), 1: optimum._asdict()}
    results = Results(tmp_path / "r.json", {}, optima, searches)
    assert results.table()["regret"].tolist() == [0.0, float("inf")]  # the optimum of seed 2 is not known yet
    results.save()
    assert "Infinity" not in results.path.read_text()
    assert json.loads(results.path.read_text())["figures"][0]["num_seeds"] == 2


@pytest.mark.slow
def test_the_command_comes_close_to_the_optimum_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "regret.json"
    fixed = [f"--set={key}={value}" for key, value in SMALL.items()]
    arguments = ["--trials=28", "--tokens=4", "--concurrency=2", f"--out={out}", *fixed]
    assert main(["--seeds=2", "--jobs=2", *arguments]) == 0
    first = json.loads(out.read_text())
    assert {row["seed"] for row in first["searches"]} == {0, 1} == {int(seed) for seed in first["optima"]}
    table = pd.read_csv(out.with_suffix(".csv"))
    assert (table["regret"] >= 0).all()
    assert table["regret"].max() <= 2 * NOISE  # of 64 configurations, a dozen launched, five of them again
    assert (table["num_launched"] <= 28).all()
    assert (table["num_infeasible"] <= 3).all()

    assert main(["--seeds=2", "--jobs=1", "--samplers=random", "--no-guide", *arguments]) == 0
    second = json.loads(out.read_text())
    assert second["searches"][:2] == first["searches"]
    assert Results(out, {}, {}, second["searches"]).has(1, Variant("random", is_guided=False))
    assert len(second["searches"]) == 4
    capsys.readouterr()

    assert main(["--seeds=2", *arguments, "--trials=29"]) == 2
    assert "another run (trials 28, now 29)" in capsys.readouterr().err
    out.write_text("[]")
    assert main(["--seeds=2", *arguments]) == 2
    assert "no result of harness.regret" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--seeds=0"], ["--samplers=brute"], ["--samplers=tpe,genetic"], ["--trials=1"], ["--out=regret.csv"]]
)
def test_what_makes_no_sense_is_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wrong) == 2
    assert capsys.readouterr().err.startswith("error: --")
