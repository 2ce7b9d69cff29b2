"""The one adapter between transformers' continuous batching and our schedulers.

transformers keeps the paged KV cache, flattens the chosen requests into one row and samples; which requests are chosen
is asked of ours. `serving.run_batch` drives it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, fields
from math import isqrt
from typing import Any

import torch
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING
from transformers.generation.continuous_batching.scheduler import Scheduler as TransformersScheduler

from runtime import machine
from runtime.devices import current
from runtime.engine import Engine
from runtime.errors import BudgetError
from runtime.facts import planned_context
from runtime.passes import Composition, PassTracker
from runtime.planning import Planner, Situation
from runtime.prompts import PromptRequest, Served
from runtime.schedulers.base import Scheduler
from runtime.vocabulary import Phase

NAME = "expertflow"
"""Of the scheduler in transformers' `SCHEDULER_MAPPING`."""

PAGE_TOKENS = 16  # of the paged KV cache; small, since every request leaves half a page unused
MASK_BYTES = 64 << 20  # of the attention mask [tokens of a pass, KV cache], which bounds the tokens of a pass


@dataclass(repr=False, eq=False)
class ServedState(RequestState):
    """transformers' state of a request, which feeds a replay its real tokens."""

    served: Served = field(kw_only=True)

    def update_and_check_completion(self, token_id: int, logprob: float | None) -> bool:
        """A token was sampled; True: the request is complete."""
        return bool(super().update_and_check_completion(self.served.take(token_id), logprob))

    def create_equivalent_initial_request(self) -> ServedState:
        """What goes on after its KV cache had to be given up: its text so far as a prompt."""
        plain = super().create_equivalent_initial_request()
        values = {of.name: getattr(plain, of.name) for of in fields(RequestState) if of.init}
        return ServedState(**values, served=self.served)


def served_by(state: RequestState) -> Served:
    """The request behind a state."""
    assert isinstance(state, ServedState), "only requests of `serving.run_batch` can be scheduled"
    return state.served


class ContinuousScheduler(TransformersScheduler):
    """What transformers asks for the requests of a pass; it asks the planner that `use` gave it.

    A chosen request that the KV cache has no room for waits while others run, and nothing new begins meanwhile; only
    when nobody can run does transformers take the cache of the least important ones (they are computed again later).
    """

    planner: Planner
    passes: PassTracker

    def __init__(self, cache: Any, safety_margin: float | None, max_requests_per_batch: int) -> None:
        super().__init__(cache, safety_margin or 0.0, max_requests_per_batch)

    def use(self, planner: Planner, passes: PassTracker) -> None:
        """Serve a run."""
        self.planner, self.passes = planner, passes

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.batch: list[FutureRequestState] = []
        self._chosen: list[str] = []
        self._starving: set[str] = set()

    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        """See transformers. None: the cache is full; asked again after requests were taken out, the choice stands."""
        situation = self.situation()
        self._chosen = self._chosen or self.planner.choose(situation)
        found = self._process(self._chosen, token_budget, cache_budget)
        if not found[0] and (others := situation.decoding_without(self._chosen)).running:
            starved = self.starved_requests
            found = self._process(self.planner.choose(others), token_budget, cache_budget)
            self.starved_requests = starved + self.starved_requests
        scheduled, fast, num_tokens, num_read = found
        if not scheduled:
            self._refuse_if_hopeless()
            return None, fast, 0, 0
        self._starving |= {state.request_id for state, _ in self.starved_requests}
        self._starving -= {future.state.request_id for future in scheduled}
        self.starved_requests = []
        self.batch, self._chosen = scheduled, []
        self.passes.announce(_composition(scheduled))
        return scheduled, fast, num_tokens, num_read

    def _process(
        self, names: Sequence[str], token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState], bool, int, int]:
        states = {**self.waiting_requests, **self.active_requests}
        candidates = [states[name] for name in names if name in states]
        begun: set[str] = set()
        scheduled, _, fast, num_tokens, num_read = self._process_candidates(
            candidates, token_budget, cache_budget, begun
        )
        self._cleanup_waiting_queue(begun)
        return scheduled, fast, num_tokens, num_read

    def _refuse_if_hopeless(self) -> None:
        if self.starved_requests and len(self.active_requests) > 1:
            return
        name = self.starved_requests[0][0].request_id if self.starved_requests else self._chosen[0]
        raise BudgetError(
            f"the KV cache cannot hold request {name!r} even alone; allow more (cache.kv_bytes) or ask for fewer tokens"
        )

    def situation(self, after: bool = False) -> Situation:
        """Who waits and runs: now, or `after` the pass that was just scheduled, as far as that can be known."""
        coming = {future.state.request_id for future in self.batch if after and future.has_new_token}
        running, contexts = [], {}
        for name, state in self.active_requests.items():
            request = served_by(state).as_request(len(state.remaining_prefill_tokens), int(name in coming))
            if request.output_tokens == request.max_output_tokens:
                continue
            running.append(request)
            if request.is_decoding:
                contexts[name] = served_by(state).context
        self._starving &= set(self.active_requests)
        blocked = running and (self.block_new_requests or self._starving)
        waiting = [
            served_by(state).as_request(len(state.remaining_prefill_tokens))
            for state in (() if blocked else self.waiting_requests.values())
        ]
        # One that lost its KV cache came before those that queue.
        return Situation(sorted(waiting, key=lambda request: request.arrival_s), running, contexts)


