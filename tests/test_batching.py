"""Continuous batching: the same numbers as without offloading, real text in a replay, and requests that do not fit,
end early, come late or are given up."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from families import FAMILIES, Family, realign
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EXPERTS, LAYERS, TOP_K, VOCABULARY, save_tiny
from transformers import ContinuousBatchingConfig

import runtime
from harness.measure.equality import MOST_MARGIN, first_difference, generate_alone
from runtime import batching, machine, serving
from runtime.errors import BudgetError, PromptError, TransferError, UnsupportedModelError
from runtime.facts import describe
from runtime.predictors.artifact import RoutingShape, write_artifact
from runtime.predictors.routing_path import RoutingPath, RoutingPathNetwork, Sizes
from runtime.profile import Profile
from runtime.prompts import PromptRequest, RequestResult
from runtime.schedulers.base import Request, Route, Scheduler
from runtime.schedulers.fifo import Fifo
from runtime.schedulers.make import build_scheduler
from runtime.schedulers.route_overlap import RouteOverlap
from runtime.serving import run_batch
from runtime.vocabulary import Pass, Phase

KINDS = [("fifo", 3, 1), ("fifo", 2, 2), ("route_overlap", 2, 2), ("deadline", 2, 2)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Iterator[runtime.Engine]:
    with runtime.load_reference(checkpoint) as engine:
        yield engine


def _text(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, length]).integers(1, len(VOCABULARY), length).tolist())


REQUESTS = [PromptRequest(f"r{i}", _text(3 + 4 * i), 14 - 2 * i, task=f"t{i % 2}") for i in range(5)]
REPLAYS = [PromptRequest(f"r{i}", _text(4 + 3 * i), output_ids=_text(9 - 2 * i, 1)) for i in range(4)]


def _scheduler(kind: str, group: int, window: int) -> Scheduler:
    keys = {"scheduler.kind": kind, "scheduler.group": group, "scheduler.window": window}
    return build_scheduler(Profile.default().with_overrides(keys))


def _run_with_logits(engine: runtime.Engine, kind: tuple[str, int, int]) -> tuple[serving.BatchResult, list[Any]]:
    logits: list[torch.Tensor] = []
    hook = engine.model.register_forward_hook(lambda module, args, output: logits.append(output.logits.clone()))
    result = run_batch(engine, REQUESTS, _scheduler(*kind))
    hook.remove()
    return result, logits[-result.num_passes :]  # the first ones may have been to see whether it can be batched


def _passes_of(engine: runtime.Engine) -> list[Pass]:
    """What its passes hold, from now on."""
    passes: list[Pass] = []
    engine.on_pass(passes.append)
    return passes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_logits_are_those_of_the_resident_model(
    tmp_path: Path, kind: tuple[str, int, int], dtype: torch.dtype
) -> None:
    save_tiny(tmp_path, dtype=dtype)
    overrides = {"cache.slots": 5, "compute.decode": "gemv", "predictor.kind": "previous_token", "prefetch.depth": 1}
    with runtime.load_reference(tmp_path, overrides=overrides) as resident:
        realign(resident.model)
        expected, expected_logits = _run_with_logits(resident, kind)
    with runtime.load(tmp_path, overrides=overrides) as engine:
        realign(engine.model)
        result, logits = _run_with_logits(engine, kind)
        engine.check_integrity()
    assert [r.token_ids for r in result.requests] == [r.token_ids for r in expected.requests]
    assert len(logits) == len(expected_logits) == result.num_passes
    assert all(torch.equal(one, other) for one, other in zip(logits, expected_logits, strict=True))


def _family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek_v3", "index_copy_"),  # keys and values of different width
        ("qwen3_next", "Invalid (layer|group) type: linear_attention"),
        ("qwen3_omni_moe", r"its logits differ by \d+%"),  # computed without an error, and wrongly
    ],
)
def test_a_family_that_cannot_be_batched_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    _family(name).build(torch.float32).save_pretrained(tmp_path)
    with runtime.load(tmp_path, overrides={"cache.slots": "50%"}) as engine:
        passes = _passes_of(engine)
        with pytest.raises(UnsupportedModelError, match=f"continuous batching does not serve {name}.*: {reason}"):
            run_batch(engine, [PromptRequest("a", (20, 21, 22), 3)], Fifo(1))
        assert passes == [] and engine.stats().cache.num_lookups == 0
        engine.model(torch.tensor([[20, 21, 22]]))
        assert engine.stats().cache.num_lookups > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family.mode == "generate"], ids=lambda f: f.name)
def test_every_family_is_exact_or_refused(family: Family, tmp_path: Path) -> None:
    family.build(torch.float32).save_pretrained(tmp_path)
    texts = [
        torch.randint(16, 60, (15 + 4 * i,), generator=torch.Generator().manual_seed(i)).tolist() for i in (0, 1, 2)
    ]
    replays = [PromptRequest(str(i), tuple(t[:-7]), output_ids=tuple(t[-7:])) for i, t in enumerate(texts)]
    found = []
    for load in (runtime.load_reference, runtime.load):
        with load(tmp_path, overrides={"cache.slots": "50%"}) as engine:
            realign(engine.model)
            logits: list[torch.Tensor] = []
            try:
                run_batch(engine, replays[:1], Fifo(1))
            except UnsupportedModelError:
                assert family.name not in ("gpt_oss", "mixtral", "olmoe", "qwen3_moe", "glm4_moe", "gemma4")
                return
            engine.model.register_forward_hook(lambda module, args, output, to=logits: to.append(output.logits.clone()))
            result = run_batch(engine, replays, Fifo(2, 2))
            for request, served in zip(replays, result.requests, strict=True):
                assert first_difference_of_replay(engine, request, served.predicted_ids) <= 1e-4
            found.append(logits[: result.num_passes])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_first_differences_are_found(reference: runtime.Engine) -> None:
    request = REQUESTS[0]
    with torch.inference_mode():
        best = reference.model(torch.tensor([request.prompt_ids])).logits[0, -1].topk(2)
    found = first_difference(reference.model, request, (int(best.indices[0]), 3), (int(best.indices[1]), 3))
    assert found is not None and (found.request, found.position) == (request.id, 0)
    assert found.margin == pytest.approx(float(best.values[0] - best.values[1]), rel=1e-5)
    assert first_difference(reference.model, request, (1, 2), (1, 2)) is None
    shorter = first_difference(reference.model, request, (1, 2), (1,))
    assert shorter is not None and shorter.position == 1


@pytest.mark.parametrize("kind", KINDS)
def test_batched_requests_are_those_of_generate_one_by_one(
    reference: runtime.Engine, kind: tuple[str, int, int]
) -> None:
    for request, result in zip(REQUESTS, run_batch(reference, REQUESTS, _scheduler(*kind)).requests, strict=True):
        alone = generate_alone(reference, request)
        assert (result.id, result.task, result.num_tokens) == (request.id, request.task, request.max_new_tokens)
        found = first_difference(reference.model, request, alone, result.token_ids)
        assert found is None or found.margin <= MOST_MARGIN, f"differs: {found}"


def _predictions(engine: runtime.Engine, request: PromptRequest) -> tuple[int, ...]:
    """The likeliest token at each step of a replay, from one forward pass over its whole text."""
    assert request.output_ids is not None
    text = torch.tensor([[*request.prompt_ids, *request.output_ids]])
    with torch.inference_mode():
        logits = engine.model(text).logits[0]
    return tuple(logits[len(request.prompt_ids) - 1 : -1].argmax(-1).tolist())


def test_a_replay_feeds_the_real_tokens_and_reports_the_predicted_ones(checkpoint: Path) -> None:
    with runtime.load(checkpoint, overrides={"cache.slots": 7}) as engine:
        passes = _passes_of(engine)
        result = run_batch(engine, REPLAYS[:2], Fifo(2))
        fed: dict[int, list[int]] = {}
        for passing in passes:
            for number, token in zip(passing.requests, passing.token_ids, strict=True):
                fed.setdefault(number, []).append(token)
        for number, (request, found) in enumerate(zip(REPLAYS, result.requests, strict=False)):
            assert request.output_ids is not None
            assert fed[number] == [*request.prompt_ids, *request.output_ids[:-1]]
            assert found.token_ids == request.output_ids
            assert found.predicted_ids == _predictions(engine, request) != request.output_ids


def test_passes_say_whose_tokens_they_hold(checkpoint: Path) -> None:
    with runtime.load(checkpoint) as engine:
        passes = _passes_of(engine)
        engine.start_trace()
        first = run_batch(engine, REQUESTS, Fifo(2, 2))
        run_batch(engine, REQUESTS[:1], Fifo(1))
        trace = engine.trace()
    prompts = [passing for passing in passes if passing.phase is Phase.PREFILL]
    assert [set(passing.requests) for passing in prompts] == [{0}, {1}, {2}, {3}, {4}, {5}]
    assert prompts[3].tasks == ("t1",) * len(REQUESTS[3].prompt_ids) and prompts[5].requests == (5, 5, 5)
    decodes = [passing for passing in passes if passing.phase is Phase.DECODE]
    assert [passing.requests for passing in decodes[:3]] == [(0, 1), (2, 3), (0, 1)]
    assert all(len(set(passing.requests)) == passing.num_tokens == len(passing.tasks) for passing in decodes)
    assert first.num_decode_passes == len([passing for passing in decodes if 5 not in passing.requests])
    assert [trace.task(number) for number in range(5)] == [request.task for request in REQUESTS]
    assert np.bincount(trace.request).tolist() == [request.max_tokens for request in [*REQUESTS, REQUESTS[0]]]


def test_distinct_experts_are_those_of_the_decode_passes(checkpoint: Path) -> None:
    with runtime.load(checkpoint) as engine:
        engine.start_trace()
        result = run_batch(engine, REQUESTS, Fifo(3))
        trace = engine.trace()
    assert trace.step is not None and trace.phase is not None
    steps = {int(step) for step in trace.step[trace.phase == Phase.DECODE]}
    counts = [len(np.unique(trace.experts[trace.step == step, layer])) for step in steps for layer in range(LAYERS)]
    assert result.distinct_experts == pytest.approx(np.mean(counts))
    assert result.decode_batch == pytest.approx(float((trace.phase == Phase.DECODE).sum()) / len(steps))


def test_long_prompts_are_computed_in_parts(
    checkpoint: Path, reference: runtime.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_batch(reference, REPLAYS, Fifo(2, 2))
    monkeypatch.setattr(batching, "MASK_BYTES", 2000)
    with runtime.load(checkpoint, overrides={"cache.slots": 5}) as engine:
        passes = _passes_of(engine)
        parts = run_batch(engine, REPLAYS, Fifo(2, 2))
    assert max(passing.num_tokens for passing in passes) < len(REPLAYS[-1].prompt_ids)
    assert parts.num_passes > whole.num_passes
    assert [r.predicted_ids for r in parts.requests] == [r.predicted_ids for r in whole.requests]


def test_a_full_kv_cache_delays_requests_and_changes_nothing(checkpoint: Path, reference: runtime.Engine) -> None:
    requests = [PromptRequest(f"r{i}", _text(10 + i), output_ids=_text(40, i)) for i in range(4)]
    roomy = run_batch(reference, requests, Fifo(2, 2))
    with runtime.load(checkpoint, overrides={"cache.slots": 5}) as engine:
        passes = _passes_of(engine)
        tight = run_batch(engine, requests, Fifo(2, 2), max_kv_tokens=96)
    prompts = [passing for passing in passes if passing.phase is Phase.PREFILL]
    assert len(prompts) > len(requests), "no request was computed again"
    assert [r.predicted_ids for r in tight.requests] == [r.predicted_ids for r in roomy.requests]


def test_a_request_that_the_kv_cache_cannot_hold_is_refused(reference: runtime.Engine) -> None:
    with pytest.raises(BudgetError, match=r"a request of 70 tokens does not fit into a KV cache of 64"):
        run_batch(reference, [PromptRequest("a", _text(60), 11)], Fifo(1), max_kv_tokens=64)


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([PromptRequest("a", ())], "prompt 'a' is empty"),
        ([PromptRequest("a", (1,)), PromptRequest("a", (2,))], "the id 'a' is used by two requests"),
        ([PromptRequest("a", (1,), 0)], "at least 1 is needed"),
        ([PromptRequest("a", _text(500), 13)], "500 tokens and 13 new ones, more than the 512"),
    ],
)
def test_requests_that_cannot_run_are_refused(
    reference: runtime.Engine, requests: list[PromptRequest], reason: str
) -> None:
    with pytest.raises(PromptError, match=reason):
        run_batch(reference, requests, Fifo(1))


def test_a_closed_loop_keeps_so_many_outstanding(reference: runtime.Engine) -> None:
    finished: list[RequestResult] = []
    result = run_batch(reference, REQUESTS, Fifo(2), concurrency=2, on_finish=finished.append)
    assert len(finished) == len(REQUESTS)
    arrivals = sorted(r.arrival_s for r in result.requests)
    for place, request in enumerate(finished[:-2]):
        assert arrivals[place + 1] < request.finish_s <= arrivals[place + 2]


def test_an_open_loop_waits_for_arrivals(reference: runtime.Engine) -> None:
    late = [PromptRequest("late", _text(3), 2, arrival_s=0.3), PromptRequest("early", _text(4), 2)]
    result = run_batch(reference, late, Fifo(2))
    assert [(r.id, r.arrival_s) for r in result.requests] == [("late", 0.3), ("early", 0.0)]
    assert result.requests[0].first_token_s >= 0.3 > result.requests[1].finish_s


def test_times_are_those_of_the_tokens(reference: runtime.Engine) -> None:
    for request in run_batch(reference, REQUESTS, Fifo(2)).requests:
        assert request.arrival_s <= request.first_token_s <= request.finish_s
        assert request.tpot_ms is not None
        assert request.ttft_ms + (request.num_tokens - 1) * request.tpot_ms == pytest.approx(request.total_ms)
        assert request.latency_ms == pytest.approx(request.total_ms / request.num_tokens)


def test_texts_end_at_the_end_token(reference: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    free = run_batch(reference, REQUESTS, Fifo(2, 2)).requests
    end = free[1].token_ids[4]
    monkeypatch.setattr(reference.model.generation_config, "eos_token_id", end)
    for kind in KINDS:
        for before, after in zip(free, run_batch(reference, REQUESTS, _scheduler(*kind)).requests, strict=True):
            cut = before.token_ids.index(end) + 1 if end in before.token_ids else len(before.token_ids)
            assert after.token_ids == before.token_ids[:cut]


def test_a_request_can_be_given_up(reference: runtime.Engine) -> None:
    tokens: dict[str, int] = {}

    def on_token(name: str, token: int) -> bool:
        tokens[name] = tokens.get(name, 0) + 1
        return name != "r1" or tokens[name] < 3

    result = run_batch(reference, REQUESTS, Fifo(2, 2), concurrency=3, on_token=on_token)
    assert [r.is_cancelled for r in result.requests] == [False, True, False, False, False]
    assert [r.num_tokens for r in result.requests] == [14, 3, 10, 8, 6] == list(tokens.values())


def test_the_kv_cache_is_given_back_at_once(reference: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []
    initialise = batching.ContinuousScheduler.__init__

    def spy(self: batching.ContinuousScheduler, cache: Any, *arguments: Any, **named: Any) -> None:
        caches.append(weakref.ref(cache))
        initialise(self, cache, *arguments, **named)

    monkeypatch.setattr(batching.ContinuousScheduler, "__init__", spy)
    gc.collect()
    gc.disable()
    try:
        run_batch(reference, REQUESTS, _scheduler("route_overlap", 2, 2))
    finally:
        gc.enable()
    assert caches and all(cache() is None for cache in caches)


def test_sampling_is_that_of_its_seed(reference: runtime.Engine) -> None:
    first, again, other = (
        [r.token_ids for r in run_batch(reference, REQUESTS, Fifo(3), sample=True, seed=seed).requests]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_an_error_of_a_pass_is_raised_and_the_engine_goes_on(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime.load(checkpoint, overrides={"cache.slots": 5}) as engine:
        expected = run_batch(engine, REQUESTS, _scheduler("route_overlap", 2, 2))
        kernel = engine.kernels[Phase.DECODE]

        def fail(*_: object) -> None:
            raise TransferError("the disk is gone")

        threads = threading.active_count()
        monkeypatch.setitem(engine.kernels, Phase.DECODE, fail)
        with pytest.raises(TransferError, match="the disk is gone"):
            run_batch(engine, REQUESTS, _scheduler("route_overlap", 2, 2))
        assert threading.active_count() == threads
        monkeypatch.setitem(engine.kernels, Phase.DECODE, kernel)
        again = run_batch(engine, REQUESTS, _scheduler("route_overlap", 2, 2))
        assert [r.token_ids for r in again.requests] == [r.token_ids for r in expected.requests]
        assert engine.model.generate(torch.tensor([REQUESTS[0].prompt_ids]), max_new_tokens=2).shape == (1, 5)


class Recording(Fifo):
    """`fifo` that wants routes and keeps what it is told."""

    needs_routes = True

    def __init__(self, group: int, window: int) -> None:
        super().__init__(group, window)
        self.done: list[Request] = []
        self.routes: list[dict[str, Route]] = []
        self.threads: set[str] = set()

    def choose(
        self, waiting: Sequence[Request], running: Sequence[Request], routes: Mapping[str, Route], now_s: float
    ) -> Sequence[str]:
        self.routes.append(dict(routes))
        self.threads.add(threading.current_thread().name)
        return super().choose(waiting, running, routes, now_s)

    def finished(self, request: Request, now_s: float) -> None:
        self.done.append(request)


def test_schedulers_learn_the_routes_of_the_last_tokens(reference: runtime.Engine) -> None:
    scheduler = Recording(2, 2)
    result = run_batch(reference, REQUESTS, scheduler)
    seen = [route for routes in scheduler.routes for route in routes.values()]
    assert seen and all(route.shape == (LAYERS, EXPERTS) and 0 < route.sum() < route.size for route in seen)
    first = next(route for routes in scheduler.routes for route in routes.values())
    assert (first.sum(axis=1) == TOP_K).all(), "of a prompt's last token"
    assert sorted((r.id, r.output_tokens, r.left_to_prefill) for r in scheduler.done) == [
        (r.id, r.max_new_tokens, 0) for r in REQUESTS
    ]
    assert any(name.startswith("planner") for name in scheduler.threads)
    assert 0 < result.hidden_planning_s <= result.planning_s


class Predicting:
    """Routes that depend on the last token alone; keeps the contexts that it was asked for."""

    def __init__(self) -> None:
        self.contexts: list[tuple[int, ...]] = []

    def routes(self, contexts: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
        self.contexts += [tuple(context) for context in contexts]
        first = np.array([context[-1] % (EXPERTS - TOP_K) for context in contexts])[:, None, None]
        experts = np.arange(EXPERTS)
        return np.repeat((first <= experts) & (experts < first + TOP_K), LAYERS, axis=1)


def test_predicted_routes_are_asked_for_once_per_token_of_real_contexts(reference: runtime.Engine) -> None:
    scheduler, predictor = Recording(2, 2), Predicting()
    run_batch(reference, REPLAYS, scheduler, routes=predictor)
    assert len(predictor.contexts) == len(set(predictor.contexts)) > 0
    texts = [(*request.prompt_ids, *(request.output_ids or ())) for request in REPLAYS]
    assert all(any(text[: len(context)] == context for text in texts) for context in predictor.contexts)
    assert any(scheduler.routes), "no route reached the scheduler"
    assert all(route.sum() == LAYERS * TOP_K for routes in scheduler.routes for route in routes.values())


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An untrained routing path predictor of the tiny model."""
    torch.manual_seed(0)
    sizes = Sizes(hidden=8, feed_forward=8, heads=1, head_size=8, encoder_layers=1, decoder_layers=1, window=64)
    shape = RoutingShape(LAYERS, EXPERTS, TOP_K)
    network = RoutingPathNetwork(sizes, shape, np.arange(len(VOCABULARY), dtype=np.int64))
    write_artifact(tmp_path / "tiny.safetensors", network.artifact("tiny"))
    return tmp_path / "tiny.safetensors"


