"""The sequence model of `periodic`: what it learns that frequencies cannot, on which requests, and its way to disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import runtime
from harness.fit import main
from harness.fitting import periodic as fitting
from harness.fitting.base import FitOptions, FitResult
from harness.fitting.periodic import fit, prompts_of, recalls
from runtime.errors import TraceError
from runtime.predictors.artifact import RoutingShape, read_artifact, write_artifact
from runtime.predictors.expert_frequencies import HISTORY, PastPrompt, decayed_frequencies
from runtime.predictors.expert_sequence import ExpertSequence, Sizes
from runtime.trace import RoutingTrace, write_trace

SHAPE = RoutingShape(layers=2, experts=12, top_k=2)


def _recurrent(requests: int = 90, tokens: int = 20, kinds: int = 3, tasks: bool = False) -> RoutingTrace:
    """Requests of several kinds that take turns, each with experts of its own; nobody says which kind it is."""
    generator = np.random.default_rng(1)
    taste = generator.permuted(np.tile(np.arange(SHAPE.experts), (kinds, SHAPE.layers, 1)), axis=2)
    kind = np.arange(requests) % kinds
    noise = generator.gumbel(size=(requests * tokens, *SHAPE[:2]))
    experts = np.argsort(-(0.5 * taste[np.repeat(kind, tokens)] + noise), axis=2)[:, :, : SHAPE.top_k]
    meta = {"num_experts": SHAPE.experts, "model": "m", "tasks": [f"kind {k}" for k in kind] if tasks else []}
    return RoutingTrace(experts.astype(np.uint16), np.repeat(np.arange(requests), tokens).astype(np.int32), meta)


@pytest.fixture(scope="module")
def trained() -> FitResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "SIZES", Sizes(hidden=32, window=8))
        patch.setattr(fitting, "_LEARNING_RATE", 3e-3)
        return fit(_recurrent(), FitOptions(epochs=40, patience=40), quiet=True)


def test_it_learns_which_prompt_comes_next_from_the_order_alone(trained: FitResult) -> None:
    figures = trained.figures
    best = figures["recall_at_k_of_own_frequencies"]
    assert figures["recall_at_k_every_1"] > 0.9 * best
    assert figures["recall_at_k_every_1_of_frequency"] < 0.8 * best
    assert figures["recall_at_k_every_1"] > figures["recall_at_k_every_40"]


def test_frequencies_do_where_the_tasks_are_said() -> None:
    _, prompts = prompts_of(_recurrent(tasks=True))
    own, frequency = (
        recalls(model, prompts, 70, SHAPE.top_k, [1])[0]
        for model in (
            lambda past, period: {None: prompts[len(past) % 3].counts},  # of the same kind, as they take turns
            lambda past, period: decayed_frequencies(past, SHAPE),
        )
    )
    assert len(prompts) - 1 > HISTORY  # so that `past` is cut, and the first one is not meant to be right
    assert frequency > own


def test_recall_by_hand() -> None:
    def prompt(first: int, second: int) -> PastPrompt:
        return PastPrompt("a", np.array([[first, second]], np.float32), first + second)

    prompts = [prompt(4, 0), prompt(1, 3), prompt(0, 8)]
    previous = recalls(lambda past, period: {None: past[-1].counts}, prompts, 1, 1, [1, 2])
    # Every prompt: 1 of 4 by the first one, 8 of 8 by the second one. Every second: the last one by either.
    assert previous == pytest.approx([9 / 12, (1 + 8 + 0) / (4 + 8 + 8)])


def test_prompts_are_those_of_the_trace_by_arrival() -> None:
    experts = np.array([[[0, 1]], [[2, 1]], [[0, 2]]], np.uint16)
    trace = RoutingTrace(experts, np.array([7, 3, 7], np.int32), {"num_experts": 3, "tasks": ["x"] * 7 + ["y"]})
    numbers, prompts = prompts_of(trace)
    assert numbers == [7, 3]
    assert [(prompt.task, prompt.tokens) for prompt in prompts] == [("y", 2), ("x", 1)]
    np.testing.assert_array_equal(prompts[0].counts, [[2, 1, 1]])


def test_the_last_requests_are_held_out(trained: FitResult) -> None:
    assert trained.artifact.params["validation_requests"] == list(range(72, 90))


def test_a_saved_predictor_predicts_identically(trained: FitResult, tmp_path: Path) -> None:
    write_artifact(tmp_path / "p.safetensors", trained.artifact)
    read = read_artifact(tmp_path / "p.safetensors", kind="periodic", shape=SHAPE, model="m")
    _, prompts = prompts_of(_recurrent())
    before, after = (ExpertSequence.of(of).predict(prompts[:20], 5) for of in (trained.artifact, read))
    assert before.keys() == after.keys()
    for task in before:
        np.testing.assert_array_equal(before[task], after[task])


def test_tasks_seen_once_share_what_is_known_of_others() -> None:
    trace = _recurrent(requests=20, tasks=True)
    tasks = [*trace.meta["tasks"][:10], *(f"only {i}" for i in range(10))]
    found = fit(replace(trace, meta={**trace.meta, "tasks": tasks}), FitOptions(epochs=1), quiet=True)
    assert set(found.artifact.params["tasks"]) == {"kind 0", "kind 1", "kind 2"}
    _, prompts = prompts_of(trace)
    predicted = ExpertSequence.of(found.artifact).predict(prompts[:5], 1)
    assert {None, "kind 0"} < predicted.keys()
    assert all(shares.shape == SHAPE[:2] and (shares > 0).all() for shares in predicted.values())


def test_the_same_seed_gives_the_same_predictor_and_torch_is_left_alone() -> None:
    threads, arrays = torch.get_num_threads(), []
    for _ in range(2):
        torch.manual_seed(5)
        arrays.append(fit(_recurrent(20), FitOptions(epochs=2), quiet=True).artifact.arrays)
        drawn = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(2), drawn)
    assert torch.get_num_threads() == threads
    assert all((arrays[0][name] == arrays[1][name]).all() for name in arrays[0])


def test_too_few_requests_are_refused() -> None:
    with pytest.raises(TraceError, match="8 are needed, this has 7"):
        fit(_recurrent(7), FitOptions(), quiet=True)


def test_from_an_engines_trace_to_an_engine_that_uses_it(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [torch.randint(0, 4000, (1, 6), generator=torch.Generator().manual_seed(seed % 3)) for seed in range(9)]

    def generate(engine: runtime.Engine) -> list[list[int]]:
        options = {"max_new_tokens": 4, "do_sample": False}
        return [
            engine.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist() for ids in prompts
        ]

    with runtime.load_reference(tiny_checkpoint) as reference:
        reference.start_trace()
        expected = generate(reference)
        write_trace(tmp_path / "t.npz", reference.trace())
    out = tmp_path / "p.safetensors"
    assert main(["periodic", "--epochs", "1", "--trace", str(tmp_path / "t.npz"), "--out", str(out)]) == 0
    assert f"predictor: {{kind: periodic, artifact: {out}}}" in capsys.readouterr().out
    overrides = {
        "predictor.kind": "periodic",
        "predictor.artifact": str(out),
        "predictor.every": 1,
        "cache.policy": "periodic",
        "cache.slots": 6,
        "prefetch.on_trial": False,
    }
    with runtime.load(tiny_checkpoint, overrides=overrides) as engine:
        assert generate(engine) == expected
        assert engine.stats().cache.num_prefetch_issued > 0
        engine.check_integrity()
