"""The report of predictors: what is counted, that nothing is shifted by a layer or a token, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.measure.prediction import (
    FIGURES,
    Judge,
    Popularity,
    in_request_order,
    popularity_in,
    ranked,
    ratios,
    recorded_ranks,
)
from harness.measure.schedule import Schedule
from harness.predict import main
from runtime.errors import UsageError
from runtime.predictors.artifact import Artifact, RoutingShape, write_artifact
from runtime.predictors.base import Forecast, NoPredictor, Observation, Predictor
from runtime.predictors.previous_token import PreviousToken
from runtime.trace import NO_PREDICTION, RoutingTrace, write_trace
from runtime.vocabulary import Pass

ROOT = Path(__file__).parents[2]


def _random(
    seed: int, tokens: int = 60, layers: int = 4, experts: int = 12, top_k: int = 2, requests: int = 5
) -> RoutingTrace:
    generator = np.random.default_rng(seed)
    request = np.sort(np.arange(tokens) % requests).astype(np.int32)
    chosen = np.argsort(generator.random((tokens, layers, experts)), axis=2)[:, :, :top_k]
    return RoutingTrace(chosen.astype(np.uint16), request, {"num_experts": experts})


class Oracle(Predictor):
    """Forecasts what will be chosen, or what is chosen some layers and tokens beside it."""

    def __init__(self, trace: RoutingTrace, layers_off: int = 0, tokens_off: int = 0) -> None:
        self._experts = np.roll(trace.experts, (-tokens_off, -layers_off), (0, 1))
        self._num_experts = trace.num_experts

    def begin(self, passing: Pass) -> None:
        chosen = self._experts[passing.step]
        self._forecast = np.stack([np.bincount(row, minlength=self._num_experts) for row in chosen])

    def observe(self, layer: int, observation: Observation) -> None:
        pass

    def forecast(self, layer: int) -> Forecast:
        return self._forecast.astype(np.float32)


class Clock(Predictor):
    """Forecasts, for every layer, the expert whose number is that of the layer just routed, plus one."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape, self.asked = shape, []

    def begin(self, passing: Pass) -> None:
        self.asked = []

    def observe(self, layer: int, observation: Observation) -> None:
        self.asked.append(("observe", layer))

    def forecast(self, layer: int) -> Forecast:
        self.asked.append(("forecast", layer))
        forecast = np.zeros(self._shape, np.float32)
        forecast[:, layer + 1] = 1.0
        return forecast


def _figures(trace: RoutingTrace, predictor: Predictor, depth: int = 1, batch: int = 3) -> pd.DataFrame:
    ranks = ranked(in_request_order(trace), predictor, depth, trace.top_k + 3)
    return ratios(Judge(trace, popularity_in(trace), batch).counts(ranks))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), layers=st.integers(1, 4), experts=st.integers(2, 9), data=st.data())
def test_zero_staleness_reads_everything_right(seed: int, layers: int, experts: int, data: st.DataObject) -> None:
    trace = _random(seed, 20, layers, experts, data.draw(st.integers(1, experts)))
    found = _figures(trace, PreviousToken(layers, experts), depth=0)
    exact = ["recall_at_k", "recall_at_k_plus_3", "precision", "coverage", "batch_recall", "batch_precision"]
    assert (found[exact] == 1.0).all(axis=None)


@pytest.mark.parametrize("depth", [1, 2, 3, 9])
def test_an_oracle_is_right_at_any_depth_and_only_in_its_own_place(depth: int) -> None:
    trace = _random(1)
    assert (_figures(trace, Oracle(trace), depth)["recall_at_k"] == 1.0).all()
    for shift in ({"layers_off": 1}, {"layers_off": -1}, {"tokens_off": 1}, {"tokens_off": -1}):
        assert (_figures(trace, Oracle(trace, **shift), depth)["recall_at_k"] < 0.5).all(), shift


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_a_forecast_is_the_one_made_so_many_layers_before(depth: int) -> None:
    trace = _random(2, tokens=3, requests=1)
    clock = Clock((4, 12))
    ranks = ranked(in_request_order(trace), clock, depth, 2)
    assert (ranks[:, :, 0] == np.maximum(np.arange(4) - depth, -1) + 1).all()
    assert (ranks[:, :, 1] == NO_PREDICTION).all()
    turns = [(what, layer) for layer in range(4) for what in ("observe", "forecast")]
    assert clock.asked == [("forecast", -1), *turns]


