"""MoE-Infinity's predictor: what it counts, which past request it matches, what that says, and what it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.fit import main
from harness.fitting.activation_matrix import collected
from harness.fitting.base import FitOptions, rows_of, split
from runtime.cache.coordinator import Coordinator
from runtime.cache.governor import Governor
from runtime.cache.residency import Residency
from runtime.errors import ArtifactError
from runtime.predictors import activation_matrix
from runtime.predictors.activation_matrix import ActivationMatrix, Collection
from runtime.predictors.artifact import Artifact, RoutingShape, read_artifact, write_artifact
from runtime.predictors.base import BEFORE_FIRST_LAYER, Forecast, Observation
from runtime.predictors.params import ActivationMatrixParams
from runtime.trace import RoutingTrace, write_trace
from runtime.transfer.simulated import SimulatedTransfer
from runtime.vocabulary import Load, Pass, Phase

SHAPE = RoutingShape(layers=3, experts=4, top_k=1)
Experts = npt.NDArray[np.int64]


def _predictor(shape: RoutingShape = SHAPE, matches: int = 1, **params: int) -> ActivationMatrix:
    return ActivationMatrix(shape, ActivationMatrixParams(matches=matches, **params))


def _forecasts(
    predictor: ActivationMatrix, experts: object, requests: Sequence[int] = (0,), phase: Phase = Phase.DECODE
) -> list[Forecast | None]:
    """Of a pass in which `experts` [tokens, layers, top_k] (top_k 1 may be left out) are chosen: before the first
    layer, and after each."""
    chosen = np.array(experts, np.int64)
    chosen = chosen[..., None] if chosen.ndim == 2 else chosen
    passing = Pass(phase, len(chosen), 0, (), tuple(requests) * (len(chosen) if len(requests) == 1 else 1))

    def walk() -> Iterator[Forecast | None]:
        predictor.begin(passing)
        yield predictor.forecast(BEFORE_FIRST_LAYER)
        for layer in range(chosen.shape[1]):
            predictor.observe(layer, Observation(passing, chosen[:, layer]))
            yield predictor.forecast(layer)

    return [None if forecast is None else forecast.copy() for forecast in walk()]


def _end_all(predictor: ActivationMatrix) -> None:
    """Passes of somebody who says nothing, until every request has ended."""
    for step in range(activation_matrix._UNSEEN_PASSES + 1):
        predictor.begin(Pass(Phase.DECODE, 1, step, (), (10**6,)))


def _arrays(predictor: ActivationMatrix) -> dict[str, list[object]]:
    return {name: array.tolist() for name, array in predictor.artifact("m").arrays.items()}


A, B, NEW = (np.array(rows, np.float32) for rows in ([[2, 0], [0, 2]], [[0, 2], [2, 0]], [[1, 1], [0, 2]]))


def _two_matrices(capacity: int) -> Collection:
    collection = Collection(capacity, RoutingShape(layers=2, experts=2, top_k=1))
    collection.add(A, 2)
    collection.add(B, 2)
    return collection


def test_the_distance_is_that_of_the_angle() -> None:
    """<A, NEW> = 2 + 4, <B, NEW> = 2, |A| = |B| = 8^(1/2), |NEW| = 6^(1/2)."""
    expected = [1 - 6 / 48**0.5, 1 - 2 / 48**0.5]
    np.testing.assert_allclose(_two_matrices(3).distances(NEW), expected, rtol=1e-6)
    np.testing.assert_allclose(_two_matrices(3).distances(10 * NEW), expected, rtol=1e-6)
    assert Collection(3, SHAPE).distances(np.ones((3, 4), np.float32)).shape == (0,)


def test_in_a_full_collection_the_nearest_one_is_replaced() -> None:
    collection = _two_matrices(capacity=2)
    collection.add(NEW, 2)
    np.testing.assert_array_equal(collection.matrices, [NEW, B])
    collection.add(7 * B, 14)
    np.testing.assert_array_equal(collection.matrices, [NEW, 7 * B])
    assert collection.tokens.tolist() == [2, 14]


def test_a_matrix_counts_a_requests_tokens_prefill_and_decode_apart() -> None:
    predictor = _predictor()
    _forecasts(predictor, [[0, 1, 2], [0, 1, 3]], phase=Phase.PREFILL)
    _forecasts(predictor, [[3, 1, 1]], phase=Phase.PREFILL)  # the rest of the same prompt
    _forecasts(predictor, [[2, 2, 2]])
    _forecasts(predictor, [[2, 0, 2]])
    assert _arrays(predictor) == {
        "prefill": [[[2, 0, 0, 1], [0, 3, 0, 0], [0, 1, 1, 1]]],
        "prefill_tokens": [3],
        "decode": [[[0, 0, 2, 0], [1, 0, 1, 0], [0, 0, 2, 0]]],
        "decode_tokens": [2],
    }


def test_the_layers_to_come_are_likely_to_be_those_of_the_nearest_matrix() -> None:
    predictor = _predictor()
    _forecasts(predictor, [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]])
    _forecasts(predictor, [[3, 0, 0]], requests=(1,))
    _end_all(predictor)
    before, *after = _forecasts(predictor, [[0, 1, 1]], requests=(2,))
    assert before is None
    first = [[0.75, 0.25, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0.25, 0.75]]
    np.testing.assert_array_equal(after[0], first)
    (_, first_of_other, *_) = _forecasts(predictor, [[3, 1, 1]], requests=(3,))
    np.testing.assert_array_equal(first_of_other, [[0, 0, 0, 1], [1, 0, 0, 0], [1, 0, 0, 0]])


def test_several_matches_are_summed_and_normalised_per_row() -> None:
    predictor = _predictor(matches=2)
    _forecasts(predictor, [[0, 1, 2]] * 3)
    _forecasts(predictor, [[0, 3, 3]], requests=(1,))
    _forecasts(predictor, [[2, 0, 0]] * 5, requests=(2,))
    _end_all(predictor)
    _, forecast, *_ = _forecasts(predictor, [[0, 0, 0]], requests=(3,))
    np.testing.assert_array_equal(forecast, [[1, 0, 0, 0], [0, 0.75, 0, 0.25], [0, 0, 0.75, 0.25]])


def test_prefill_is_matched_with_prefill_only() -> None:
    predictor = _predictor()
    _forecasts(predictor, [[0, 1, 1]], phase=Phase.PREFILL)
    _end_all(predictor)
    assert _forecasts(predictor, [[0, 0, 0]], requests=(1,)) == [None] * 4
    _, forecast, *_ = _forecasts(predictor, [[0, 0, 0]], requests=(1,), phase=Phase.PREFILL)
    assert forecast is not None and forecast[1].tolist() == [0, 1, 0, 0]


def test_rows_of_the_next_pass_are_about_one_token_of_each_request() -> None:
    predictor = _predictor()
    _forecasts(predictor, [[0, 1, 2]], phase=Phase.PREFILL)
    _end_all(predictor)
    *_, forecast, _ = _forecasts(predictor, [[0, 1, 2]] * 5, requests=(1,), phase=Phase.PREFILL)
    np.testing.assert_array_equal(forecast, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 5, 0]])


def test_each_request_of_a_pass_is_matched_by_itself() -> None:
    predictor = _predictor()
    _forecasts(predictor, [[0, 1, 2]])
    _forecasts(predictor, [[3, 2, 1]], requests=(1,))
    _end_all(predictor)
    *_, forecast, _ = _forecasts(predictor, [[0, 1, 0], [3, 2, 0], [0, 1, 0]], requests=(5, 7, 6))
    assert forecast is not None and forecast[2].tolist() == [0, 1, 2, 0]
    assert _arrays(predictor)["decode"][2:] == [
        [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
        [[0, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]],
    ]


def test_a_requests_last_matches_hold_until_the_next_ones() -> None:
    predictor = _predictor()
    _forecasts(predictor, [[0, 1, 2]])
    _end_all(predictor)
    *_, last = _forecasts(predictor, [[0, 1, 0]], requests=(1,))
    before, *_ = _forecasts(predictor, [[0, 1, 0]], requests=(1,))
    np.testing.assert_array_equal(before, last)
    predictor.begin(Pass(Phase.DECODE, 1, 9, (), (1,)))  # and is not observed
    np.testing.assert_array_equal(predictor.forecast(1), last)


def test_requests_of_a_pass_may_have_different_numbers_of_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = _predictor(matches=2)
    _forecasts(predictor, [[0, 1, 2]])
    _end_all(predictor)
    monkeypatch.setattr(activation_matrix, "_MAX_REQUESTS", 2)
    _forecasts(predictor, [[3, 0, 0]], requests=(2,))
    _forecasts(predictor, [[0, 1, 1]], requests=(1,))  # one match: there is no more
    _forecasts(predictor, [[0, 3, 3]], requests=(3,))  # two
    before, *_ = _forecasts(predictor, [[0, 0, 0]] * 3, requests=(3, 1, 3))
    np.testing.assert_array_equal(before, [[2, 0, 0, 1], [1, 2, 0, 0], [1, 0, 2, 0]])


class Recorded(SimulatedTransfer):
    """Keeps what was submitted."""

    def __init__(self) -> None:
        super().__init__(load_s=1.0)
        self.loads: list[Load] = []

    def submit(self, loads: Sequence[Load]) -> None:
        self.loads.extend(loads)
        super().submit(loads)


@pytest.mark.parametrize(("later", "order"), [(6, [5, 10]), (8, [10, 5])])
def test_prefetches_are_ordered_by_likelihood_times_proximity(later: int, order: list[int]) -> None:
    """At layer 0 of 4: layer 1 has 0.5 x 3/4, layer 2 has 0.6 x 2/4 or 0.8 x 2/4; layer 3 has 1 x 1/4."""
    shape = RoutingShape(layers=4, experts=4, top_k=1)
    predictor = _predictor(shape)
    _forecasts(predictor, [[0, 1 + token % 2, 2 if token < later else 3, 0] for token in range(10)])
    _end_all(predictor)
    transfer = Recorded()
    residency = Residency(*shape[:2], 16, 1, "activation")
    coordinator = Coordinator(residency, transfer, predictor, governor=Governor(3), prefetch_count=1)
    passing = Pass(Phase.DECODE, 1, 0, (), (1,))
    coordinator.begin(passing)
    list(coordinator.serve(0, [0], [1], Observation(passing, np.array([[0]]))))
    assert [load.expert for load in transfer.loads] == [0, *order, 12]


def test_the_cache_keeps_what_is_likely_and_early() -> None:
    """(p + eps) (1 - i / L): 0.25 x 1 for expert 1 of layer 0, 0.5 x 2/3 for 1 of layer 1, 0.6 x 1/3 for 2 of layer
    2, which goes first although it is the likeliest."""
    predictor = _predictor()
    _forecasts(predictor, [[int(token < 5), int(token < 10), 2 if token < 12 else 3] for token in range(20)])
    _end_all(predictor)
    *_, forecast = _forecasts(predictor, [[1, 1, 2]], requests=(1,))
    assert forecast is not None
    residency = Residency(*SHAPE[:2], 3, 1, "activation")
    residency.foresee(forecast)

    def resident_after(layer: int, expert: int) -> set[int]:
        residency.plan(layer, [expert], [1], 1)
        residency.complete([expert])
        residency.release([expert])
        return set(residency.resident())

    for layer, expert in ((0, 1), (1, 5), (2, 10)):
        resident_after(layer, expert)
    assert resident_after(0, 0) == {0, 1, 5}
    assert resident_after(0, 3) == {0, 3, 5}


def _by_definition(collection: Experts, matrix: Experts, layer: int, tokens: int) -> Forecast:
    """PredictEAM of the paper, times tokens and top_k: the expected tokens of the layers after `layer`."""
    flat = collection.reshape(len(collection), -1)
    distances = 1 - flat @ matrix.reshape(-1) / np.linalg.norm(flat, axis=1) / np.linalg.norm(matrix)
    nearest = collection[distances.argmin()].astype(np.float64)
    return (tokens * 2 * nearest / nearest.sum(axis=1, keepdims=True))[layer + 1 :]


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_forecasts_are_those_of_the_definition(seed: int, num_past: int, tokens: int) -> None:
    """However the inner products are put together."""
    generator = np.random.default_rng(seed)
    shape = RoutingShape(layers=4, experts=6, top_k=2)

    def chosen(num_tokens: int) -> Experts:
        return np.argsort(generator.random((num_tokens, 4, 6)), axis=2)[:, :, :2]

    predictor = _predictor(shape)
    for request in range(num_past):
        _forecasts(predictor, chosen(int(generator.integers(1, 5))), (request,))
    _end_all(predictor)
    past = predictor.artifact("m").arrays["decode"]
    experts = chosen(tokens)
    matrix = np.zeros((4, 6), np.int64)
    for layer, forecast in enumerate(_forecasts(predictor, experts, (77,))[1:]):
        np.add.at(matrix[layer], experts[:, layer].reshape(-1), 1)
        assert forecast is not None
        np.testing.assert_allclose(forecast[layer + 1 :], _by_definition(past, matrix, layer, tokens), rtol=1e-5)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_matrices_do_not_depend_on_how_a_request_is_cut_into_passes(chunks: list[int], seed: int) -> None:
    experts = np.random.default_rng(seed).integers(0, 4, (sum(chunks), 3))
    whole, cut = _predictor(), _predictor()
    _forecasts(whole, experts)
    for part in np.split(experts, np.cumsum(chunks)[:-1]):
        _forecasts(cut, part)
    assert _arrays(whole) == _arrays(cut)


def test_requests_that_take_turns_have_not_ended() -> None:
    predictor = _predictor()
    for turn in range(3 * activation_matrix._UNSEEN_PASSES):
        request = turn % activation_matrix._UNSEEN_PASSES
        assert _forecasts(predictor, [[request % 4] * 3], (request,)) == [None] * 4
    tokens = predictor.artifact("m").arrays["decode_tokens"]
    assert tokens.tolist() == [3] * activation_matrix._UNSEEN_PASSES


def test_a_request_that_has_not_been_seen_for_long_has_ended() -> None:
    predictor = _predictor()
    _forecasts(predictor, [[0, 1, 2]])
    for _ in range(activation_matrix._UNSEEN_PASSES):
        assert _forecasts(predictor, [[3, 3, 3]], (1,)) == [None] * 4
    *_, forecast = _forecasts(predictor, [[3, 3, 3]], (1,))
    assert forecast is not None and forecast[2].tolist() == [0, 0, 1, 0]


def test_of_too_many_requests_the_longest_unseen_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_matrix, "_MAX_REQUESTS", 2)
    predictor = _predictor()
    for request in (0, 1, 0):
        _forecasts(predictor, [[request, 1, 2]], (request,))
    *_, forecast = _forecasts(predictor, [[2, 2, 2]], (2,))
    assert forecast is not None and forecast[0].tolist() == [0, 1, 0, 0]
    _forecasts(predictor, [[2, 2, 2]] * 4, (3, 4, 5, 6))  # more at once than are remembered
    assert sorted(predictor.artifact("m").arrays["decode_tokens"]) == [1, 1, 1, 1, 1, 1, 2]


def test_passes_that_do_not_say_whose_they_are_are_requests_of_their_own() -> None:
    predictor = _predictor()
    for _ in range(3):
        _forecasts(predictor, [[0, 1, 2], [0, 1, 3]], requests=())
    assert _arrays(predictor)["decode_tokens"] == [2, 2, 2]


def test_tokens_without_an_expert_and_layers_of_other_tokens_are_left_out() -> None:
    predictor = _predictor()
    _forecasts(predictor, [[0, 4, 2], [1, 1, 2]], requests=(0, 1))
    passing = Pass(Phase.DECODE, 1, 1, (), (0,))
    predictor.begin(passing)
    for layer, tokens in enumerate((7, 1, 1)):
        predictor.observe(layer, Observation(passing, np.full((tokens, 1), 3)))
    assert _arrays(predictor)["decode"] == [
        [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]],
        [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]],
    ]


def test_a_pass_that_fails_half_way_counts_for_nothing() -> None:
    predictor = _predictor()
    passing = Pass(Phase.DECODE, 1, 0, (), (0,))
    predictor.begin(passing)
    predictor.observe(0, Observation(passing, np.array([[1]])))
    _forecasts(predictor, [[0, 1, 2]])
    assert _arrays(predictor)["decode"] == [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]]


def _used(**params: int) -> ActivationMatrix:
    predictor = _predictor(**params)
    for request in range(6):
        _forecasts(predictor, [[request % 4, 1, 2]] * (request + 1), (request,), Phase.PREFILL)
        _forecasts(predictor, [[3, request % 4, request % 3]], (request,))
    return predictor


def test_a_restart_is_warm(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    write_artifact(path, _used().artifact("m"))
    read = read_artifact(path, kind="activation_matrix", shape=SHAPE, model="m")
    again = ActivationMatrix(SHAPE, ActivationMatrixParams(), read)
    assert _arrays(again) == _arrays(_used())
    _, forecast, *_ = _forecasts(again, [[3, 0, 0]], (99,))
    assert forecast is not None and forecast[1].sum() == 1


def test_saving_changes_nothing() -> None:
    one, other = _used(capacity=3), _used(capacity=3)
    one.artifact("m")
    _end_all(one)
    _end_all(other)
    assert _arrays(one) == _arrays(other)


def test_a_smaller_collection_keeps_what_it_would_have_kept() -> None:
    small = ActivationMatrix(SHAPE, ActivationMatrixParams(capacity=3), _used().artifact("m"))
    assert _arrays(small) == _arrays(_used(capacity=3))


@pytest.mark.parametrize(
    "damage",
    [
        {"decode": np.zeros((6, 3, 5), np.float32)},
        {"decode": np.ones((5, 3, 4), np.float32)},
        {"decode": np.zeros((6, 3, 4), np.float32)},
        {"prefill": np.full((6, 3, 4), np.nan, np.float32)},
        {"prefill": -np.ones((6, 3, 4), np.float32)},
        {"decode_tokens": np.zeros(6, np.float32)},
        {"decode_tokens": np.float32(6)},
    ],
)
def test_a_damaged_collection_is_refused(damage: dict[str, npt.NDArray[np.float32]]) -> None:
    artifact = _used().artifact("m")
    with pytest.raises(ArtifactError, match="activation_matrix predictor of m is damaged"):
        ActivationMatrix(SHAPE, ActivationMatrixParams(), replace(artifact, arrays={**artifact.arrays, **damage}))
    with pytest.raises(ArtifactError, match="damaged"):
        ActivationMatrix(SHAPE, ActivationMatrixParams(), Artifact("activation_matrix", "m", SHAPE))


def _grouped_trace(requests: int = 24, tokens: int = 40) -> RoutingTrace:
    """Requests of four groups, each with experts of its own in every layer, in random order; prompts of ten tokens."""
    generator = np.random.default_rng(3)
    group = generator.integers(0, 4, requests)
    taste = generator.normal(size=(4, 5, 16), scale=3)
    scores = taste[np.repeat(group, tokens)] + generator.gumbel(size=(requests * tokens, 5, 16))
    experts = np.argsort(-scores, axis=2)[:, :, :2].astype(np.uint16)
    phase = np.tile(np.repeat([0, 1], [10, tokens - 10]), requests).astype(np.uint8)
    request = np.repeat(np.arange(requests), tokens).astype(np.int32)
    return RoutingTrace(experts, request, {"num_experts": 16, "model": "m"}, phase=phase)


def test_a_trace_becomes_a_collection_that_beats_popularity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = _grouped_trace(), tmp_path / "p.safetensors"
    write_trace(tmp_path / "t.npz", trace)
    assert main(["activation_matrix", "--trace", str(tmp_path / "t.npz"), "--out", str(out)]) == 0
    told = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "recall" in line)
    assert float(told["recall at k"]) > float(told["recall at k of popularity"]) + 0.2
    artifact = read_artifact(out, kind="activation_matrix", shape=RoutingShape(5, 16, 2), model="m")
    train, held = split(trace, FitOptions())
    assert artifact.params["validation_requests"] == np.unique(held.request).tolist()
    for name, phase in (("prefill", 0), ("decode", 1)):
        expected = [
            np.stack([np.bincount(rows[:, layer].reshape(-1), minlength=16) for layer in range(5)])
            for request in np.unique(train.request)
            for rows in [train.experts[(train.request == request) & (train.phase == phase)]]
        ]
        np.testing.assert_array_equal(artifact.arrays[name], expected)


def test_a_trace_without_phases_is_decoding() -> None:
    part = rows_of(_grouped_trace(), np.arange(80))
    arrays = collected(replace(part, phase=None)).arrays
    assert arrays["decode_tokens"].tolist() == [40, 40]
    assert arrays["prefill"].shape == (0, 5, 16)
