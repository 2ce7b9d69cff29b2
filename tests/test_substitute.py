"""Lossy substitution: who goes where and with what weight, what is left alone, and how experts come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from families import FAMILIES, Family, realign
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EXPERTS, LAYERS, TOP_K, save_tiny
from torch import nn

import runtime
from runtime.cache.coordinator import Coordinator
from runtime.cache.governor import Governor
from runtime.cache.residency import Count, Residency
from runtime.engine import Engine
from runtime.errors import UnsupportedModelError
from runtime.experts import Routed
from runtime.predictors.base import Forecast, NoPredictor, Observation, Predictor
from runtime.profile import Evidence, Profile
from runtime.substitute import RouterAnswer, Substitution, Weighing, substituted, weighing_of
from runtime.transfer.simulated import SimulatedTransfer
from runtime.vocabulary import Pass, Phase

LOSSY, ALWAYS = {"numerics": "lossy.substitute"}, {"numerics": "lossy.substitute_always"}
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def _generate(engine: Engine, new_tokens: int = 12) -> torch.Tensor:
    """Logits of the new tokens, [tokens, vocabulary]."""
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    made = engine.model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), **options, output_logits=True, return_dict_in_generate=True
    )
    return torch.cat(made.logits)


def test_the_best_present_experts_take_the_places_of_absent_ones() -> None:
    logits = np.array([[9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]], np.float32)
    present = np.array([False, True, False, True, True, False])
    choice = np.array([[0, 1, 2], [1, 3, 4], [5, 4, 3], [0, 2, 5]])
    expected = [[3, 1, 4], [1, 3, 4], [1, 4, 3], [1, 3, 4]]
    assert substituted(choice, logits, present).tolist() == expected
    assert choice[0].tolist() == [0, 1, 2], "the router's own choice is left alone"


_SCORES: dict[str, Any] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}


def _route(
    logits: torch.Tensor, score: str, scale: float, dtype: torch.dtype, *, normalised: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and choice of three experts, as transformers' routers make them."""
    weights, index = _SCORES[score](logits.float()).topk(3)
    weights = scale * (weights / weights.sum(-1, keepdim=True) if normalised else weights)
    return weights.to(dtype), index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("score", _SCORES)
def test_a_substitute_weighs_what_the_router_would_have_given_it(
    score: str, normalised: bool, dtype: torch.dtype
) -> None:
    logits = 2 * torch.randn(50, 12, generator=torch.Generator().manual_seed(3)).to(dtype)
    weights, index = _route(logits, score, 2.5, dtype, normalised=normalised)
    found = weighing_of(logits, weights, index)
    assert found is not None and found.is_normalised == normalised
    present = torch.arange(12) % 3 != 0
    other = torch.from_numpy(substituted(index.numpy(), logits.float().numpy(), present.numpy()))
    # A router that knows of no absent expert: those of softmax, which sees all experts, still divide by all of them.
    masked = _SCORES[score](logits.float()).masked_fill(~present, 0.0)
    expected, chosen = masked.topk(3)
    expected = 2.5 * (expected / expected.sum(-1, keepdim=True) if normalised else expected)
    order = other.argsort(-1), chosen.argsort(-1)
    assert torch.equal(other.gather(1, order[0]), chosen.gather(1, order[1]))
    new = found.reweigh(logits, weights, index, other)
    assert new.dtype == dtype
    torch.testing.assert_close(
        new.gather(1, order[0]).float(),
        expected.gather(1, order[1]),
        rtol=1e-4 if dtype == torch.float32 else 0.03,
        atol=0,
    )


def test_substitutes_far_below_the_absent_experts_still_share_their_weight() -> None:
    logits = torch.tensor([[200.0, 199.0, 1.0, 0.0]])
    weighing = Weighing(_SCORES["softmax"], is_normalised=True)
    weights = weighing.reweigh(logits, torch.tensor([[0.7, 0.3]]), torch.tensor([[0, 1]]), torch.tensor([[2, 3]]))
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0]]).add(torch.tensor([[-1.0, 1.0]]) / (1 + np.e)))


def test_an_unknown_rule_is_not_taken_for_a_known_one() -> None:
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    assert weighing_of(logits, torch.rand(20, 2, generator=torch.Generator().manual_seed(1)), logits.topk(2)[1]) is None


class _Router(nn.Module):
    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights, index = logits.softmax(-1).topk(2)
        return logits, weights, index


def _substitution(residency: Residency, weighing: Weighing | None) -> tuple[Substitution, _Router]:
    router = _Router()
    return Substitution(residency, 0, RouterAnswer(router), weighing, lambda: True), router


def _load(residency: Residency, layer: int, experts: list[int]) -> None:
    ids = [layer * residency.num_experts + expert for expert in experts]
    plan = residency.plan(layer, ids, [1] * len(ids), 1)
    residency.complete(ids)
    residency.release([*plan.hits, *plan.awaited])