def test_figures_by_hand() -> None:
    """Two requests of two tokens, one layer of 8 experts, top-2, decoded together."""
    experts = np.array([[[0, 1]], [[0, 2]], [[0, 3]], [[4, 5]]], np.uint16)
    trace = RoutingTrace(experts, np.array([0, 0, 1, 1], np.int32), {"num_experts": 8})
    none = NO_PREDICTION
    ranks = np.array([[1, 7, 0, none, none], [0, none, none, none, none], [none] * 5, [6, 7, 1, 2, 4]], np.uint16)
    popularity = np.array([[0.9, 0.1, 0.2, 0.3, 0.0, 0.0, 0.0, 0.8]], np.float32)
    found = ratios(Judge(trace, popularity, batch=2).counts(ranks[:, None])).loc[0]
    assert found["recall_at_k"] == 2 / 8 and found["recall_at_k_plus_3"] == 4 / 8
    assert found["precision"] == 2 / 5 and found["coverage"] == 3 / 4
    # first pass: {0, 1} and {0, 3}, picked {1, 7}; second: {0, 2} and {4, 5}, picked {0} and {6, 7}
    assert found["batch_recall"] == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert found["batch_precision"] == 2 / 5
    assert found["batch_picked"] == 2.5 and found["batch_needed"] == 3.5
    # as popular: {0, 7}, then {0, 7, 3}
    assert found["batch_recall_of_popularity"] == pytest.approx((1 / 3 + 1 / 4) / 2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 6))
def test_batch_recall_is_that_of_expertflow(seed: int, batch: int) -> None:
    trace, other = _random(seed), _random(seed + 1)
    oracle = Oracle(other)  # right by accident only
    found = _figures(trace, oracle, batch=batch)["batch_recall"].mean()
    recalls = []
    for rows in Schedule(trace, batch=batch).passes:
        for layer in range(trace.num_layers):
            needed, picked = set(trace.experts[rows, layer].ravel()), set(other.experts[rows, layer].ravel())
            if len(rows) == batch:
                recalls.append(len(needed & picked) / len(needed))
    assert found == pytest.approx(np.mean(recalls)) if recalls else np.isnan(found)


def test_who_picks_all_experts_has_full_batch_recall_and_no_more_than_popularity() -> None:
    trace = _random(3)
    everything = np.broadcast_to(np.arange(12, dtype=np.uint16), (60, 4, 12))
    found = ratios(Judge(trace, popularity_in(trace), 4).counts(everything, picks=12))
    assert (found[["batch_recall", "batch_recall_of_popularity"]] == 1.0).all(axis=None)
    assert (found["batch_picked"] == 12).all() and (found["batch_precision"] < 0.7).all()


def test_no_forecast_is_no_coverage_and_no_recall() -> None:
    found = _figures(_random(4), NoPredictor())
    assert (found[["coverage", "recall_at_k", "batch_recall", "batch_picked"]] == 0).all(axis=None)
    assert found["precision"].isna().all()


def test_popularity_ranks_by_frequency() -> None:
    trace = _random(5, layers=2, experts=6)
    popularity = popularity_in(trace)
    for layer in range(2):
        counts = np.bincount(trace.experts[:, layer].ravel(), minlength=6)
        assert np.allclose(popularity[layer] * 60, counts)
        expected = np.sort(counts)[-2:].sum() / (60 * 2)
        assert _figures(trace, Popularity(popularity))["recall_at_k"][layer] == pytest.approx(expected)