SCHEDULER_MAPPING[NAME] = ContinuousScheduler


def _composition(batch: Sequence[FutureRequestState]) -> Composition:
    """Per token of a pass, its request and task."""
    served = [(served_by(future.state), future.query_length) for future in batch]
    return Composition(
        Phase.DECODE if all(length == 1 for _, length in served) else Phase.PREFILL,
        tuple(of.number for of, length in served for _ in range(length)),
        tuple(of.request.task for of, length in served for _ in range(length)),
    )


def context_of(config: Any) -> int | None:
    """Tokens that a model of this configuration can attend to; None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class Sizes:
    """What transformers is told to make room for."""

    num_pages: int
    pass_tokens: int
    num_requests: int

    @classmethod
    def of(
        cls, engine: Engine, requests: Sequence[PromptRequest], scheduler: Scheduler, max_kv_tokens: int | None
    ) -> Sizes:
        """For `requests`, of which `group * window` are under way at most.

        Raises:
            BudgetError: one of them does not fit alone.
        """
        under_way = scheduler.group * scheduler.window
        if max_kv_tokens is None:
            max_kv_tokens = kv_tokens(engine) or under_way * planned_context(engine.profile)
        # One more page than its tokens fill: transformers may take one ahead.
        pages = sorted((-(-request.max_tokens // PAGE_TOKENS) + 1 for request in requests), reverse=True)
        num_pages = min(sum(pages[:under_way]), max_kv_tokens // PAGE_TOKENS)
        if pages[0] > num_pages:
            raise BudgetError(
                f"a request of {max(request.max_tokens for request in requests)} tokens does not fit into a KV cache "
                f"of {max_kv_tokens}; allow more (cache.kv_bytes) or ask for fewer tokens"
            )
        longest = max(len(request.prompt_ids) for request in requests) + scheduler.group
        read, fit = num_pages * PAGE_TOKENS, MASK_BYTES // engine.model.dtype.itemsize
        pass_tokens = min(longest, (isqrt(read * read + 4 * fit) - read) // 2)
        return cls(num_pages, max(pass_tokens, under_way), under_way)


def kv_tokens(engine: Engine) -> int | None:
    """Tokens of KV cache that the profile sets memory aside for; None: it does not say, or their size is not known."""
    token_bytes = machine.kv_cache_bytes(engine.model.config, 1, 1, engine.model.dtype.itemsize)
    kv_bytes = engine.profile.cache.kv_bytes
    return kv_bytes // token_bytes if kv_bytes is not None and token_bytes else None


@contextmanager
def batch_processor(model: Any, sizes: Sizes, sample: bool, seed: int) -> Iterator[tuple[Any, Any]]:
    """transformers' batch processor, to be driven step by step, and the tokens that end a text.

    The model keeps the attention that it was loaded with, in its paged form. Everything runs on the caller's stream of
    the model's device.

    Raises:
        BudgetError: the device has no room for the KV cache.
    """
    generation = deepcopy(model.generation_config)
    generation.do_sample = sample
    if generation.eos_token_id is None:
        generation.eos_token_id = -1  # as transformers would set it, with a warning
    known = {of.name for of in fields(ContinuousBatchingConfig)}
    settings: dict[str, Any] = {
        "scheduler_type": NAME,
        "page_size" if "page_size" in known else "block_size": PAGE_TOKENS,
        "num_blocks": sizes.num_pages,
        "max_batch_tokens": sizes.pass_tokens,
        "max_requests_per_batch": sizes.num_requests,
        "max_blocks_per_request": 0,
        "allow_block_sharing": False,
        "use_async_batching": False,
        "use_cuda_graph": False,
        "max_memory_percent": 1.0,  # the cache has its size: nothing is to be left free beside it
        "seed": seed,
    }
    attention = model.config._attn_implementation
    if "auto_switch_to_flash" in known:
        settings["auto_switch_to_flash"] = False
    elif not attention.startswith("paged|"):
        model.set_attn_implementation(f"paged|{attention}")
    try:
        with current(model.device):  # whose memory transformers asks for
            manager = model.init_continuous_batching(generation, ContinuousBatchingConfig(**settings))
            try:
                manager.warmup()  # makes the processor; without graphs there is nothing to warm up
            except (MemoryError, torch.OutOfMemoryError) as error:
                cache = f"a KV cache of {sizes.num_pages * PAGE_TOKENS} tokens"
                raise BudgetError(
                    f"no memory for {cache} ({str(error).partition('. ')[0]}); take fewer expert slots (cache.slots), "
                    "or a smaller cache.kv_bytes"
                ) from error
            # Of its own it would make a stream, which does not wait for what it puts into the inputs on the caller's.
            manager.batch_processor.inputs_and_outputs.compute_stream = None
            yield manager.batch_processor, generation.eos_token_id
    finally:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
