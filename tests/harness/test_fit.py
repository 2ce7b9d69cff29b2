"""`harness.fit`: traces become a predictor on disk; mistakes are one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.fit import main
from harness.fitting.base import FitOptions, joined, split
from harness.fitting.routing_path import fit
from runtime.predictors.artifact import Artifact, RoutingShape, read_artifact, write_artifact
from runtime.predictors.params import RoutingPathParams
from runtime.predictors.routing_path import RoutingPath
from runtime.trace import RoutingTrace, write_trace

SHAPE = RoutingShape(layers=2, experts=6, top_k=2)


def _trace(seed: int = 0, requests: int = 6, model: str = "m", experts: int = SHAPE.experts) -> RoutingTrace:
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 20, requests * 30).astype(np.int32)
    chosen = np.stack([ids % experts, (ids + 1) % experts], axis=1)[:, None].repeat(SHAPE.layers, axis=1)
    request = np.repeat(np.arange(requests), 30).astype(np.int32)
    meta = {"num_experts": experts, "model": model, "tasks": [f"{model}{seed}-{r}" for r in range(requests)]}
    return RoutingTrace(chosen.astype(np.uint16), request, meta, token_ids=ids)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_trace(tmp_path / "t.npz", _trace())
    return tmp_path / "t.npz"


def _fit(*arguments: object) -> int:
    return main(["routing_path", "--epochs", "1", *map(str, arguments)])


def test_a_predictor_is_written_and_its_figures_and_use_are_told(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = path.with_name("new") / "p.safetensors"
    assert _fit("--trace", path, "--out", out) == 0
    told = capsys.readouterr().out
    assert "recall at k of previous token" in told
    assert f"predictor: {{kind: routing_path, artifact: {out}}}" in told
    artifact = read_artifact(out, kind="routing_path", shape=SHAPE, model="m")
    RoutingPath(artifact, RoutingPathParams())
    _, held = split(_trace(), FitOptions())
    assert artifact.params["validation_requests"] == np.unique(held.request).tolist()


def test_a_predictor_of_the_same_kind_is_replaced_and_nothing_else(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = path.with_name("p.safetensors")
    assert _fit("--trace", path, "--out", out) == 0
    first = out.read_bytes()
    assert _fit("--trace", path, "--out", out, "--seed", 3) == 0
    assert out.read_bytes() != first
    write_artifact(out, Artifact("periodic", "m", SHAPE))
    before = out.read_bytes()
    assert _fit("--trace", path, "--out", out) == 2
    assert _fit("--trace", path, "--out", path) == 2
    assert out.read_bytes() == before
    assert capsys.readouterr().err.count("is no routing_path predictor") == 2


def test_the_same_seed_gives_the_same_predictor(path: Path) -> None:
    outs = [path.with_name(f"{name}.safetensors") for name in "ab"]
    for out in outs:
        assert _fit("--trace", path, "--out", out) == 0
    one, same = (read_artifact(out, kind="routing_path", shape=SHAPE).arrays for out in outs)
    assert one.keys() == same.keys()
    assert all((one[name] == same[name]).all() for name in one)


def test_several_traces_are_trained_on_together(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, out = path.with_name("more.npz"), path.with_name("p.safetensors")
    write_trace(more, _trace(seed=1))
    assert _fit("--trace", path, more, "--out", out, "--validation-share", 0.5) == 0
    held = read_artifact(out, kind="routing_path", shape=SHAPE).params["validation_requests"]
    assert len(held) == 6
    assert max(held) > 5


def test_joined_traces_keep_requests_and_tasks_apart() -> None:
    first, second = _trace(), _trace(seed=1)
    second = replace(second, request=second.request * 3 + 2, meta={**second.meta, "tasks": []}, phase=None)
    both = joined([replace(first, phase=np.ones(180, np.uint8)), second])
    assert both.num_tokens == 360
    assert both.phase is None
    assert np.unique(both.request).tolist() == list(range(12))
    assert [both.task(r) for r in (0, 5, 6, 11)] == ["m0-0", "m0-5", "default", "default"]
    assert both.step is not None
    assert len(np.unique(both.step)) == 360
    np.testing.assert_array_equal(both.experts[180:], second.experts)


def test_a_single_trace_keeps_its_request_numbers() -> None:
    trace = replace(_trace(), request=_trace().request + 40)
    assert joined([trace]) is trace


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"token_ids": None}, "token_ids is missing"),
        ({"request": np.zeros(180, np.int32)}, "2 are needed"),
    ],
)
def test_a_trace_that_lacks_something_is_refused(
    path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], complaint: str
) -> None:
    write_trace(path, replace(_trace(), **change))  # type: ignore[arg-type]
    out = path.with_name("p.safetensors")
    assert _fit("--trace", path, "--out", out) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("other", [_trace(model="n"), _trace(experts=7)], ids=["model", "shape"])
def test_traces_of_different_models_are_refused(
    path: Path, capsys: pytest.CaptureFixture[str], other: RoutingTrace
) -> None:
    more = path.with_name("more.npz")
    write_trace(more, other)
    assert _fit("--trace", path, "--trace", more, "--out", path.with_name("p.safetensors")) == 2
    assert "different models" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nonsense"], "no predictor 'nonsense'"),
        (["routing_path", "--epochs", "0"], "--epochs 0"),
        (["routing_path", "--threads", "0"], "--threads 0"),
        (["routing_path", "--seed", "-1"], "--seed -1"),
        (["routing_path", "--validation-share", "1"], "--validation-share 1"),
        (["routing_path", "--out", "{trace}/p.safetensors"], "not a folder"),
        (["routing_path", "--trace", "{trace}.missing"], "cannot read the trace"),
    ],
)
def test_mistakes_are_one_line(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    given = [argument.replace("{trace}", str(path)) for argument in arguments]
    rest = ["--trace", str(path)] if "--trace" not in given else []
    rest += ["--out", str(path.with_name("p.safetensors"))] if "--out" not in given else []
    assert main([*given, *rest]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_training_leaves_the_callers_torch_alone() -> None:
    torch.manual_seed(5)
    threads, expected = torch.get_num_threads(), torch.rand(2)
    torch.manual_seed(5)
    fit(_trace(), FitOptions(epochs=1, threads=threads + 1), quiet=True)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.rand(2), expected)
