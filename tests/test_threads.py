"""Many threads and one engine: the same results as one after the other, and clear ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, save_tiny
from transformers import DynamicCache

import runtime
from runtime.errors import UsageError
from runtime.prompts import PromptRequest
from runtime.schedulers.fifo import Fifo
from runtime.serving import run_batch
from runtime.vocabulary import Pass, Phase

OVERRIDES = {"cache.slots": 5, "predictor.kind": "previous_token", "prefetch.depth": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[runtime.Engine]:
    with runtime.load(checkpoint, overrides=OVERRIDES) as engine:
        yield engine


def _ids(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(1, len(VOCABULARY), (1, 5 + seed)))


def _logits(engine: runtime.Engine, seed: int) -> torch.Tensor:
    """Of a prompt and some tokens after it."""
    model: Any = engine.model
    output = model.generate(
        _ids(seed), max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    logits: torch.Tensor = torch.stack(output.logits)
    return logits


def _in_threads(count: int, call: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return [future.result(timeout=120) for future in [pool.submit(call, i) for i in range(count)]]


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_get_to_the_bit_what_single_calls_get(checkpoint: Path, threads: int) -> None:
    overrides = {**OVERRIDES, "compute.threads": threads}
    with runtime.load_reference(checkpoint, overrides=overrides) as reference:
        expected = [_logits(reference, i) for i in range(6)]
    with runtime.load(checkpoint, overrides=overrides) as engine:
        requests: list[tuple[int, ...]] = []
        engine.on_pass(lambda passing: requests.append(passing.requests))
        found = _in_threads(6, lambda i: _logits(engine, i))
        engine.check_integrity()
        assert engine.stats().cache.num_passes == len(requests) == 6 * 6
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    prompts = [numbers for numbers in requests if len(numbers) > 1]
    assert sorted(len(numbers) for numbers in prompts) == [5 + i for i in range(6)]
    for number in range(6):
        assert sum(set(numbers) == {number} for numbers in requests) == 6, "each text has a number of its own"


def test_interleaved_texts_of_one_thread_keep_their_numbers(engine: runtime.Engine) -> None:
    seen: list[Pass] = []
    engine.on_pass(seen.append)
    caches = [DynamicCache(), DynamicCache()]
    for i, cache in enumerate(caches):
        engine.model(_ids(i), past_key_values=cache)
    for turn in (0, 1, 1, 0):
        engine.model(torch.tensor([[3]]), past_key_values=caches[turn])
    assert [passing.requests[0] for passing in seen] == [0, 1, 0, 1, 1, 0]
    caches.clear()
    engine.model(_ids(0), past_key_values=DynamicCache())
    assert seen[-1].requests[0] == 2


def test_texts_without_a_cache_are_told_apart_by_their_threads(engine: runtime.Engine) -> None:
    seen: list[Pass] = []
    engine.on_pass(seen.append)
    token = torch.tensor([[3]])
    with ThreadPoolExecutor(1) as other:
        engine.model(_ids(0))
        other.submit(engine.model, _ids(1)).result(timeout=60)
        engine.model(token)
        other.submit(engine.model, token).result(timeout=60)
    assert [passing.requests[0] for passing in seen] == [0, 1, 0, 1]


def test_counters_are_read_and_slots_changed_while_others_generate(checkpoint: Path, engine: runtime.Engine) -> None:
    with runtime.load_reference(checkpoint, overrides=OVERRIDES) as reference:
        expected = [_logits(reference, i) for i in range(3)]
    is_over = threading.Event()

    def meddle() -> int:
        turns = 0
        while not is_over.is_set():
            assert engine.stats().cache.num_lookups >= 0
            engine.shrink(1 + turns % 5)
            engine.grow()
            engine.check_integrity()
            turns += 1
        return turns

    with ThreadPoolExecutor(1) as other:
        meddling = other.submit(meddle)
        found = _in_threads(3, lambda i: _logits(engine, i))
        is_over.set()
        assert meddling.result(timeout=60) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_recovery_that_is_broken_off_is_made_up_for_before_the_next_pass(engine: runtime.Engine) -> None:
    expected, recoveries = _logits(engine, 1), []

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    def recover() -> None:
        recoveries.append(engine.passes.is_running)
        if len(recoveries) == 1:
            raise KeyboardInterrupt  # the second one

    engine.passes.on_failure.insert(0, recover)
    stop = engine.observe_routing(fail)
    with pytest.raises(KeyboardInterrupt):
        _logits(engine, 1)
    stop()
    assert torch.equal(_logits(engine, 1), expected) and recoveries == [True, True]
    engine.check_integrity()


def test_a_pass_that_fails_lets_the_next_thread_in(engine: runtime.Engine) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(layer: int, choice: Any, weights: Any) -> None:
        raise Interrupt

    for fault in (interrupt, lambda *routed: 1 / 0):
        stop = engine.observe_routing(fault)
        with pytest.raises((Interrupt, ZeroDivisionError)):
            engine.model(_ids(0))
        stop()
        assert _in_threads(1, lambda i: _logits(engine, i))[0].shape[0] == 6
        engine.check_integrity()


def test_an_error_that_somebody_keeps_keeps_no_slot(engine: runtime.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.shrink(2)
    expected = engine.model(_ids(0)).logits
    kept: list[BaseException] = []
    with monkeypatch.context() as patched:
        patched.setattr(engine.kernels[Phase.PREFILL], "add", lambda self, arrivals: 1 / 0)
        for _ in range(3):
            try:
                engine.model(_ids(0))
            except ZeroDivisionError as error:
                kept.append(error)
    assert len(kept) == 3
    assert torch.equal(engine.model(_ids(0)).logits, expected)
    engine.check_integrity()


def test_close_waits_for_the_pass_that_runs_and_ends_the_text(engine: runtime.Engine) -> None:
    in_pass, go_on, seen = threading.Event(), threading.Event(), list[int]()

    def hold(layer: int, choice: Any, weights: Any) -> None:
        seen.append(layer)
        in_pass.set()
        assert go_on.wait(60)

    stop = engine.observe_routing(hold)
    with ThreadPoolExecutor(2) as pool:
        text = pool.submit(_logits, engine, 0)
        assert in_pass.wait(60)
        closing: Future[None] = pool.submit(engine.close)
        while not engine.passes._closed.is_set():
            pass
        assert not closing.done() and not text.done()
        go_on.set()
        closing.result(timeout=60)
        with pytest.raises(UsageError, match="the engine is closed"):
            text.result(timeout=60)
    stop()
    assert seen == [0, 1, 2], "the pass that ran was not broken off"
    for call in (lambda: engine.model(_ids(0)), lambda: engine.shrink(2), lambda: engine.grow()):
        with pytest.raises(UsageError, match=r"the engine is closed.*load it again"):
            call()
    with pytest.raises(UsageError, match="the engine is closed"):
        run_batch(engine, [PromptRequest("a", (1, 2, 3), 2)], Fifo(1))
    engine.close()
    assert engine.stats().cache.num_passes == 1


def test_a_resident_model_ends_with_its_engine_too(checkpoint: Path) -> None:
    with runtime.load_reference(checkpoint) as reference:
        with pytest.raises(UsageError, match="a resident model has no expert slots"):
            reference.shrink(1)
        assert reference.num_slots == 0
    with pytest.raises(UsageError, match="the engine is closed"):
        reference.model(_ids(0))


def test_batches_of_several_threads_run_one_after_the_other(checkpoint: Path) -> None:
    requests = [PromptRequest(f"r{i}", tuple(_ids(i)[0].tolist()), 5) for i in range(4)]
    with runtime.load_reference(checkpoint, overrides=OVERRIDES) as reference:
        expected = [result.token_ids for result in run_batch(reference, requests, Fifo(2)).requests]
        text = _logits(reference, 1)
    with runtime.load(checkpoint, overrides=OVERRIDES) as engine:
        run_batch(engine, requests[:1], Fifo(1))  # what is done once per engine
        passes, runs, begin = list[int](), list[int](), threading.Barrier(3, timeout=60)
        engine.on_pass(lambda passing: passes.append(threading.get_ident()))

        def call(i: int) -> Any:
            begin.wait()
            if i == 1:
                return _logits(engine, 1)
            runs.append(threading.get_ident())
            return run_batch(engine, requests, Fifo(2))

        first, between, second = _in_threads(3, call)
        turns = [thread for thread, _ in groupby(passes)]
        assert [turns.count(thread) for thread in runs] == [1, 1], "nothing runs between the passes of a batch"
        engine.check_integrity()
    assert torch.equal(between, text)
    for run in (first, second):
        assert [result.token_ids for result in run.requests] == expected