def test_without_a_known_rule_the_weight_of_the_place_stays() -> None:
    residency = Residency(1, 4, 2, 2, "lru")
    _load(residency, 0, [1, 3])
    substitution, router = _substitution(residency, None)
    _, weights, index = router(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    routed = substitution(Routed(index, weights, index.numpy()), substitution.ask())
    assert routed.index.tolist() == routed.choice.tolist() == [[3, 1]] and routed.weights is weights
    assert substitution.routed.tolist() == [[0, 1]]
    assert residency.counts()[Count.SUBSTITUTED] == 1


def test_free_slots_are_filled_first_by_the_experts_of_most_tokens() -> None:
    residency = Residency(1, 6, 3, 2, "lru")
    _load(residency, 0, [4, 5])
    substitution, router = _substitution(residency, None)
    logits = torch.tensor([[9.0, 8, 0, 0, 2, 1], [8, 0, 9, 0, 2, 1], [9.0, 0, 0, 8, 2, 1]])
    _, weights, index = router(logits)
    routed = substitution(Routed(index, weights, index.numpy()), substitution.ask())
    assert routed.index.tolist() == [[0, 4], [4, 0], [0, 4]], "expert 0, which three tokens chose, has the free slot"
    assert residency.counts()[Count.SUBSTITUTED] == 3


def test_a_layer_with_too_few_residents_loads_as_usual() -> None:
    residency = Residency(2, 4, 2, 2, "lru")
    _load(residency, 1, [0])
    _load(residency, 0, [3])
    substitution, router = _substitution(residency, None)
    _, weights, index = router(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    routed = Routed(index, weights, index.numpy())
    assert substitution(routed, substitution.ask()) is routed
    assert residency.counts()[Count.SUBSTITUTED] == 0


def test_with_every_expert_resident_nothing_changes_to_the_bit(checkpoint: Path) -> None:
    with runtime.load_reference(checkpoint) as reference:
        expected = _generate(reference)
    for numerics in (LOSSY, ALWAYS):
        with runtime.load(checkpoint, overrides=numerics) as engine:
            assert torch.equal(_generate(engine), expected)
            assert engine.stats().cache.num_substituted == 0


def test_with_fewer_slots_than_a_token_needs_nothing_can_be_substituted(checkpoint: Path) -> None:
    with runtime.load_reference(checkpoint) as reference:
        expected = _generate(reference)
    with runtime.load(checkpoint, overrides={**ALWAYS, "cache.slots": TOP_K - 1}) as engine:
        assert torch.equal(_generate(engine), expected)


class _Watch:
    """Recomputes every reroute of an engine of one pool, from its routers' answers and the slots as they are."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.residency = engine, engine._pools[0].coordinator.residency
        self.num_substituted = self.num_left_alone = 0
        self.phases: set[Phase] = set()
        self._answers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer, block in enumerate(engine.model.model.layers):
            block.mlp.gate.register_forward_hook(
                lambda module, args, answer, layer=layer: self._answers.__setitem__(layer, (answer[0], answer[2]))
            )
        engine.observe_routing(self._check)

    def _check(self, layer: int, choice: npt.NDArray[np.int64], weights: torch.Tensor) -> None:
        logits, routed = self._answers[layer]
        present = self._present(layer, routed)
        own_weights = logits.float().softmax(-1).gather(1, torch.from_numpy(choice))
        torch.testing.assert_close(weights.float(), own_weights, atol=0, rtol=0.02)
        for token, (own, found) in enumerate(zip(routed.tolist(), choice.tolist(), strict=True)):
            if found != own:
                assert len(present) >= TOP_K
                assert set(found) <= present and len(set(found)) == TOP_K
                assert found == self._by_hand(own, logits[token].tolist(), present)
                self.num_substituted += sum(a != b for a, b in zip(own, found, strict=True))
                self.phases.add(self.engine.passes.current.phase)
            elif not set(own) <= present and self.engine.passes.current.phase is Phase.DECODE:
                self.num_left_alone += 1

    def _present(self, layer: int, routed: torch.Tensor) -> set[int]:
        """The residents, and the missing ones of most tokens for free slots."""
        present = set(np.flatnonzero(self.residency.present(layer)).tolist())
        missing = [expert for expert in routed.flatten().tolist() if expert not in present]
        most = sorted(set(missing), key=lambda expert: (-missing.count(expert), expert))
        return present | set(most[: self.residency.num_free])

    def _by_hand(self, own: list[int], logits: list[float], present: set[int]) -> list[int]:
        found = list(own)
        for rank, expert in enumerate(own):
            if expert not in present:
                found[rank] = max(present - set(found), key=lambda other: (logits[other], -other))
        return found


@pytest.mark.parametrize("slots", [9, 12, 18])
@pytest.mark.parametrize("numerics", [LOSSY, ALWAYS], ids=["decode", "always"])
def test_no_substituted_token_uses_an_absent_expert(checkpoint: Path, numerics: dict[str, str], slots: int) -> None:
    overrides = {**numerics, "cache.slots": slots, "predictor.kind": "previous_token", "prefetch.depth": 0}
    with runtime.load(checkpoint, overrides=overrides) as engine:
        watch = _Watch(engine)
        for _ in range(3):
            _generate(engine)
        assert watch.num_substituted == engine.stats().cache.num_substituted > 0
        phases = {Phase.DECODE} if numerics is LOSSY else {Phase.PREFILL, Phase.DECODE}
        assert watch.phases == phases
        assert f"substituted {watch.num_substituted}" in engine.stats().summary()
        engine.check_integrity()
        engine.reset_stats()
        assert engine.stats().cache.num_substituted == 0


def test_misses_of_decode_steps_are_not_loaded(checkpoint: Path) -> None:
    with runtime.load(checkpoint, overrides={**LOSSY, "cache.slots": 12, "predictor.kind": "none"}) as engine:
        watch = _Watch(engine)
        _generate(engine, 1)
        residents = watch.residency.resident()
        assert min(watch.residency.present(layer).sum() for layer in range(LAYERS)) >= TOP_K
        engine.reset_stats()
        decoded = _generate(engine, 12)
        assert len(decoded) == 12 and watch.num_substituted > 0 == watch.num_left_alone
        prefill = engine.stats().cache.num_layer_steps // 12
        assert engine.stats().cache.num_misses <= prefill * EXPERTS, "all of them in the prefill"
        assert len(residents) == len(watch.residency.resident())


def test_prefills_are_exact_unless_asked_otherwise(checkpoint: Path) -> None:
    with runtime.load_reference(checkpoint) as reference:
        expected = _generate(reference, 1)
    for numerics, is_exact in ((LOSSY, True), (ALWAYS, False)):
        with runtime.load(checkpoint, overrides={**numerics, "cache.slots": 9, "predictor.kind": "none"}) as engine:
            _generate(engine, 4)
            assert torch.equal(_generate(engine, 1), expected) == is_exact


def test_what_was_missed_comes_in_by_the_forecast(checkpoint: Path) -> None:
    overrides = {**LOSSY, "cache.slots": 12, "predictor.kind": "previous_token", "prefetch.depth": 0}
    with runtime.load(checkpoint, overrides=overrides) as engine:
        routed: dict[int, list[int]] = {}
        for layer, block in enumerate(engine.model.model.layers):
            block.mlp.gate.register_forward_hook(
                lambda module, args, answer, layer=layer: routed.__setitem__(layer, answer[2][-1].tolist())
            )
        residency, seen = engine._pools[0].coordinator.residency, []

        def begin(passing: Pass) -> None:
            if passing.phase is Phase.DECODE and routed:
                seen.append(all(residency.present(layer)[chosen].all() for layer, chosen in routed.items()))

        engine.on_pass(begin)
        _generate(engine)
        assert engine.stats().cache.num_substituted > 0
        assert seen[1:] and all(seen[1:]), "what routers chose in a decode step, not what became of it, is there next"


class _Fixed(Predictor):
    def __init__(self, forecast: Forecast) -> None:
        self.rows = forecast

    def observe(self, layer: int, observation: Observation) -> None:
        """Nothing to learn."""

    def forecast(self, layer: int) -> Forecast:
        return self.rows


def _coordinator(slots: int, predictor: Predictor) -> Coordinator:
    residency = Residency(3, 4, slots, 1, "lru")
    transfer = SimulatedTransfer(load_s=1.0)
    return Coordinator(residency, transfer, predictor, governor=Governor(0), prefetch_count=1, refreshes=True)


def test_a_refresh_keeps_the_most_expected_experts_and_some_of_every_layer() -> None:
    forecast = np.array([[5, 4, 3, 2], [1, 9, 8, 7], [0.5, 0.2, 0.1, 0]], np.float32)
    coordinator = _coordinator(6, _Fixed(forecast))
    coordinator.begin(Pass(Phase.DECODE, 1, 0))
    # One of each layer, then 9 8 7 5 4: expert 8 of the last layer stays although 3 of the first is expected more.
    assert sorted(coordinator.residency.resident()) == [0, 1, 5, 6, 7, 8]
    assert coordinator.residency.resident() == [0, 1, 5, 6, 7, 8], "loaded in the order of execution"
    coordinator.begin(Pass(Phase.DECODE, 1, 1))
    assert coordinator.residency.counts()[Count.PREFETCH_ISSUED] == 6, "what is there is not loaded again"
    forecast[0] = [0, 0, 4, 5]
    coordinator.begin(Pass(Phase.DECODE, 1, 2))
    assert sorted(coordinator.residency.resident()) == [2, 3, 5, 6, 7, 8]


def test_a_layer_of_which_nothing_is_forecast_keeps_what_it_has() -> None:
    forecast = np.zeros((3, 4), np.float32)
    forecast[0] = [4, 3, 2, 1]
    coordinator = _coordinator(5, _Fixed(forecast))
    _load(coordinator.residency, 1, [2])
    _load(coordinator.residency, 2, [3])
    coordinator.begin(Pass(Phase.DECODE, 1, 0))
    assert sorted(coordinator.residency.resident()) == [0, 1, 2, 6, 11]


def test_without_a_forecast_residency_stays() -> None:
    coordinator = _coordinator(4, NoPredictor())
    _load(coordinator.residency, 0, [1, 2])
    coordinator.begin(Pass(Phase.DECODE, 1, 0))
    assert coordinator.residency.resident() == [1, 2]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), slots=st.integers(1, 12))
def test_refreshes_leave_exactly_the_wanted_experts(data: st.DataObject, slots: int) -> None:
    residency = Residency(3, 4, slots, 1, "next_use")
    for _ in range(3):
        order = data.draw(st.permutations(range(1, 13)))
        forecast = np.array(order, np.float32).reshape(3, 4)
        residency.plan_refresh(forecast)
        residency.check_integrity()
        best = {layer * 4 + int(forecast[layer].argmax()) for layer in range(3)}
        by_forecast = sorted(range(12), key=lambda expert: (expert not in best, -forecast.flat[expert]))
        assert set(residency.resident()) == set(by_forecast[:slots])


def test_periodic_prediction_says_what_is_resident(checkpoint: Path) -> None:
    overrides = {
        **ALWAYS,
        "cache.slots": 12,
        "cache.policy": "periodic",
        "predictor.kind": "periodic",
        "predictor.every": 2,
        "predictor.every_unit": "prompt",
        "predictor.params": {"model": "frequency"},
        "prefetch.depth": 0,
    }
    with runtime.load(checkpoint, overrides=overrides) as engine:
        (pool,) = engine._pools
        for _ in range(3):
            _generate(engine, 4)
        forecast = pool.coordinator.predictor.forecast(-1)
        assert forecast is not None
        kept = np.stack([pool.coordinator.residency.present(layer) for layer in range(LAYERS)])
        rank = (-forecast).argsort(axis=1).argsort(axis=1)
        best = np.lexsort((-forecast.ravel(), rank.ravel() >= TOP_K))[:12]
        assert sorted(forecast[kept]) == sorted(forecast.ravel()[best]), "but for experts that are expected alike"


def _family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in FAMILIES if f.representative])
def test_families_substitute_or_are_refused_by_name(family: Family, tmp_path: Path) -> None:
    model = family.build(torch.float32)
    model.save_pretrained(tmp_path)
    overrides = {**ALWAYS, "cache.slots": "60%", "predictor.kind": "previous_token", "prefetch.depth": 0}
    try:
        engine = runtime.load(tmp_path, overrides=overrides)
    except UnsupportedModelError as error:
        assert str(error).startswith(f"numerics lossy.substitute_always cannot be had for {model.config.model_type}: ")
        assert str(error).endswith("set numerics: exact")
        return
    with engine, torch.inference_mode():
        realign(engine.model)
        choices: list[npt.NDArray[np.int64]] = []
        engine.observe_routing(lambda layer, choice, weights: choices.append(choice))
        for _ in range(2):
            output = engine.model(**family.inputs())
        assert all(len(set(row)) == len(row) for choice in choices for row in choice.tolist())
        assert torch.isfinite(output.logits if hasattr(output, "logits") else output.last_hidden_state).all()
        assert engine.stats().cache.num_substituted > 0
        engine.check_integrity()


def test_a_family_without_such_a_router_is_refused(tmp_path: Path) -> None:
    _family("minimax_m2").build(torch.float32).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"minimax_m2: router MiniMaxM2TopKRouter needs .*numerics: exact"):
        runtime.load(tmp_path, overrides=LOSSY)
    runtime.load(tmp_path).close()


def test_loading_says_that_results_differ_and_by_how_much(checkpoint: Path) -> None:
    with runtime.load(checkpoint) as engine:
        assert not any("numerics" in note for note in engine.notes)
    with runtime.load(checkpoint, overrides=LOSSY) as engine:
        (note,) = (note for note in engine.notes if "numerics" in note)
        assert "results differ" in note and "harness.quality" in note
    measured = Profile.default().model_copy(
        update={"numerics": "lossy.substitute", "evidence": Evidence(kl_nats=0.0123)}
    )
    with runtime.load(measured, checkpoint) as engine:
        (note,) = (note for note in engine.notes if "numerics" in note)
        assert "0.0123 nats" in note
