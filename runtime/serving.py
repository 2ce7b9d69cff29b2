"""Serving a batch of requests: the loop around continuous batching, and the times that a client sees.

Everything but a scheduler's worker (`planning`) happens in the calling thread, so that an error of a pass is raised
where the run was asked for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from transformers.generation.continuous_batching.requests import RequestStatus

from runtime.batch_stats import BatchResult, RoutingWatch
from runtime.batching import ContinuousScheduler, ServedState, Sizes, batch_processor, context_of, kv_tokens, served_by
from runtime.build_predictors import build_routes
from runtime.engine import Engine
from runtime.errors import UnsupportedModelError
from runtime.latency import LatencyWatch
from runtime.planning import Planner
from runtime.predictors.base import RoutePredictor
from runtime.prompts import PromptRequest, RequestResult, Served, check_requests
from runtime.schedulers.base import Scheduler
from runtime.schedulers.fifo import Fifo
from runtime.schedulers.make import build_scheduler


def run_batch(
    engine: Engine,
    requests: Iterable[PromptRequest],
    scheduler: Scheduler | None = None,
    *,
    concurrency: int | None = None,
    routes: RoutePredictor | None = None,
    max_kv_tokens: int | None = None,
    sample: bool = False,
    seed: int = 0,
    on_token: Callable[[str, int], bool | None] | None = None,
    on_finish: Callable[[RequestResult], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> BatchResult:
    """Run `requests` by continuous batching, in the calling thread.

    Offloaded logits are to the bit those of `load_reference` where the same requests run together in the same passes.
    Prefixes are never shared: what a request computes would depend on those before it.

    Args:
        scheduler: decides which requests run in each pass. None: the profile's, with the routes that its predictor
            foretells, if it does.
        concurrency: closed loop, so many requests are outstanding, the next one arrives when one finishes. None: open
            loop, each arrives at its `arrival_s`.
        routes: predicts routes for a scheduler that wants them; None: they are expected to be those of the last tokens.
        max_kv_tokens: tokens that the KV cache holds. None: as many as `group * window` of the longest requests need,
            at most what the profile sets aside.
        sample: sample by the model's generation config instead of taking the likeliest token; `seed` is for that.
        on_token: told each request's id and tokens as they come; False gives the request up.
        on_finish: told each result as soon as its request is complete.
        stop: asked between passes; True ends the run there. Requests under way are given up with the tokens that they
            have, those without any are left out of the result.

    Raises:
        PromptError: a request that cannot be run.
        UnsupportedModelError: a family that transformers' continuous batching does not serve.
        BudgetError: a KV cache that cannot hold one request.
        ExpertFlowError: whatever a pass raises.
    """
    queue = list(requests)
    check_requests(queue, context_of(engine.model.config))
    if concurrency is not None and concurrency < 1:
        raise ValueError(f"concurrency {concurrency}: at least 1 is needed")
    if not queue:
        return BatchResult((), 0, 0, None, None, 0.0, 0.0)
    if scheduler is None:
        scheduler = build_scheduler(engine.profile, max_kv_tokens or kv_tokens(engine))
        if routes is None and scheduler.needs_routes:
            routes = build_routes(engine)
    sizes = Sizes.of(engine, queue, scheduler, max_kv_tokens)
    if engine not in _proven:
        _prove(engine)
        _proven.add(engine)
    with (
        engine.exclusive(),  # another thread's run, or text, waits until this run is over
        engine.latency.told(),
        _run(engine, sizes, scheduler, routes, sample, seed, engine.latency) as run,
    ):
        return run.serve(queue, concurrency, on_token, on_finish, stop)


_proven: WeakSet[Engine] = WeakSet()
_STOP_S = 0.05  # how long a run that waits for arrivals goes without asking whether to stop
_TOLERANCE = 0.1  # of logits, relative; bfloat16 differs by about 0.01, a wrong position or mask by far more
# What a model raises that is given a cache or positions that it does not expect.
_MODEL_ERRORS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _prove(engine: Engine) -> None:
    """Refuse a model whose attention transformers does not batch, or batches wrongly.

    Two texts are batched and computed alone, without any expert: only attention and positions are in question.
    """
    texts = [tuple(range(16, 29)), tuple(range(28, 19, -1))]
    replays = [PromptRequest(str(i), text[:-2], output_ids=text[-2:]) for i, text in enumerate(texts)]
    model: Any = engine.model
    logits: list[torch.Tensor] = []
    with engine.without_experts(), torch.inference_mode():
        alone = torch.stack([model(torch.tensor([text[:-1]], device=model.device)).logits[0, -1] for text in texts])
        hook = model.register_forward_hook(lambda module, args, output: logits.append(output.logits[0]))
        try:
            with _run(engine, Sizes(4, 16, 2), Fifo(2), None, sample=False, seed=0) as run:
                run.serve(replays, None, None, None, lambda: False)
        except torch.OutOfMemoryError:  # says nothing about the model
            raise
        except _MODEL_ERRORS as error:
            raise _not_batched(engine, str(error)) from error
        finally:
            hook.remove()
    difference = float((logits[-1].float() - alone.float()).norm() / alone.float().norm())
    if not difference <= _TOLERANCE:
        raise _not_batched(engine, f"its logits differ by {difference:.0%} from those of one text alone")


def _not_batched(engine: Engine, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"transformers' continuous batching does not serve {engine.model.config.model_type}: {why}; "
        "run its prompts one at a time (--prompt)"
    )


@contextmanager
def _run(
    engine: Engine,
    sizes: Sizes,
    scheduler: Scheduler,
    predictor: RoutePredictor | None,
    sample: bool,
    seed: int,
    latency: LatencyWatch | None = None,
) -> Iterator[_Run]:
    with batch_processor(engine.model, sizes, sample, seed) as (processor, eos):
        run = _Run(engine, processor, eos, scheduler, predictor, latency)
        try:
            yield run
        finally:
            run.close()


class _Run:
    """The loop of one `run_batch`.

    Args:
        latency: is told when tokens came; None: nobody waits for them.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Any,
        eos: Any,
        scheduler: Scheduler,
        predictor: RoutePredictor | None,
        latency: LatencyWatch | None,
    ) -> None:
        self._eos, self._latency = eos, latency
        self._model, self._processor, self._passes = engine.model, processor, engine.passes
        self._adapter: ContinuousScheduler = processor.scheduler
        # No method of this object: a reference cycle would keep the KV cache for long.
        self._now = partial(_seconds_since, time.perf_counter())
        self._planner = Planner(scheduler, predictor, self._now)
        self._adapter.use(self._planner, engine.passes)
        self._watch = RoutingWatch(engine.routing_shape, scheduler.needs_routes and predictor is None)
        self._stop_watching = engine.observe_routing(self._watch.observe)
        self._results: dict[str, RequestResult] = {}
        self._num_passes = 0

    def close(self) -> None:
        """Stop watching and planning."""
        self._planner.close()
        self._stop_watching()

    def serve(
        self,
        queue: Sequence[PromptRequest],
        concurrency: int | None,
        on_token: Callable[[str, int], bool | None] | None,
        on_finish: Callable[[RequestResult], None] | None,
        stop: Callable[[], bool],
    ) -> BatchResult:
        """Run all of `queue`, until `stop`."""
        numbers = self._passes.number_requests(len(queue))
        coming = deque(zip(numbers, queue, strict=True))
        if concurrency is None:
            coming = deque(sorted(coming, key=lambda pair: pair[1].arrival_s))

        def done(results: Iterable[RequestResult]) -> None:
            for result in results:
                self._results[result.id] = result
                if on_finish is not None:
                    on_finish(result)

        while len(self._results) < len(queue) and not stop():
            self._admit(coming, concurrency)
            if not self._processor.prepare_next_batch():
                time.sleep(min(max(0.0, coming[0][1].arrival_s - self._now()), _STOP_S))
                continue
            self._pass()
            done(self._deliver(on_token))
        done(self._give_up())
        return BatchResult(
            tuple(self._results[request.id] for request in queue if request.id in self._results),
            self._num_passes,
            self._watch.num_decode_passes,
            *self._watch.means(),
            self._planner.busy_s,
            self._planner.hidden_s,
        )

    def _admit(self, coming: deque[tuple[int, PromptRequest]], concurrency: int | None) -> None:
        """Let those arrive whose time has come."""
        while coming:
            arrival_s = self._now()
            if concurrency is None:
                if coming[0][1].arrival_s > arrival_s:
                    return
                arrival_s = coming[0][1].arrival_s
            elif len(self._adapter.active_requests) + len(self._adapter.waiting_requests) >= concurrency:
                return
            number, request = coming.popleft()
            self._adapter.add_waiting_request(
                ServedState(
                    request_id=request.id,
                    initial_tokens=list(request.prompt_ids),
                    max_new_tokens=request.max_output_tokens,
                    eos_token_id=None if request.output_ids is not None else self._eos,
                    served=Served(request, number, arrival_s),
                )
            )

    def _pass(self) -> None:
        self._watch.begin(self._adapter.batch)
        self._planner.begin_ahead(self._adapter.situation(after=True))
        with torch.inference_mode():
            self._processor._generation_step(self._model)
        self._processor.update_batch()
        self._num_passes += 1
        self._planner.saw_routes(self._watch.routes())

    def _deliver(self, on_token: Callable[[str, int], bool | None] | None) -> Iterator[RequestResult]:
        """Hand out the tokens of the pass that ended; the results of those that are done."""
        now_s = self._now()
        for future in self._adapter.batch:
            state, served = future.state, served_by(future.state)
            if not future.has_new_token:
                continue
            self._note_token(served, now_s)
            goes_on = on_token is None or on_token(state.request_id, served.token_ids[-1]) is not False
            if state.status == RequestStatus.FINISHED:
                self._planner.finished(served.as_request(0))
                yield served.result(now_s, is_cancelled=False)
            elif not goes_on:
                self._adapter.set_request_cancellation(state.request_id)
                self._planner.forget(state.request_id)
                yield served.result(now_s, is_cancelled=True)
        self._adapter.batch = []
        self._adapter.clear_cancelled_requests()

    def _note_token(self, served: Served, now_s: float) -> None:
        """A client has one more token."""
        is_first = len(served.token_ids) == 1
        if is_first:
            served.first_token_s = now_s
        if self._latency is not None:
            if is_first:
                self._latency.first_token(now_s - served.arrival_s)
            else:
                self._latency.further_token(now_s - served.last_token_s)
        served.last_token_s = now_s

    def _give_up(self) -> Iterator[RequestResult]:
        """What those under way have so far."""
        now_s = self._now()
        states = {**self._adapter.active_requests, **self._adapter.waiting_requests}
        for served in (served_by(state) for name, state in states.items() if name not in self._results):
            if served.token_ids:
                yield served.result(now_s, is_cancelled=True)


def _seconds_since(start: float) -> float:
    return time.perf_counter() - start