@pytest.mark.parametrize("kind", ["route_overlap", "fifo"])
def test_the_routing_path_of_the_profile_tells_the_scheduler_the_routes(
    checkpoint: Path, artifact: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def spy(self: RoutingPath, contexts: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
        asked.extend(tuple(context) for context in contexts)
        return routes(self, contexts)

    routes = RoutingPath.routes
    monkeypatch.setattr(RoutingPath, "routes", spy)
    keys = {"scheduler.kind": kind, "scheduler.group": 2, "scheduler.window": 2, "scheduler.quantum": 2}
    predictor = {"predictor.kind": "routing_path", "predictor.artifact": str(artifact)}
    with runtime.load(checkpoint, overrides={"cache.slots": 7, **keys, **predictor}) as engine:
        result = run_batch(engine, REPLAYS)
    texts = [(*request.prompt_ids, *(request.output_ids or ())) for request in REPLAYS]
    assert all(any(text[: len(context)] == context for text in texts) for context in asked)
    assert bool(asked) == (kind == "route_overlap")
    assert [r.token_ids for r in result.requests] == [request.output_ids for request in REPLAYS]


def test_the_scheduler_is_that_of_the_profile(checkpoint: Path) -> None:
    keys = {"scheduler.kind": "route_overlap", "scheduler.group": 2, "scheduler.window": 4, "scheduler.quantum": 3}
    found = build_scheduler(Profile.default().with_overrides(keys))
    assert isinstance(found, RouteOverlap) and (found.group, found.window, found.quantum) == (2, 4, 3)
    assert build_scheduler(Profile.default().with_overrides({"scheduler.kind": "route_overlap"})).window == 2
    # 4 pages of KV cache: deadline does not admit what fifo has to compute again.
    requests = [PromptRequest(f"r{i}", _text(10 + i), output_ids=_text(30, i)) for i in range(3)]
    token_bytes = machine.kv_cache_bytes(describe(checkpoint).config, 1, 1, 4)
    prompts = {}
    for kind in ("fifo", "deadline"):
        overrides = {"scheduler.kind": kind, "scheduler.group": 3, "cache.kv_bytes": 4 * 16 * token_bytes}
        with runtime.load(checkpoint, overrides=overrides) as engine:
            passes = _passes_of(engine)
            run_batch(engine, requests)
        prompts[kind] = sum(passing.phase is Phase.PREFILL for passing in passes)
    assert prompts["deadline"] == len(requests) < prompts["fifo"]


class Silent(Fifo):
    """Chooses nobody."""

    def choose(self, *_: object) -> Sequence[str]:
        return ["nobody"]


def test_a_scheduler_that_chooses_nobody_is_an_error_not_a_hang(reference: runtime.Engine) -> None:
    with pytest.raises(RuntimeError, match=r"Silent chose none of 5 requests: \['nobody'\]"):
        run_batch(reference, REQUESTS, Silent(1))


def test_nothing_to_run_is_a_result(reference: runtime.Engine) -> None:
    assert run_batch(reference, [], Fifo(1)).requests == ()


def test_every_sequence_of_generate_has_its_own_number(checkpoint: Path) -> None:
    with runtime.load(checkpoint) as engine:
        passes = _passes_of(engine)
        ids = torch.tensor([REQUESTS[0].prompt_ids])
        for batch in (ids, ids.repeat(2, 1), ids):
            engine.model.generate(batch, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(batch))
        cached = engine.model(ids, use_cache=True).past_key_values
        engine.model(ids, past_key_values=cached, use_cache=True)
    expected = [(0, 0, 0), (0,), (0,), (1, 1, 1, 2, 2, 2), (1, 2), (1, 2), (3, 3, 3), (3,), (3,), (4, 4, 4), (4, 4, 4)]
    assert [passing.requests for passing in passes] == expected


def test_transformers_own_batching_has_the_phases_and_no_numbers(checkpoint: Path) -> None:
    with runtime.load(checkpoint) as engine:
        passes = _passes_of(engine)
        prompts = [list(request.prompt_ids) for request in REQUESTS[:2]]
        config = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)
        engine.model.generate_batch(prompts, max_new_tokens=3, continuous_batching_config=config)
    assert [(passing.phase, passing.requests) for passing in passes] == [
        (Phase.PREFILL, ()), (Phase.DECODE, ()), (Phase.DECODE, ())
    ]  # fmt: skip


@given(
    kind=st.sampled_from(["fifo", "route_overlap", "deadline"]),
    group=st.integers(1, 3),
    window=st.integers(1, 3),
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=6),
    pages=st.integers(0, 8),
    concurrency=st.none() | st.integers(1, 4),
)
@settings(max_examples=10, deadline=None)
def test_whatever_is_asked_all_requests_are_served_and_alike(
    reference: runtime.Engine,
    kind: str,
    group: int,
    window: int,
    shapes: list[tuple[int, int]],
    pages: int,
    concurrency: int | None,
) -> None:
    requests = [PromptRequest(str(i), _text(n, i), output_ids=_text(m, i + 9)) for i, (n, m) in enumerate(shapes)]
    room = max(request.max_tokens for request in requests) + (2 + pages) * batching.PAGE_TOKENS
    passes = _passes_of(reference)
    result = run_batch(
        reference, requests, _scheduler(kind, group, window), concurrency=concurrency, max_kv_tokens=room
    )
    reference.passes.listeners.remove(passes.append)
    assert [r.num_tokens for r in result.requests] == [m for _, m in shapes]
    assert all(passing.num_tokens <= group for passing in passes if passing.phase is Phase.DECODE and passing.step)
    for request, found in zip(requests, result.requests, strict=True):
        assert first_difference_of_replay(reference, request, found.predicted_ids) <= 1e-4


def first_difference_of_replay(engine: runtime.Engine, request: PromptRequest, predicted: Sequence[int]) -> float:
    """Largest margin between the two best logits among the steps at which a replay predicted another token."""
    text = torch.tensor([[*request.prompt_ids, *(request.output_ids or ())]])
    with torch.inference_mode():
        logits = engine.model(text).logits[0, len(request.prompt_ids) - 1 : -1]
    best = logits.topk(2)
    differs = best.indices[:, 0] != torch.tensor(predicted)
    return float((best.values[:, 0] - best.values[:, 1])[differs].max()) if differs.any() else 0.0