def _with_lookahead(trace: RoutingTrace, ranks: int) -> RoutingTrace:
    """A perfect one, two layers deep."""
    predicted = np.full((trace.num_tokens, trace.num_layers, 2, ranks), NO_PREDICTION, np.uint16)
    for ahead in (1, 2):
        predicted[:, :-ahead, ahead - 1, :2] = trace.experts[:, ahead:]
    return replace(trace, predicted=predicted)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_recorded_lookahead_is_ranked_per_token(depth: int) -> None:
    trace = _with_lookahead(_random(6), 5)
    found = ratios(Judge(trace, popularity_in(trace), 3).counts(recorded_ranks(trace, depth, 5)))
    assert found["coverage"].tolist() == [0.0] * depth + [1.0] * (4 - depth)
    for name in ("recall_at_k", "recall_at_k_plus_3", "batch_recall"):
        assert found[name].equals(found["coverage"].rename(name))
    with pytest.raises(UsageError, match="2 layers ahead at most"):
        recorded_ranks(trace, 3, 5)


def test_a_lookahead_of_few_ranks_has_no_recall_of_more() -> None:
    trace = _with_lookahead(_random(6), 2)
    found = ratios(Judge(trace, popularity_in(trace), 3).counts(recorded_ranks(trace, 1, 5)))
    assert found["recall_at_k_plus_3"].isna().all() and found["recall_at_k"].iloc[-1] == 1.0


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    return _write(tmp_path, _random(7))


def _write(folder: Path, trace: RoutingTrace) -> Path:
    write_trace(folder / "t.npz", trace)
    return folder / "t.npz"


Reader = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def read(capsys: pytest.CaptureFixture[str]) -> Reader:
    """Run the command line with --json; its objects by predictor."""

    def run(*arguments: str | Path) -> dict[str, dict[str, Any]]:
        assert main(["--json", *map(str, arguments)]) == 0
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return {one["predictor"]: one for one in found}

    return run


def test_the_baselines_and_controls_always_come(trace_file: Path, read: Reader) -> None:
    found = read("--trace", trace_file, "--predictor", "previous_token", "--batch", "1", "--per-layer")
    assert list(found) == ["zero_staleness", "popularity", "previous_token", "all_experts"]
    for one in found.values():
        assert (one["tokens"], one["depth"], one["batch"], len(one["requests"])) == (12, 1, 1, 1)
        assert set(FIGURES) <= set(one) and len(one["layers"]) == 4
    assert found["zero_staleness"]["recall_at_k"] == found["all_experts"]["batch_recall"] == 1.0
    assert found["all_experts"]["recall_at_k"] is None
    recalls = [layer["recall_at_k"] for layer in found["previous_token"]["layers"]]
    assert found["previous_token"]["recall_at_k"] == pytest.approx(np.mean(recalls)) and len(set(recalls)) > 1


def test_a_lookahead_in_the_trace_is_judged_unasked(tmp_path: Path, read: Reader) -> None:
    found = read("--trace", _write(tmp_path, _with_lookahead(_random(8), 5)))
    assert found["gate_lookahead"]["recall_at_k"] == found["gate_lookahead"]["coverage"] == 0.75
    assert "gate_lookahead" not in read("--trace", tmp_path / "t.npz", "--depth", "3")


def test_popularity_is_that_of_other_requests(trace_file: Path, tmp_path: Path, read: Reader) -> None:
    options = ["--seed", "3", "--predictor", "none"]
    judged = read("--trace", trace_file, *options)["popularity"]["requests"]
    trace = _random(7)
    experts = np.where(np.isin(trace.request, judged)[:, None, None], [10, 11], [0, 1]).repeat(4, axis=1)
    path = _write(tmp_path, replace(trace, experts=experts.astype(np.uint16)))
    found = read("--trace", path, *options)
    assert found["none"]["coverage"] == 0.0
    assert found["popularity"]["recall_at_k"] == 0.0 and found["popularity"]["coverage"] == 1.0


def _artifact(path: Path, kind: str, requests: list[int], experts: int = 12) -> Path:
    params = {"validation_requests": requests}
    write_artifact(path, Artifact(kind, "m", RoutingShape(4, experts, 2), params, {"w": np.zeros(1, np.float32)}))
    return path


def test_a_trained_predictor_is_judged_on_what_it_did_not_see(trace_file: Path, tmp_path: Path, read: Reader) -> None:
    one = _artifact(tmp_path / "one", "routing_path", [1, 2, 4])
    two = _artifact(tmp_path / "two", "periodic", [4, 2, 3])
    arguments = ["--trace", trace_file, "--predictor", "previous_token", "--artifact", one]
    found = read(*arguments)["previous_token"]
    assert found["requests"] == [1, 2, 4] and "routing_path" in found["judged_on"]
    assert read(*arguments, "--artifact", two)["previous_token"]["requests"] == [2, 4]


