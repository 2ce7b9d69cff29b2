"""Follows the model's forward passes: which phase runs, which tokens are in it, and whose they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from runtime.vocabulary import Pass, Phase


class Composition(NamedTuple):
    """What a pass holds: its phase, and per token the number of its request and that request's task."""

    phase: Phase
    requests: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()


class PassTracker:
    """Knows the running pass and tells listeners when one begins.

    A pass with one token per sequence is a decode step. Every new sequence gets a number that no other one of the run
    has: in ordinary `generate`, a pass whose KV cache is empty begins new sequences, any other goes on with those of
    the last batch of its size. Continuous batching flattens its sequences into one row, so its scheduler `announce`s
    each pass.

    Attributes:
        task: that of the requests of ordinary passes, from now on; None: not known.
    """

    def __init__(self) -> None:
        self.current = Pass(Phase.PREFILL, 0, 0)
        self.listeners: list[Callable[[Pass], None]] = []
        self.task: str | None = None
        self._step = self._num_requests = 0
        self._batches: dict[int, tuple[int, ...]] = {}  # by size: the numbers of the last batch
        self._announced: Composition | None = None

    def attach(self, model: PreTrainedModel) -> None:
        """Follow `model`; the base model is watched, so that a language-model head above it does not matter."""
        model.base_model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def number_requests(self, count: int) -> tuple[int, ...]:
        """Numbers for `count` new requests, ascending."""
        start = self._num_requests
        self._num_requests += count
        return tuple(range(start, start + count))

    def announce(self, composition: Composition) -> None:
        """What the next pass of continuous batching holds, in the order of its tokens."""
        self._announced = composition

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Passes of which nobody is told and which leave no trace here."""
        state = dict(vars(self))
        self.listeners, self._batches = [], {}
        try:
            yield
        finally:
            vars(self).update(state)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        shaped = ids if ids is not None else kwargs["inputs_embeds"]
        batch, length = shaped.shape[0], shaped.shape[1]
        starts = kwargs.get("cu_seq_lens_q")
        if starts is None:
            phase, requests, tasks = self._of_batch(batch, length, _cache_of(kwargs))
        else:
            phase, requests, tasks = self._of_row(length, len(starts) - 1)
        self.current = Pass(
            phase=phase,
            num_tokens=batch * length,
            step=self._step,
            token_ids=tuple(ids.reshape(-1).tolist()) if isinstance(ids, torch.Tensor) else (),
            requests=requests,
            tasks=tasks,
        )
        self._step += 1
        for listener in self.listeners:
            listener(self.current)

    def _of_batch(self, batch: int, length: int, cache: Any) -> Composition:
        known = self._batches.get(batch)
        # One token with no cache to be seen: a state-space model keeps it elsewhere.
        goes_on = length == 1 if cache is None else bool(cache.get_seq_length() > 0)
        if known is None or not goes_on:
            known = self._batches[batch] = self.number_requests(batch)
        phase = Phase.DECODE if length == 1 else Phase.PREFILL
        requests = tuple(number for number in known for _ in range(length))
        return Composition(phase, requests, () if self.task is None else (self.task,) * len(requests))

    def _of_row(self, num_tokens: int, num_sequences: int) -> Composition:
        """A pass of continuous batching; one that nobody announced does not say whose its tokens are."""
        announced, self._announced = self._announced, None
        if announced is not None:
            return announced
        return Composition(Phase.DECODE if num_sequences == num_tokens else Phase.PREFILL)


def _cache_of(kwargs: dict[str, Any]) -> Any:
    """The KV cache that a pass is given; transformers 5.24 named it anew."""
    return kwargs.get("cache", kwargs.get("past_key_values"))
