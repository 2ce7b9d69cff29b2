"""The sequence predictor: it computes what was trained, follows every request by itself, and pays where it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from harness.fit import main
from harness.fitting import sequence as fitting
from harness.fitting.base import FitOptions, split
from harness.fitting.sequence import Network, Tape, fit
from harness.measure.replay import Setting, Timing, replay
from harness.measure.schedule import Schedule
from runtime.errors import ArtifactError
from runtime.predictors import sequence
from runtime.predictors.artifact import Artifact, RoutingShape, read_artifact, write_artifact
from runtime.predictors.base import Forecast, Observation
from runtime.predictors.make import PredictorSpec, make_predictor
from runtime.predictors.sequence import SequencePredictor
from runtime.trace import RoutingTrace, write_trace
from runtime.vocabulary import Pass, Phase

SHAPE = RoutingShape(layers=3, experts=6, top_k=2)
Experts = npt.NDArray[np.int64]
Told = tuple[Forecast, Forecast]


def _network(seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network(SHAPE).eval()


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return _network().artifact("m", [1])


def _routes(num_tokens: int, seed: int = 0) -> Experts:
    """[tokens, layers, top_k]."""
    scores = np.random.default_rng(seed).random((num_tokens, *SHAPE[:2]))
    return np.argsort(scores, axis=2)[:, :, : SHAPE.top_k]


def _run(predictor: SequencePredictor, routes: Experts, requests: Sequence[int] = ()) -> list[Told]:
    """A pass of all tokens in `routes`; the forecasts and waits after each layer."""
    passing = Pass(Phase.DECODE, len(routes), 0, requests=tuple(requests))
    predictor.begin(passing)
    found = []
    for layer in range(SHAPE.layers):
        predictor.observe(layer, Observation(passing, routes[:, layer]))
        forecast = predictor.forecast(layer)
        assert forecast is not None
        found.append((forecast.copy(), predictor.waits().copy()))
    return found


def _one_by_one(predictor: SequencePredictor, routes: Experts, request: int = 0) -> list[Told]:
    return [one for token in routes for one in _run(predictor, token[None], [request])]


def test_it_computes_what_was_trained(artifact: Artifact) -> None:
    routes = _routes(40)
    tape = Tape(RoutingTrace(routes.astype(np.uint16), np.zeros(40, np.int32), {"num_experts": SHAPE.experts}))
    frequencies = torch.cat([tape.examples(np.array([segment])).frequencies[:, 1:] for segment in (0, 1)], dim=1)
    prior = torch.full_like(frequencies[:, :1], SHAPE.top_k / SHAPE.experts)
    with torch.inference_mode():
        soon, worth = _network()(torch.cat([prior, frequencies], dim=1))[0].sigmoid().numpy().transpose(3, 0, 1, 2)
    soon *= np.minimum(1, SHAPE.top_k / soon.sum(axis=2, keepdims=True))
    found = _one_by_one(SequencePredictor(artifact), routes[:32])
    own = np.array([[one[layer] for one in found[token]] for token in range(96) for layer in [token % 3]])
    np.testing.assert_allclose(own[:, 0].reshape(soon.shape), soon, atol=2e-3)  # the tape keeps half precision
    waits = (1 - worth) / (1 - fitting.DISCOUNT)
    np.testing.assert_allclose(own[:, 1].reshape(waits.shape), waits, atol=2e-2)


def test_the_future_changes_nothing_before_it(artifact: Artifact) -> None:
    one, other = _routes(12), _routes(12)
    other[7, 2] = (other[7, 2] + 1) % SHAPE.experts
    other[8:] = _routes(4, seed=1)
    ours, theirs = (_one_by_one(SequencePredictor(artifact), routes) for routes in (one, other))
    same = 7 * SHAPE.layers + 2
    for (forecast, waits), (their_forecast, their_waits) in zip(ours[:same], theirs[:same], strict=True):
        assert (forecast == their_forecast).all() and (waits == their_waits).all()
    assert (ours[same][1] != theirs[same][1]).any()


def test_requests_decoded_together_are_followed_one_by_one(artifact: Artifact) -> None:
    first, second = _routes(9), _routes(9, seed=1)
    together, alone = SequencePredictor(artifact), [SequencePredictor(artifact) for _ in range(2)]
    for tokens in zip(first, second, strict=True):
        both = _run(together, np.stack(tokens), [3, 8])[-1]
        one, other = (_run(own, token[None], [3])[-1] for own, token in zip(alone, tokens, strict=True))
        np.testing.assert_allclose(both[0], one[0] + other[0], rtol=1e-5)
        assert (both[1] <= np.minimum(one[1], other[1]) + 1e-5).all(), "whoever comes first ends the wait"


def test_a_request_that_paused_is_taken_up_where_it_was_left(artifact: Artifact) -> None:
    routes, between = _routes(6), SequencePredictor(artifact)
    _one_by_one(between, routes[:5], request=1)
    _one_by_one(between, _routes(4, seed=1), request=2)
    expected = _one_by_one(SequencePredictor(artifact), routes, request=1)[-1]
    assert (_one_by_one(between, routes[5:], request=1)[-1][1] == expected[1]).all()


def test_a_prompt_in_one_pass_is_as_good_as_token_by_token(artifact: Artifact) -> None:
    routes, following = _routes(20), _routes(1, seed=1)
    at_once, one_by_one = SequencePredictor(artifact), SequencePredictor(artifact)
    _run(at_once, routes, [0] * 20)
    _one_by_one(one_by_one, routes)
    found, expected = _run(at_once, following, [0])[-1], _run(one_by_one, following, [0])[-1]
    np.testing.assert_array_equal(found[1], expected[1])


def test_a_new_request_goes_on_from_the_one_before(artifact: Artifact) -> None:
    routes = _routes(8)
    warm, cold = SequencePredictor(artifact), SequencePredictor(artifact)
    _one_by_one(warm, routes[:7], request=1)
    goes_on, starts = (_one_by_one(predictor, routes[7:], request=2)[-1][1] for predictor in (warm, cold))
    assert (goes_on != starts).any()
    assert (goes_on == _one_by_one(SequencePredictor(artifact), routes, request=3)[-1][1]).all()


def test_only_the_requests_that_ran_last_are_remembered(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "_MAX_REQUESTS", 2)
    predictor, routes = SequencePredictor(artifact), _routes(5)
    for request, token in enumerate(routes):
        _run(predictor, token[None], [request])
    assert list(predictor._requests) == [3, 4]
    _run(predictor, routes, range(5))
    assert len(predictor._requests) == 5, "all that are running"


def _damaged(artifact: Artifact, **change: object) -> Artifact:
    return replace(artifact, arrays={**artifact.arrays, **change})  # type: ignore[arg-type]


def test_an_artefact_comes_back_from_disk_and_damaged_or_foreign_ones_are_refused(
    tmp_path: Path, artifact: Artifact
) -> None:
    path, routes = tmp_path / "p.safetensors", _routes(3)
    write_artifact(path, artifact)
    read = make_predictor(PredictorSpec("sequence", path, model="m"), SHAPE)
    assert isinstance(read, SequencePredictor)
    assert (_one_by_one(read, routes)[-1][1] == _one_by_one(SequencePredictor(artifact), routes)[-1][1]).all()
    with pytest.raises(ArtifactError, match="belongs to m"):
        make_predictor(PredictorSpec("sequence", path, model="another"), SHAPE)
    with pytest.raises(ArtifactError, match="not to a model of"):
        make_predictor(PredictorSpec("sequence", path), SHAPE._replace(experts=8))
    missing = {name: array for name, array in artifact.arrays.items() if name != "spread"}
    for wrong in (
        replace(artifact, arrays=missing),
        _damaged(artifact, bias=np.zeros((3, 6, 3), np.float32)),
        _damaged(artifact, alphas=np.float32(1)),
        _damaged(artifact, inner=np.full_like(artifact.arrays["inner"], np.nan)),
        replace(artifact, params={"discount": 1.5}),
    ):
        write_artifact(path, wrong)
        with pytest.raises(ArtifactError, match="damaged"):
            make_predictor(PredictorSpec("sequence", path), SHAPE)


def _wandering(requests: int = 12, tokens: int = 80, seed: int = 0) -> RoutingTrace:
    """A hidden state that walks round a ring of 8, and sometimes jumps, says what every layer of 16 experts selects."""
    generator = np.random.default_rng(seed)
    steps = np.where(generator.random(requests * tokens) < 0.1, generator.integers(8, size=requests * tokens), 1)
    state = np.cumsum(steps) % 8
    first = (2 * state[:, None] + 5 * np.arange(3)) % 16
    experts = np.stack([first, (first + 1) % 16], axis=2).astype(np.uint16)
    meta = {"num_experts": 16, "model": "m", "expert_bytes": 1}
    return RoutingTrace(experts, np.repeat(np.arange(requests), tokens).astype(np.int32), meta)


def test_trained_it_beats_its_baselines_and_saves_loads(tmp_path: Path) -> None:
    trace, path = _wandering(), tmp_path / "p.safetensors"
    result = fit(trace, FitOptions(epochs=8), quiet=True)
    figures = result.figures
    assert figures["recall_at_k"] > 0.8
    assert figures["recall_at_k"] > figures["recall_at_k_of_previous_token"] + 0.3
    assert figures["recall_at_k"] > figures["recall_at_k_of_popularity"] + 0.3
    write_artifact(path, result.artifact)
    _, held = split(trace, FitOptions())
    schedule, timing = Schedule(held), Timing(1.0, 0.0, 0.0)
    learned = Setting("probabilistic_belady", 16, "sequence", depth=0, artifact=str(path))
    loads = {
        setting.policy: replay(schedule, setting, timing).num_loads
        for setting in (learned, *(Setting(policy, 16) for policy in ("lru", "next_use", "td_next_use", "belady")))
    }
    assert loads["belady"] < loads["probabilistic_belady"] < 0.8 * loads["next_use"]
    assert loads["td_next_use"] < loads["next_use"] < loads["lru"]


def test_the_command_writes_it_and_the_same_seed_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(tmp_path / "t.npz", _wandering(requests=3, tokens=20))
    outs = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for out in outs:
        assert main(["sequence", "--trace", str(tmp_path / "t.npz"), "--out", str(out), "--epochs", "1"]) == 0
    assert "predictor: {kind: sequence" in capsys.readouterr().out
    one, same = (read_artifact(out, kind="sequence", shape=RoutingShape(3, 16, 2), model="m") for out in outs)
    assert len(one.params["validation_requests"]) == 1
    assert all((one.arrays[name] == same.arrays[name]).all() for name in one.arrays)


def test_targets_are_what_the_next_tokens_choose() -> None:
    """Expert 1 is used by the last token of four: worth discount ** 2 before two others, 1 before it is used."""
    experts = np.array([[[0]], [[0]], [[0]], [[1]]], np.uint16)
    tape = Tape(RoutingTrace(experts, np.zeros(4, np.int32), {"num_experts": 2}))
    found = tape.examples(np.array([0]))
    assert found.worth[0, :3, 0, 1].tolist() == pytest.approx([fitting.DISCOUNT**2, fitting.DISCOUNT, 1])
    assert found.is_next[0, :3, 0].tolist() == [[1, 0], [1, 0], [0, 1]]
    assert found.frequencies[0, :, 0, 1, 0].tolist() == [0.5, 0, 0, 0, 1], "the first rate knows the last token only"