def test_the_table_and_the_csv(trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = tmp_path / "t.csv"
    options = ["--predictor", "previous_token", "--max-tokens", "7", "--per-layer", "--csv", str(csv)]
    assert main(["--trace", str(trace_file), *options]) == 0
    shown = capsys.readouterr().out
    assert "judged on 7 tokens of 1 requests" in shown and "48 tokens of 4 other" in shown
    assert "recall@2" in shown and "recall@5" in shown and "nan" not in shown.lower()
    table = pd.read_csv(csv).set_index(["predictor", "layer"])
    assert len(table.loc["popularity"]) == 4 and list(table.columns) == list(FIGURES)


def test_where_no_batch_is_full_it_says_so(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--trace", str(trace_file), "--predictor", "none", "--batch"]
    assert main([*arguments, "500"]) == main([*arguments, "1"]) == 0
    few, enough = (text for text in capsys.readouterr().out.split("judged on ")[1:])
    assert "requests make no batch of 500 (--batch)" in few and "batches of 1\n" in enough


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--predictor", "psychic"], "'psychic'"),
        (["--predictor", "gate_lookahead"], "no recorded gate lookahead"),
        (["--depth", "0"], "--depth 0"),
        (["--batch", "0"], "--batch 0"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--validation-share", "1.5"], "--validation-share 1.5"),
        (["--predictor", "previous_token", "--csv", str(Path(__file__) / "t.csv")], "t.csv: cannot be written"),
        (["--artifact", "nowhere"], "nowhere: cannot read"),
    ],
)
def test_mistakes_are_one_line(
    trace_file: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--trace", str(trace_file), *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("requests", "experts", "message"),
    [
        ([9], 12, "another trace"),
        ([1, 7], 12, "another trace"),
        ([0, 1, 2, 3, 4], 12, "another trace"),
        ([1], 8, "4 layers x 8 experts"),
    ],
)
def test_artifacts_that_do_not_go_with_the_trace(
    trace_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    requests: list[int],
    experts: int,
    message: str,
) -> None:
    path = _artifact(tmp_path / "one", "routing_path", requests, experts)
    assert main(["--trace", str(trace_file), "--artifact", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_across_domains_a_predictor_is_judged_on_a_trace_that_it_was_not_trained_on(
    trace_file: Path, tmp_path: Path, read: Reader
) -> None:
    other = _artifact(tmp_path / "one", "routing_path", [9])
    arguments = ["--trace", trace_file, "--predictor", "previous_token"]
    across = read(*arguments, "--artifact", other, "--unseen")
    assert across["previous_token"] == read(*arguments)["previous_token"]


def test_artifacts_without_a_common_held_out_request(
    trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = _artifact(tmp_path / "one", "periodic", [1]), _artifact(tmp_path / "two", "routing_path", [2])
    assert main(["--trace", str(trace_file), "--artifact", str(one), "--artifact", str(two)]) == 2
    assert "periodic and routing_path: no request" in capsys.readouterr().err


def test_several_traces_are_joined_as_in_training(trace_file: Path, tmp_path: Path, read: Reader) -> None:
    (tmp_path / "b").mkdir()
    other = _write(tmp_path / "b", _random(9, tokens=30, requests=2))
    path = _artifact(tmp_path / "one", "routing_path", [3, 6])
    found = read("--trace", trace_file, other, "--predictor", "previous_token", "--artifact", path)
    assert found["popularity"]["requests"] == [3, 6] and found["popularity"]["tokens"] == 12 + 15


def test_two_artifacts_of_a_kind(trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(_artifact(tmp_path / "one", "periodic", [1]))
    assert main(["--trace", str(trace_file), "--artifact", path, "--artifact", path]) == 2
    assert "both hold a periodic" in capsys.readouterr().err


def test_it_runs_where_torch_is_not_installed(trace_file: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from harness.predict import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--trace", str(trace_file), "--predictor", "previous_token"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "previous_token" in result.stdout
