"""The contract of `runtime.predictors.base.Predictor`, over every predictor that there is."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FunctionType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from runtime.cache.coordinator import Coordinator
from runtime.cache.governor import Governor
from runtime.cache.policies import FORESEEING
from runtime.cache.residency import Count, Residency
from runtime.predictors import activation_matrix, routing_path
from runtime.predictors.artifact import Artifact, RoutingShape, read_artifact, write_artifact
from runtime.predictors.base import BEFORE_FIRST_LAYER, Forecast, Observation, Predictor
from runtime.predictors.gate_lookahead import GateLookahead, LookaheadRouter, lookahead_router
from runtime.predictors.make import PredictorSpec, make_predictor
from runtime.predictors.params import LEARNING, PREDICTOR_PARAMS, RoutingPathParams
from runtime.predictors.routing_path import RoutingPath, RoutingPathNetwork, Sizes
from runtime.predictors.sequence import SequencePredictor
from runtime.transfer.simulated import SimulatedTransfer
from runtime.vocabulary import Pass, Phase

SHAPE = RoutingShape(layers=3, experts=6, top_k=2)
HIDDEN = 4


class Router(nn.Module):
    """As transformers' routers are."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        weight = torch.randn(SHAPE.experts, HIDDEN, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden_states @ self.weight.T
        scores, chosen = logits.softmax(-1).topk(SHAPE.top_k)
        return logits, scores, chosen


def _gate_lookahead() -> Predictor:
    found = [lookahead_router(Router(seed), None, HIDDEN) for seed in range(SHAPE.layers)]
    routers = [router for router in found if isinstance(router, LookaheadRouter)]
    assert len(routers) == SHAPE.layers
    return GateLookahead(routers, SHAPE.experts, depth=2)


