"""The routing path predictor: what it learns, that it forecasts before the first layer, and what it keeps."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.fitting import routing_path as fitting
from harness.fitting.base import FitOptions, FitResult
from runtime.errors import ArtifactError, TraceError
from runtime.predictors import routing_path
from runtime.predictors.artifact import RoutingShape, read_artifact, write_artifact
from runtime.predictors.base import BEFORE_FIRST_LAYER, Forecast, Observation
from runtime.predictors.params import RoutingPathParams
from runtime.predictors.routing_path import RoutingPath
from runtime.trace import RoutingTrace
from runtime.vocabulary import Pass, Phase

SHAPE = RoutingShape(layers=3, experts=12, top_k=2)
VOCABULARY = 50
SHORT = RoutingPathParams(context=16)


def _experts_of_ids() -> np.ndarray:
    """The hidden rule: [ids, layers, top_k]."""
    noise = np.random.default_rng(7).random((VOCABULARY, SHAPE.layers, SHAPE.experts))
    return np.argsort(noise, axis=2)[:, :, : SHAPE.top_k]


def _text(seed: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, tokens)


def _trace(requests: int = 12, tokens: int = 150) -> RoutingTrace:
    ids = _text(0, requests * tokens)
    request = np.repeat(np.arange(requests), tokens)
    meta = {"num_experts": SHAPE.experts, "model": "synthetic"}
    return RoutingTrace(
        _experts_of_ids()[ids].astype(np.uint16), request.astype(np.int32), meta, token_ids=ids.astype(np.int32)
    )


@pytest.fixture(scope="module")
def trained() -> FitResult:
    small = replace(fitting.SIZES, hidden=64, feed_forward=64, decoder_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "SIZES", small)
        patch.setattr(fitting, "_CONTEXT", SHORT.context)
        return fitting.fit(_trace(), FitOptions(epochs=20), quiet=True)


@pytest.fixture
def predictor(trained: FitResult) -> RoutingPath:
    return RoutingPath(trained.artifact, SHORT)


def _pass(ids: np.ndarray, requests: np.ndarray | None = None, step: int = 0) -> Pass:
    of = np.zeros(len(ids), int) if requests is None else requests
    return Pass(Phase.DECODE, len(ids), step, tuple(ids.tolist()), tuple(of.tolist()))


def _forecast(predictor: RoutingPath, passing: Pass) -> Forecast:
    predictor.begin(passing)
    forecast = predictor.forecast(BEFORE_FIRST_LAYER)
    assert forecast is not None
    return forecast.copy()


def test_it_learns_routes_that_follow_from_the_token(trained: FitResult) -> None:
    figures = trained.figures
    assert figures["recall_at_k"] > 0.9
    assert figures["recall_at_k_of_popularity"] < 0.5
    assert figures["recall_at_k_of_previous_token"] < 0.5
    assert figures["batch_recall"] > figures["batch_recall_of_popularity"]
    assert figures["recall_at_k_plus_3"] >= figures["recall_at_k"]


def test_routes_are_those_of_the_last_token(predictor: RoutingPath) -> None:
    contexts = [_text(seed, tokens) for seed, tokens in enumerate((1, 2, 31, 63, 64, 65, 200))]
    routes = predictor.routes([context.tolist() for context in contexts])
    assert routes.shape == (7, SHAPE.layers, SHAPE.experts)
    assert (routes.sum(axis=2) == SHAPE.top_k).all()
    last = _experts_of_ids()[[context[-1] for context in contexts]]
    assert np.take_along_axis(routes, last, axis=2).mean() > 0.9
    assert predictor.routes([]).shape == (0, SHAPE.layers, SHAPE.experts)


def test_all_layers_are_forecast_before_the_first_one(predictor: RoutingPath) -> None:
    ids = _text(1, 8)
    forecast = _forecast(predictor, _pass(ids, requests=np.arange(8)))
    assert forecast.dtype == np.float32
    assert forecast.shape == (SHAPE.layers, SHAPE.experts)
    expected = np.zeros_like(forecast)
    for layer, row in enumerate(expected):
        np.add.at(row, _experts_of_ids()[ids, layer], 1.0)
    error, of_a_guess = (np.abs(of - expected).mean() for of in (forecast, expected.mean()))
    assert error < 0.4 * of_a_guess
    assert (forecast.sum(axis=1) < 8 * SHAPE.top_k * 1.001).all()


def test_observed_routes_change_nothing(predictor: RoutingPath) -> None:
    passing = _pass(_text(2, 5))
    before = _forecast(predictor, passing)
    for layer in range(SHAPE.layers):
        predictor.observe(layer, Observation(passing, np.zeros((5, SHAPE.top_k), np.int64)))
        np.testing.assert_array_equal(predictor.forecast(layer), before)


def test_an_expected_token_is_the_mean_of_being_chosen_and_being_likely(predictor: RoutingPath) -> None:
    ids = _text(3, 1)
    forecast = _forecast(predictor, _pass(ids))
    route = predictor.routes([ids.tolist()])[0]
    assert (forecast[route] >= 0.5).all()
    assert (forecast[~route] <= 0.5).all()
    assert (forecast <= 1.0).all()


@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(0, 3))
@settings(max_examples=8, deadline=None)
def test_a_request_is_forecast_alike_however_it_is_cut_into_passes(
    trained: FitResult, chunks: list[int], companions: int
) -> None:
    ids = _text(4, sum(chunks))
    whole = _forecast(RoutingPath(trained.artifact, SHORT), _pass(ids))
    predictor, total, start = RoutingPath(trained.artifact, SHORT), np.zeros_like(whole), 0
    for step, chunk in enumerate(chunks):
        own, other = ids[start : start + chunk], _text(100 + step, companions)
        mixed = _pass(np.concatenate([other, own]), np.repeat([9, 5], [companions, chunk]), step)
        alone = RoutingPath(trained.artifact, SHORT)
        history = [_text(100 + earlier, companions) for earlier in range(step)]
        if companions and step:
            alone.begin(_pass(np.concatenate(history)))
        theirs = _forecast(alone, _pass(other)) if companions else 0.0
        total += _forecast(predictor, mixed) - theirs
        start += chunk
    np.testing.assert_allclose(total, whole, atol=1e-2)


def test_what_came_before_a_token_can_matter(predictor: RoutingPath) -> None:
    fresh = _forecast(predictor, _pass(np.array([3]), np.array([0])))
    predictor.begin(_pass(_text(5, 40), np.full(40, 1)))
    after_text = _forecast(predictor, _pass(np.array([3]), np.array([1])))
    assert (fresh != after_text).any()


def test_unknown_tokens_are_forecast_too(predictor: RoutingPath) -> None:
    forecast = _forecast(predictor, _pass(np.array([10**6, VOCABULARY + 1])))
    assert np.isfinite(forecast).all()
    assert (forecast.sum(axis=1) > 0).all()


def test_no_forecast_without_token_ids(predictor: RoutingPath) -> None:
    assert predictor.forecast(BEFORE_FIRST_LAYER) is None
    predictor.begin(_pass(_text(6, 3)))
    predictor.begin(Pass(Phase.PREFILL, 3, 1))
    assert predictor.forecast(BEFORE_FIRST_LAYER) is None
    assert predictor.forecast(1) is None


def test_a_saved_predictor_forecasts_identically(trained: FitResult, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    write_artifact(path, trained.artifact)
    read = read_artifact(path, kind="routing_path", shape=SHAPE)
    passing = _pass(_text(8, 300), np.repeat([1, 2], 150))
    before, after = (_forecast(RoutingPath(of, SHORT), passing) for of in (trained.artifact, read))
    np.testing.assert_array_equal(before, after)


def test_another_models_predictor_is_refused(trained: FitResult, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    write_artifact(path, trained.artifact)
    with pytest.raises(ArtifactError, match="belongs to synthetic"):
        read_artifact(path, kind="routing_path", shape=SHAPE._replace(layers=4))


@pytest.mark.parametrize("lost", ["heads.weight", "token_ids"])
def test_a_damaged_predictor_is_refused(trained: FitResult, lost: str) -> None:
    arrays = {name: array for name, array in trained.artifact.arrays.items() if name != lost}
    with pytest.raises(ArtifactError, match="damaged"):
        RoutingPath(replace(trained.artifact, arrays=arrays), SHORT)
    cut = {**trained.artifact.arrays, lost: trained.artifact.arrays[lost][:-1]}
    with pytest.raises(ArtifactError, match="damaged"):
        RoutingPath(replace(trained.artifact, arrays=cut), SHORT)


def test_what_it_keeps_is_bounded(trained: FitResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_path, "_MAX_REQUESTS", 12)
    monkeypatch.setattr(routing_path, "_MAX_MEMORIES", 6)
    predictor = RoutingPath(trained.artifact, SHORT)

    def size_after(first: int, last: int) -> int:
        for step in range(first, last):
            ids, requests = _text(step, 360), np.repeat(4 * step + np.arange(4), 90)
            predictor.begin(_pass(ids, requests, step))  # four new requests
            predictor.begin(_pass(_text(step, 200), np.full(200, -1), step))  # and one that never ends
        return len(pickle.dumps(predictor))

    assert size_after(5, 12) <= 1.01 * size_after(0, 5)


def test_a_pass_of_more_requests_than_are_kept_is_served(
    trained: FitResult, monkeypatch: pytest.MonkeyPatch, predictor: RoutingPath
) -> None:
    passing = _pass(_text(9, 20), np.arange(20))
    whole = _forecast(predictor, passing)
    monkeypatch.setattr(routing_path, "_MAX_REQUESTS", 2)
    monkeypatch.setattr(routing_path, "_MAX_LOGITS", 1)
    np.testing.assert_allclose(_forecast(RoutingPath(trained.artifact, SHORT), passing), whole, atol=1e-4)


def test_loading_a_predictor_leaves_random_numbers_alone(trained: FitResult) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    RoutingPath(trained.artifact, SHORT)
    assert torch.equal(torch.rand(3), expected)


def test_a_trace_without_token_ids_cannot_be_learned() -> None:
    with pytest.raises(TraceError, match="token_ids"):
        fitting.fit(replace(_trace(), token_ids=None), FitOptions(), quiet=True)
