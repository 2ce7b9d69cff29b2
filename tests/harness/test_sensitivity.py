"""Task sensitivity: what is made random, what is compared, and how it reaches the predictor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import runtime
from harness.demo.widen import bundled_model
from harness.fit import main
from harness.fitting import sensitivity
from harness.fitting.sensitivity import Sensitivity, measure, random_experts, sensitivity_text
from harness.measure.workload import Passage, Workload
from runtime.engine import Engine
from runtime.errors import UsageError
from runtime.predictors.artifact import RoutingShape, read_artifact
from runtime.predictors.periodic import insensitive_layers
from runtime.trace import RoutingTrace, write_trace

SHAPE = RoutingShape(layers=2, experts=8, top_k=2)
TEXT = "A small piece of text, long enough for a few dozen tokens of whatever kind they are."


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with runtime.load(tiny_checkpoint, overrides={"cache.slots": 6, "predictor.kind": "none"}) as loaded:
        yield loaded


def _workload(*texts: tuple[str, str]) -> Workload:
    return Workload("w", "", tuple(Passage(str(i), task, text) for i, (task, text) in enumerate(texts)))


def test_random_experts_are_distinct_and_keep_the_weights() -> None:
    index, weights = torch.zeros(500, 3, dtype=torch.int64), torch.rand(500, 3)
    drawn, kept = random_experts(5, torch.Generator().manual_seed(0), torch.zeros(500, 4), index, weights)
    assert kept is weights
    assert drawn.dtype == index.dtype
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    counts = np.bincount(drawn.reshape(-1), minlength=5)
    assert counts.size == 5 and counts.min() > 200  # of 300 each


def test_layers_become_random_one_after_the_other(engine: Engine) -> None:
    passes: list[list[bool]] = []
    engine.on_pass(lambda passing: passes.append([runner.reroute is not None for runner in engine._runners]))
    measure(engine, _workload(("a", TEXT)), quiet=True)
    assert passes == [[False, False], [True, False], [True, True]]
    assert all(runner.reroute is None for runner in engine._runners)


def test_the_same_routing_agrees_and_another_does_not(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = _workload(("a", TEXT), ("b", TEXT[::-1]))
    found = measure(engine, workload, quiet=True)
    assert found.keys() == {"a", "b"}
    for one in found.values():
        assert len(one.agreement) == len(one.kl_nats) == SHAPE.layers
        assert min(one.kl_nats) > 1e-6
    assert measure(engine, workload, quiet=True) == found
    monkeypatch.setattr(sensitivity, "random_experts", lambda experts, seed, hidden, index, weights: (index, weights))
    for one in measure(engine, workload, quiet=True).values():
        assert one.agreement == (1.0, 1.0)
        assert one.kl_nats == (0, 0)


def test_routing_matters_to_a_trained_model() -> None:
    with runtime.load(bundled_model(), overrides={"predictor.kind": "none"}) as demo:
        one = measure(demo, _workload(("english", TEXT)), quiet=True)["english"]
    assert one.insensitive_layers == []
    assert one.agreement[-1] < one.agreement[0] < 0.85
    assert one.kl_nats[-1] > one.kl_nats[0] > 0.1


def test_every_task_has_its_own_texts_and_their_tokens_are_counted(engine: Engine) -> None:
    found = measure(engine, _workload(("a", TEXT), ("b", TEXT), ("b", "x"), ("b", TEXT), ("c", "x")), quiet=True)
    assert found.keys() == {"a", "b"}  # c has no text of 2 tokens
    assert found["b"].num_tokens == 2 * found["a"].num_tokens
    many = measure(engine, _workload(*[("a", TEXT * 40)] * 20), quiet=True)
    assert many["a"].num_tokens == sensitivity.TEXTS * sensitivity.TEXT_TOKENS
    with pytest.raises(UsageError, match="too short"):
        measure(engine, _workload(("c", "x")), quiet=True)


@torch.inference_mode()
def test_rerouting_ends_and_restores_what_was_there(engine: Engine) -> None:
    inputs = torch.arange(12).view(1, 12)
    before = engine.model(inputs).logits
    with pytest.raises(RuntimeError, match="stop"), engine.rerouted({1: lambda h, i, w: (i.flip(0), w)}):
        assert not torch.equal(engine.model(inputs).logits, before)
        with engine.rerouted({0: lambda h, i, w: (i, w), 1: lambda h, i, w: (i, w)}):
            assert torch.equal(engine.model(inputs).logits, before)
        assert not torch.equal(engine.model(inputs).logits, before)
        raise RuntimeError("stop")
    assert torch.equal(engine.model(inputs).logits, before)


@pytest.mark.parametrize(
    ("agreement", "threshold", "layers"),
    [
        ((0.9, 0.85, 0.8, 0.9), 0.85, [0, 1]),  # a layer after one that matters matters
        ((0.84, 0.9, 0.9, 0.9), 0.85, []),
        ((0.9, 0.9, 0.9, 0.9), 0.85, [0, 1, 2, 3]),
        ((0.9, 0.5, 0.4, 0.3), 0.45, [0, 1]),
    ],
)
def test_layers_are_insensitive_as_far_as_the_output_stays(
    agreement: tuple[float, ...], threshold: float, layers: list[int]
) -> None:
    one = Sensitivity(100, agreement, (0.1,) * 4, threshold)
    assert one.insensitive_layers == layers
    assert f"{len(layers)} of 4" in sensitivity_text({"a": one})


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    experts = np.random.default_rng(0).integers(0, 4, (80, SHAPE.layers, 1))
    request = np.repeat(np.arange(10), 8).astype(np.int32)
    meta = {"num_experts": SHAPE.experts, "model": "m", "tasks": ["a", "b"] * 5}
    path = tmp_path / "t.npz"
    write_trace(path, RoutingTrace(np.concatenate([experts, experts + 4], axis=2).astype(np.uint16), request, meta))
    return path


def _fit(trace: Path, *arguments: object) -> int:
    out = trace.with_name("p.safetensors")
    return main(["periodic", "--epochs", "1", "--trace", str(trace), "--out", str(out), *map(str, arguments)])


def test_fit_writes_what_was_measured_for_the_predictor(
    trace: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = trace.with_name("texts.jsonl")
    texts.write_text("\n".join(json.dumps({"task": task, "text": TEXT}) for task in "ab"), encoding="utf-8")
    assert _fit(trace, "--sensitivity", tiny_checkpoint, "--texts", texts, "--threshold", 1e-9) == 0
    told = capsys.readouterr().out
    assert "2 of 2" in told
    artifact = read_artifact(trace.with_name("p.safetensors"), kind="periodic", shape=SHAPE, model="m")
    of_a = artifact.params["sensitivity"]["a"]
    assert (len(of_a["agreement"]), of_a["threshold"]) == (2, 1e-9)
    expected = [0, 1][: sum(agreement > 0 for agreement in of_a["agreement"])]
    assert insensitive_layers(artifact)["a"] == expected


def test_without_it_every_layer_matters(trace: Path) -> None:
    assert _fit(trace) == 0
    assert insensitive_layers(read_artifact(trace.with_name("p.safetensors"), shape=SHAPE)) == {}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--sensitivity", "{folder}/nothing-here"], "nothing-here"),
        (["--sensitivity", "{model}", "--texts", "{folder}/missing.jsonl"], "missing.jsonl cannot be read"),
        (["--sensitivity", "{model}", "--threshold", "0"], "--threshold 0"),
        (["--threshold", "0.5"], "--threshold: how much"),
        (["--texts", "t.jsonl"], "--texts: how much"),
    ],
)
def test_mistakes_are_one_line(
    trace: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    given = [of.replace("{folder}", str(trace.parent)).replace("{model}", str(tiny_checkpoint)) for of in arguments]
    assert _fit(trace, *given) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not trace.with_name("p.safetensors").exists()


def test_another_model_is_refused(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _fit(trace, "--sensitivity", bundled_model()) == 2
    error = capsys.readouterr().err
    assert "8 layers x 32 experts, top-4" in error and "2 x 8, top-2" in error


def test_other_predictors_have_no_use_for_it(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(trace.with_name("p.safetensors"))
    assert main(["routing_path", "--trace", str(trace), "--out", out, "--sensitivity", "x"]) == 2
    assert "periodic --sensitivity only" in capsys.readouterr().err