def _routing_path() -> Predictor:
    sizes = Sizes(hidden=8, feed_forward=8, heads=1, head_size=8, encoder_layers=1, decoder_layers=1, window=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = RoutingPathNetwork(sizes, SHAPE, np.arange(20))
    return RoutingPath(network.artifact("m"), RoutingPathParams(context=8))


def _sequence() -> Predictor:
    layers, experts, _ = SHAPE
    sizes = {"alphas": (2,), "context": (layers, 2 * experts, 4), "layer": (layers, 4), "spread": (layers, 4, experts)}
    sizes |= {"inner": (3, 5), "inner_bias": (5,), "outer": (5, 2), "direct": (3, 2), "bias": (layers, experts, 2)}
    generator = np.random.default_rng(0)
    arrays = {name: generator.normal(scale=0.3, size=size).astype(np.float32) for name, size in sizes.items()}
    arrays["alphas"] = np.array([0.5, 0.05], np.float32)
    return SequencePredictor(Artifact("sequence", "m", SHAPE, {"discount": 0.9}, arrays))


def _made(kind: str, **more: object) -> Callable[[], Predictor]:
    return lambda: make_predictor(PredictorSpec(kind, **more), SHAPE)  # type: ignore[arg-type]


MEMBERS: dict[str, Callable[[], Predictor]] = {
    "none": _made("none"),
    "previous_token": _made("previous_token"),
    "gate_lookahead": _gate_lookahead,
    "activation_matrix": _made("activation_matrix", params={"capacity": 5, "matches": 2}),
    "routing_path": _routing_path,
    "periodic": _made("periodic", every=2, every_unit="prompt"),
    "sequence": _sequence,
}
every_member = pytest.mark.parametrize("kind", MEMBERS)


def test_every_predictor_of_a_profile_is_here() -> None:
    assert MEMBERS.keys() == PREDICTOR_PARAMS.keys()


class Step(NamedTuple):
    """One pass: its phase, how many tokens of which requests, and whether it says so, its token ids and the hidden
    state."""

    phase: Phase
    tokens: tuple[tuple[int, int], ...]
    names: bool = True
    shows: bool = True


PREFILL = st.builds(
    lambda tokens, names, shows: Step(Phase.PREFILL, tuple(tokens.items()), names, shows),
    st.dictionaries(st.integers(0, 9), st.integers(1, 12), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
)
DECODE = st.builds(
    lambda numbers, names, shows: Step(Phase.DECODE, tuple((number, 1) for number in numbers), names, shows),
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
    st.booleans(),
    st.booleans(),
)
STEPS = st.lists(PREFILL | DECODE, min_size=1, max_size=8)


class Seen(NamedTuple):
    """A pass and what each of its layers shows; nothing in it can be changed."""

    passing: Pass
    layers: list[Observation]
    hidden: list[torch.Tensor] | None  # the routers' inputs by layer

    def shown(self, predictor: Predictor, layer: int) -> Observation:
        """A layer as `predictor` observes it, with answers to what it asks."""
        if self.hidden is None:
            return self.layers[layer]
        asked = [tensor.numpy() for tensor in predictor.ask(layer, self.hidden[layer])]
        for answer in asked:
            answer.flags.writeable = False
        return replace(self.layers[layer], answers=lambda: asked)


def _seen(steps: Sequence[Step], seed: int = 0) -> Iterator[Seen]:
    for number, step in enumerate(steps):
        generator = np.random.default_rng([seed, number])
        requests = tuple(request for request, count in step.tokens for _ in range(count))
        passing = Pass(
            step.phase,
            len(requests),
            number,
            token_ids=tuple(generator.integers(0, 25, len(requests)).tolist()) if step.shows else (),
            requests=requests if step.names else (),
            tasks=tuple("ab"[request % 2] for request in requests) if step.names else (),
        )
        layers, hidden = zip(*(_layer(passing, generator) for _ in range(SHAPE.layers)), strict=True)
        yield Seen(passing, list(layers), list(hidden) if step.shows else None)


def _layer(passing: Pass, generator: np.random.Generator) -> tuple[Observation, torch.Tensor]:
    """What a layer chooses, and the input of its router."""
    scores = generator.random((passing.num_tokens, SHAPE.experts))
    experts: npt.NDArray[np.int64] = np.argsort(scores, axis=1)[:, : SHAPE.top_k]
    experts.flags.writeable = False
    hidden = torch.from_numpy(generator.normal(size=(passing.num_tokens, HIDDEN)).astype(np.float32))
    return Observation(passing, experts), hidden


def _walk(predictor: Predictor, seen: Seen, *, observed: bool = True) -> Iterator[Forecast | None]:
    """A pass as the coordinator makes it: the forecasts before the first layer and after each."""
    predictor.begin(seen.passing)
    yield predictor.forecast(BEFORE_FIRST_LAYER)
    for layer in range(len(seen.layers)):
        if observed:
            predictor.observe(layer, seen.shown(predictor, layer))
        yield predictor.forecast(layer)


def _forecasts(predictor: Predictor, steps: Sequence[Step]) -> list[list[float] | None]:
    found = itertools.chain.from_iterable(_walk(predictor, seen) for seen in _seen(steps))
    return [None if forecast is None else forecast.tolist() for forecast in found]


def _check(forecast: Forecast | None, layer: int, num_tokens: int, sees_next_pass: bool) -> None:
    """Tokens of this pass after `layer`, of the next one in the other rows."""
    if forecast is None:
        return
    assert forecast.dtype == np.float32 and forecast.shape == SHAPE[:2]
    meant = forecast[0 if sees_next_pass else layer + 1 :]
    assert np.isfinite(meant).all() and (meant >= 0).all()
    ahead = forecast[layer + 1 :]
    assert (ahead <= num_tokens * 1.001).all()
    assert (ahead.sum(axis=1) <= SHAPE.top_k * num_tokens * 1.001).all()


@every_member
@settings(deadline=None, max_examples=25)
@given(STEPS, st.integers(0, 99))
def test_forecasts_are_expected_tokens(kind: str, steps: list[Step], skipped: int) -> None:
    """Where a pass shows nothing, or is not observed, those of a pass before may still hold."""
    predictor, num_tokens = MEMBERS[kind](), 0
    for number, seen in enumerate(_seen(steps)):
        observed = bool(skipped >> number & 1)
        is_fresh = observed and steps[number].shows
        num_tokens = seen.passing.num_tokens if is_fresh else max(num_tokens, seen.passing.num_tokens)
        walk = _walk(predictor, seen, observed=observed)
        for layer, forecast in enumerate(walk, start=BEFORE_FIRST_LAYER):
            _check(forecast, layer, num_tokens, predictor.sees_next_pass)


@every_member
@settings(deadline=None, max_examples=10)
@given(STEPS)
def test_forecasts_are_deterministic(kind: str, steps: list[Step]) -> None:
    assert _forecasts(MEMBERS[kind](), steps) == _forecasts(MEMBERS[kind](), steps)


@every_member
def test_a_choice_of_no_expert_leaves_no_trace(kind: str) -> None:
    """Whichever index past the last expert stands for it."""
    found = []
    for none in (SHAPE.experts, SHAPE.experts + 3):
        predictor, forecasts = MEMBERS[kind](), []
        for seen in _seen([Step(Phase.DECODE, ((turn // 8, 1), (99, 1))) for turn in range(90)]):
            first = seen.layers[0].experts.copy()
            first[0, 1] = none
            changed = seen._replace(layers=[replace(seen.layers[0], experts=first), *seen.layers[1:]])
            forecasts += [of if of is None else of.tolist() for of in _walk(predictor, changed)]
        found.append(forecasts)
    assert found[0] == found[1]


@every_member
@settings(deadline=None, max_examples=10)
@given(STEPS, st.integers(0, SHAPE.layers - 1), STEPS)
def test_a_pass_may_fail_half_way(kind: str, before: list[Step], layers: int, after: list[Step]) -> None:
    predictor = MEMBERS[kind]()
    for seen in _seen(before):
        list(itertools.islice(_walk(predictor, seen), 1 + layers))
    most = max(seen.passing.num_tokens for seen in _seen(before + after))
    for seen in _seen(after, seed=1):
        for layer, forecast in enumerate(_walk(predictor, seen), start=BEFORE_FIRST_LAYER):
            _check(forecast, layer, most, predictor.sees_next_pass)


class _Pickler(pickle.Pickler):
    """Leaves functions out."""

    def reducer_override(self, value: object) -> object:
        return (str, ()) if isinstance(value, FunctionType) else NotImplemented


def _size(predictor: Predictor) -> int:
    file = io.BytesIO()
    _Pickler(file).dump(predictor)
    return len(file.getvalue())


@every_member
def test_what_it_keeps_is_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_matrix, "_MAX_REQUESTS", 20)
    monkeypatch.setattr(routing_path, "_MAX_REQUESTS", 20)
    monkeypatch.setattr(routing_path, "_MAX_MEMORIES", 3)
    requests = [[Step(Phase.PREFILL, ((r, 20),)), Step(Phase.DECODE, ((r, 1), (-1, 1)))] for r in range(300)]
    predictor, sizes = MEMBERS[kind](), []
    for seen in _seen([step for steps in requests for step in steps]):
        list(_walk(predictor, seen))
        if seen.passing.step % 10 < 2:
            sizes.append(_size(predictor))
    assert max(sizes[60:]) <= 1.02 * max(sizes[:60])


@every_member
@settings(deadline=None, max_examples=10)
@given(STEPS)
def test_what_it_has_learned_can_be_kept(
    kind: str, tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    predictor, path = MEMBERS[kind](), tmp_path_factory.getbasetemp() / "learned.safetensors"
    _forecasts(predictor, steps)
    learned = predictor.artifact("m")
    assert (learned is not None) == (kind in LEARNING)
    if learned is None:
        return
    write_artifact(path, learned)
    read = read_artifact(path, kind=kind, shape=SHAPE, model="m")
    again = make_predictor(PredictorSpec(kind, path, {"capacity": 5}, model="m"), SHAPE).artifact("m")
    assert again is not None and again.arrays.keys() == learned.arrays.keys() == read.arrays.keys()
    for name, array in learned.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


@every_member
@pytest.mark.parametrize("policy", sorted({"next_use", *FORESEEING}))
def test_the_coordinator_serves_every_demand_with_it(kind: str, policy: str) -> None:
    predictor, transfer = MEMBERS[kind](), SimulatedTransfer(load_s=1.0)
    residency = Residency(*SHAPE[:2], 7, SHAPE.top_k, policy)
    coordinator = Coordinator(residency, transfer, predictor, governor=Governor(2), prefetch_count=2, predict_every=2)
    steps = [Step(Phase.PREFILL, ((number, 3),)) for number in range(4)]
    steps += [Step(Phase.DECODE, ((turn // 8, 1), (99, 1))) for turn in range(90)]
    for seen in _seen(steps):
        coordinator.begin(seen.passing)
        for layer in range(len(seen.layers)):
            observation = seen.shown(predictor, layer)
            demand, tokens = np.unique(observation.experts + layer * SHAPE.experts, return_counts=True)
            transfer.advance(0.5)
            served = coordinator.serve(layer, demand.tolist(), tokens.tolist(), observation)
            assert sorted(itertools.chain.from_iterable(served)) == demand.tolist()
            residency.check_integrity()
    assert (residency.counts()[Count.PREFETCH_ISSUED] > 0) == (kind != "none")
