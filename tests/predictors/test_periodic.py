"""`periodic`: expected tokens by hand, when it predicts, whose tokens it counts, and what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.measure.replay import ReplayResult, Setting, Timing, predictor_of, replay
from harness.measure.schedule import Schedule
from harness.simulate import main as simulate
from runtime.errors import ArtifactError, ProfileError, UsageError
from runtime.predictors.artifact import Artifact, RoutingShape, read_artifact, write_artifact
from runtime.predictors.base import BEFORE_FIRST_LAYER, Forecast, Observation
from runtime.predictors.expert_frequencies import DECAY, HISTORY, PRIOR_TOKENS, PastPrompt, decayed_frequencies
from runtime.predictors.expert_sequence import ExpertSequence, Sizes
from runtime.predictors.make import PredictorSpec, make_predictor
from runtime.predictors.params import PeriodicParams
from runtime.predictors.periodic import Periodic, TaskLoad, expected_tokens
from runtime.profile import Profile
from runtime.trace import RoutingTrace, write_trace
from runtime.vocabulary import Pass, Phase

SHAPE = RoutingShape(layers=2, experts=3, top_k=1)
TRACE_SHAPE = RoutingShape(layers=3, experts=8, top_k=2)
TIMING = Timing(load_s=1e-3, expert_s=1e-3, layer_s=1e-3)


def _predictor(every: int = 1, unit: str = "prompt", artifact: Artifact | None = None, **params: Any) -> Periodic:
    return Periodic(SHAPE, PeriodicParams(**params), artifact, every=every, every_unit=unit)


def _artifact(shape: RoutingShape = SHAPE, insensitive: Mapping[str, Sequence[int]] | None = None) -> Artifact:
    measured = {task: {"insensitive_layers": list(layers)} for task, layers in (insensitive or {}).items()}
    return ExpertSequence(Sizes(4, 3), shape, ["a"]).artifact("m", sensitivity=measured)


class _Run:
    """Feeds passes in which every token of a request chooses one expert, in all layers."""

    def __init__(self, predictor: Periodic) -> None:
        self.predictor, self.step = predictor, 0

    def __call__(self, *tokens: tuple[int, int], tasks: Mapping[int, str] | None = None) -> Forecast | None:
        """One token per (request, expert); what is forecast before the first layer."""
        requests = tuple(request for request, _ in tokens)
        names = tuple(tasks[request] for request in requests) if tasks else ()
        passing = Pass(Phase.DECODE, len(tokens), self.step, requests=requests, tasks=names)
        self.predictor.begin(passing)
        found = self.predictor.forecast(BEFORE_FIRST_LAYER)
        chosen = np.array([[expert] for _, expert in tokens])
        for layer in range(SHAPE.layers):
            self.predictor.observe(layer, Observation(passing, chosen))
        self.step += 1
        return None if found is None else found.copy()


def _shares(counts: Sequence[float], prior: Sequence[float]) -> np.ndarray:
    return (np.array(counts) + PRIOR_TOKENS * np.array(prior)) / (np.sum(counts) + PRIOR_TOKENS)


def test_expected_tokens_by_hand() -> None:
    chat = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], np.float32)
    other = np.array([[0.0, 0.0, 1.0], [0.0, 0.25, 0.75]], np.float32)
    loads = {
        "chat": TaskLoad(input_tokens=30, num_requests=2, output_tokens=35.0),  # 100 tokens
        "code": TaskLoad(input_tokens=10, num_requests=1, output_tokens=30.0),  # 40, of a task that is not known
    }
    found = expected_tokens(loads, {None: other, "chat": chat}, insensitive={"chat": [1]})
    np.testing.assert_allclose(found, [[50, 50, 40], [0, 10, 30]])
    np.testing.assert_allclose(chat[1], [1, 0, 0])  # what it was given is as before


def test_frequencies_are_shares_of_tokens_and_fade() -> None:
    old = PastPrompt("a", np.array([[100.0, 0, 0], [0, 100, 0]], np.float32), 100)
    new = PastPrompt("b", np.array([[0, 0, 10.0], [0, 0, 10]], np.float32), 10)
    found = decayed_frequencies([old, new], SHAPE)
    faded = 100 * DECAY
    overall = _shares([faded, 0, 10], [1 / 3] * 3)
    np.testing.assert_allclose(found[None][0], overall, rtol=1e-5)
    np.testing.assert_allclose(found["a"][0], _shares([faded, 0, 0], overall), rtol=1e-5)
    np.testing.assert_allclose(found["b"][1], _shares([0, 0, 10], _shares([0, faded, 10], [1 / 3] * 3)), rtol=1e-5)
    np.testing.assert_allclose(found[None].sum(axis=1), SHAPE.top_k, rtol=1e-5)


def test_the_forecast_is_n_in_tokens_of_the_pass() -> None:
    run = _Run(_predictor())
    tasks = {1: "a", 2: "b", 3: "a", 4: "b"}
    assert run(*[(1, 0)] * 6, tasks=tasks) is None  # nothing has been seen
    for _ in range(4):
        run((1, 0), tasks=tasks)
    for _ in range(10):  # request 1 has ended after 4 output tokens, nothing is known of b's
        run((2, 1), tasks=tasks)
    found = run((2, 1), *[(3, 0)] * 5, (4, 2), tasks=tasks)
    overall = _shares([10 * DECAY, 10, 0], [1 / 3] * 3)
    a, b = _shares([10 * DECAY, 0, 0], overall), _shares([0, 10, 0], overall)
    tokens_a = 5 + 1 * 4  # W_o is what a's request had
    tokens_b = 1 + 1 + 2 * 4  # of requests 2 and 4; W_o is that of all tasks
    expected = 7 * (tokens_a * a + tokens_b * b) / (tokens_a + tokens_b)
    assert found is not None
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [expected, expected], rtol=1e-5)


@pytest.mark.parametrize("every", [1, 3])
def test_predictions_change_every_p_prompts_and_not_between(every: int) -> None:
    run, found = _Run(_predictor(every)), []
    for prompt in range(12):
        found.append([run((prompt, prompt % 3)) for _ in range(5)])
    assert all(forecast is None for forecast in found[0])
    for forecasts in found[1:]:
        for forecast in forecasts[1:]:
            np.testing.assert_allclose(forecast, forecasts[0], rtol=1e-5)
    firsts = [forecasts[0] for forecasts in found[1:]]
    changes = [not np.allclose(before, after) for before, after in pairwise(firsts)]
    assert changes == [(number + 1) % every == 0 for number in range(10)]


def test_predictions_change_every_p_steps() -> None:
    run = _Run(_predictor(4, "step"))
    found = [run((0, step % 3)) for step in range(14)]
    assert found[0] is None
    changed = [step for step in range(2, 14) if not np.allclose(found[step], found[step - 1])]  # type: ignore[arg-type]
    assert changed == [5, 9, 13]  # the first prediction was made at step 1


def test_tokens_count_for_the_request_and_task_that_they_belong_to() -> None:
    run = _Run(_predictor())
    tasks = {1: "a", 2: "b", 3: "a", 4: "b"}
    for _ in range(200):
        run((2, 2), (1, 0), (2, 2), tasks=tasks)
    run.step += 20  # both have ended
    only_a, only_b = run((3, 0), tasks=tasks), None
    run.step += 20
    only_b = run((4, 0), tasks=tasks)
    assert only_a is not None and only_b is not None
    assert only_a[0].argmax() == 0
    assert only_b[1].argmax() == 2


def test_requests_that_take_turns_still_run() -> None:
    run = _Run(_predictor())
    tasks = {0: "a", 1: "a", 2: "b"}
    for _ in range(20):
        run((0, 0), tasks=tasks)
    for _ in range(100):
        run((2, 2), tasks=tasks)
    for _ in range(6):
        alone, beside = run((1, 0), tasks=tasks), run((2, 2), tasks=tasks)
        assert alone is not None and beside is not None
        np.testing.assert_allclose(alone.sum(), beside.sum(), rtol=1e-5)
        assert alone[0, 2] > 0.2  # request 2 is part of it


def test_choices_of_no_expert_do_not_count() -> None:
    run = _Run(_predictor())
    for _ in range(50):
        run((0, SHAPE.experts + 4), (0, 1))
    found = run((1, 0))
    assert found is not None
    assert found[0].argmax() == 1
    assert found[0].sum() < SHAPE.top_k


def test_passes_without_requests_are_one_prompt() -> None:
    for unit, knows in (("prompt", False), ("step", True)):
        predictor = _predictor(unit=unit)
        for step in range(4):
            passing = Pass(Phase.PREFILL, 3, step)
            predictor.begin(passing)
            for layer in range(SHAPE.layers):
                predictor.observe(layer, Observation(passing, np.full((3, 1), 2)))
        assert (predictor.forecast(1) is not None) == knows


def test_what_it_keeps_is_bounded() -> None:
    predictor = _predictor()
    run = _Run(predictor)
    for number in range(0, 5 * HISTORY, 4):
        for _ in range(2):
            run(*[(number + i, i % 3) for i in range(4)])
    assert len(predictor._prompts) <= HISTORY + 4 * 8


def test_insensitive_layers_are_left_out_for_their_tasks_only() -> None:
    tasks = {0: "a", 1: "b", 2: "a"}
    found = {}
    for skip in (True, False):
        predictor = _predictor(artifact=_artifact(insensitive={"a": [0]}), skip_insensitive=skip)
        run = _Run(predictor)
        run((0, 0), tasks=tasks)
        run.step += 20
        found["b", skip] = run((1, 0), tasks=tasks)
        run.step += 20
        found["a", skip] = run((2, 0), tasks=tasks)
    skipped, kept = found["a", True], found["a", False]
    assert skipped is not None and kept is not None
    assert (skipped[0] == 0).all() and (kept[0] > 0).all()
    np.testing.assert_array_equal(skipped[1], kept[1])
    np.testing.assert_array_equal(found["b", True], found["b", False])


def _trace(requests: int = 8, tokens: int = 12) -> RoutingTrace:
    """Requests that prefer experts of their own kind, which takes turns."""
    generator = np.random.default_rng(3)
    request = np.repeat(np.arange(requests), tokens)
    taste = generator.random((2, *TRACE_SHAPE[:2])) * 6
    noise = generator.gumbel(size=(len(request), *TRACE_SHAPE[:2]))
    experts = np.argsort(-(taste[request % 2] + noise), axis=2)[:, :, : TRACE_SHAPE.top_k]
    meta = {"num_experts": TRACE_SHAPE.experts, "model": "m", "tasks": ["a", "b"] * (requests // 2)}
    return RoutingTrace(experts.astype(np.uint16), request.astype(np.int32), meta)


def _replayed(artifact: Path | None, every: int = 1) -> ReplayResult:
    setting = Setting("periodic", 8, "periodic", every=every, every_unit="prompt", artifact=artifact and str(artifact))
    return replay(Schedule(_trace()), setting, TIMING)


def test_replays_prefetch_nothing_for_insensitive_layers(tmp_path: Path) -> None:
    path, layers = tmp_path / "p.safetensors", range(TRACE_SHAPE.layers)
    issued = []
    for insensitive in ({}, {"a": layers}, {"a": layers, "b": layers}):
        write_artifact(path, _artifact(TRACE_SHAPE, insensitive))
        issued.append(_replayed(path).cache.num_prefetch_issued)
    assert min(issued[:2]) > 0
    assert issued[2] == 0


def test_replays_depend_on_the_period() -> None:
    schedule = Schedule(_trace())
    assert _replayed(None).num_loads != _replayed(None, every=40).num_loads
    made = predictor_of(Setting("periodic", 8, "periodic", every=40, every_unit="prompt"), schedule)
    assert isinstance(made, Periodic) and made.sees_next_pass


def test_the_simulator_predicts_every_40_prompts_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trace(tmp_path / "t.npz", _trace())
    given = ["--trace", str(tmp_path / "t.npz"), "--policy", "periodic", "--slots", "8", "--json"]
    outputs = []
    for more in ([], ["--every", "40", "--every-unit", "prompt"], ["--every", "1"], ["--every-unit", "step"]):
        assert simulate([*given, "--predictor", "periodic", *more]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert '"every": 1, "every_unit": "prompt"' in outputs[2]
    assert '"every": 40, "every_unit": "step"' in outputs[3]
    assert simulate([*given, "--predictor", "previous_token"]) == 0
    assert '"every": 1, "every_unit": "step"' in capsys.readouterr().out


def test_a_profile_that_names_it_predicts_every_40_prompts_unless_it_says() -> None:
    default = Profile.default()
    named = default.with_overrides({"predictor.kind": "periodic"})
    assert (named.predictor.every, named.predictor.every_unit) == (40, "prompt")
    said = named.with_overrides({"predictor.every": 5, "predictor.every_unit": "step"})
    assert (said.predictor.every, said.predictor.every_unit) == (5, "step")
    assert said.with_overrides({"cache.slots": 4}).predictor == said.predictor
    other = named.with_overrides({"predictor.kind": "previous_token"})
    assert (other.predictor.every, other.predictor.every_unit) == (1, "step")
    assert default.with_overrides({"predictor.every": 4}).predictor.every == 4
    with pytest.raises(ProfileError, match="model"):
        default.with_overrides({"predictor.kind": "periodic", "predictor.params": {"model": "xlnet"}})


def test_the_sequence_model_needs_an_artefact() -> None:
    with pytest.raises(UsageError, match="needs an artefact"):
        _predictor(model="sequence")
    spec = PredictorSpec("periodic", params={"model": "sequence"})
    with pytest.raises(UsageError, match="model: frequency"):
        make_predictor(spec, SHAPE)
    make_predictor(replace(spec, params={}), SHAPE)


def _damaged(**params: Any) -> Artifact:
    whole = _artifact()
    return replace(whole, params={**whole.params, **params})


@pytest.mark.parametrize(
    "damaged",
    [
        _damaged(sizes={"hidden": 5, "window": 3}),
        _damaged(sizes={}),
        _damaged(tasks=["a", "b"]),
        _damaged(sensitivity={"a": {}}),
        _damaged(sensitivity={"a": {"insensitive_layers": [SHAPE.layers]}}),
        _damaged(sensitivity=["a"]),
        replace(_artifact(), arrays={name: array[:1] for name, array in _artifact().arrays.items()}),
        replace(_artifact(), arrays={}),
    ],
)
def test_a_damaged_artefact_is_refused_in_one_line(damaged: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"periodic predictor of m is damaged.*harness\.fit") as refused:
        _predictor(artifact=damaged)
    assert "\n" not in str(refused.value)


def test_an_untrained_sequence_model_is_the_frequency_model(tmp_path: Path) -> None:
    write_artifact(tmp_path / "p.safetensors", _artifact())
    artifact = read_artifact(tmp_path / "p.safetensors", kind="periodic", shape=SHAPE)
    found = []
    for predictor in (_predictor(artifact=artifact), _predictor(artifact=artifact, model="frequency"), _predictor()):
        run = _Run(predictor)
        for _ in range(9):
            run((0, 2))
        found.append(run((1, 0)))
    np.testing.assert_array_equal(found[1], found[2])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
