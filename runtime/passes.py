"""Follows the model's forward passes: which phase runs, which tokens are in it, and whose they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, overload
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from runtime.errors import UsageError
from runtime.vocabulary import Pass, Phase


class Composition(NamedTuple):
    """What a pass holds: its phase, and per token the number of its request and that request's task."""

    phase: Phase
    requests: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()


class DeviceIds(Sequence[int]):
    """Token ids on a GPU: they come to the host, which waits for that, when one of them is first looked at.

    That is while their pass runs: afterwards the tensor may be written again.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = ids
        self._size, self._ids = ids.numel(), tuple[int, ...]()

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        return self._read()[place]

    def __iter__(self) -> Iterator[int]:
        return iter(self._read())

    def close(self) -> None:
        """The pass has ended; what was looked at stays."""
        self._tensor = None

    def _read(self) -> tuple[int, ...]:
        if self._tensor is not None and len(self._ids) < self._size:
            self._ids = tuple(self._tensor.reshape(-1).tolist())
        if len(self._ids) < self._size:
            raise UsageError("the token ids of a pass on a GPU are there while it runs: look at them in a listener")
        return self._ids


def _token_ids(ids: Any) -> Sequence[int]:
    """Of the flattened batch; none where the model was given embeddings."""
    if not isinstance(ids, torch.Tensor):
        return ()
    return tuple(ids.reshape(-1).tolist()) if ids.device.type == "cpu" else DeviceIds(ids)


class PassTracker:
    """Knows the running pass and tells listeners when one begins, and others when it has ended well.

    Passes run one at a time, whichever threads call the model: each waits until the one before it has ended.

    A pass with one token per sequence is a decode step. Every new sequence gets a number that no other one of the run
    has: in ordinary `generate`, a pass whose KV cache is empty begins new sequences, any other goes on with those that
    its cache is known for, else with those of the calling thread's last batch of its size. Continuous batching flattens
    its sequences into one row, so its scheduler `announce`s each pass.

    Attributes:
        lock: held while a pass runs; re-entrant.
        on_failure: called when a pass was broken off by whatever was raised, before that is raised further.
        is_running: a pass has begun and its experts may be in use.
        task: that of the requests of ordinary passes, from now on; None: not known.
    """

    def __init__(self) -> None:
        self.current = Pass(Phase.PREFILL, 0, 0)
        self.listeners: list[Callable[[Pass], None]] = []
        self.end_listeners: list[Callable[[Pass], None]] = []
        self.task: str | None = None
        self.on_failure: list[Callable[[], None]] = []
        self.is_running = self._is_broken = False
        self._step = self._num_requests = 0
        self._by_cache: WeakKeyDictionary[Any, tuple[int, ...]] = WeakKeyDictionary()
        self._own = _LastBatches()
        self._announced: Composition | None = None
        self.lock, self._closed = threading.RLock(), threading.Event()

    def attach(self, model: PreTrainedModel) -> None:
        """Follow `model`: a pass begins with its base model and ends with its head, if it has one.

        `forward` is wrapped: hooks are not called when something other than an `Exception` breaks a pass off.
        """
        base: Any = model.base_model
        base.forward = self._followed(base.forward)
        whole: Any = model
        whole.forward = self._told(whole.forward)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread's pass runs meanwhile; waits for the one that does. The same thread may enter again.

        Raises:
            UsageError: the engine was closed.
        """
        with self.lock:
            if self._closed.is_set():
                raise UsageError("the engine is closed: its model cannot run any more; load it again")
            yield

    def close(self) -> None:
        """Let no further pass begin, and wait for the one that runs, unless the caller is in it. Idempotent."""
        self._closed.set()
        with self.lock:
            pass

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
        self.listeners, self.end_listeners, self._by_cache, self._own = [], [], WeakKeyDictionary(), _LastBatches()
        try:
            yield
        finally:
            vars(self).update(state)

    def _followed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def followed(*args: Any, **kwargs: Any) -> Any:
            with self.alone():
                try:
                    self.is_running = True
                    if self._is_broken:  # a second Ctrl-C broke the recovery off, too
                        self._recover()
                    self._begin(args, kwargs)
                    return forward(*args, **kwargs)
                except BaseException:
                    self._is_broken = True
                    self._recover()
                    raise
                finally:
                    self.is_running = False

        return followed

    def _recover(self) -> None:
        for recover in self.on_failure:
            recover()
        self._is_broken = False

    def _told(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def told(*args: Any, **kwargs: Any) -> Any:
            with self.alone():
                try:
                    output = forward(*args, **kwargs)
                    for listener in self.end_listeners:
                        listener(self.current)
                    return output
                finally:
                    if isinstance(self.current.token_ids, DeviceIds):
                        self.current.token_ids.close()

        return told

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
            token_ids=_token_ids(ids),
            requests=requests,
            tasks=tasks,
        )
        self._step += 1
        for listener in self.listeners:
            listener(self.current)

    def _of_batch(self, batch: int, length: int, cache: Any) -> Composition:
        known = None if cache is None else self._by_cache.get(cache)
        if known is None or len(known) != batch:
            known = self._own.by_size.get(batch)
        # One token with no cache to be seen: a state-space model keeps it elsewhere.
        goes_on = length == 1 if cache is None else bool(cache.get_seq_length() > 0)
        if known is None or not goes_on:
            known = self.number_requests(batch)
        self._own.by_size[batch] = known
        if cache is not None:
            self._by_cache[cache] = known
        phase = Phase.DECODE if length == 1 else Phase.PREFILL
        requests = tuple(number for number in known for _ in range(length))
        return Composition(phase, requests, () if self.task is None else (self.task,) * len(requests))

    def _of_row(self, num_tokens: int, num_sequences: int) -> Composition:
        """A pass of continuous batching; one that nobody announced does not say whose its tokens are."""
        announced, self._announced = self._announced, None
        if announced is not None:
            return announced
        return Composition(Phase.DECODE if num_sequences == num_tokens else Phase.PREFILL)


class _LastBatches(threading.local):
    """Of each thread, by size: the numbers of its last batch."""

    def __init__(self) -> None:
        self.by_size: dict[int, tuple[int, ...]] = {}


def _cache_of(kwargs: dict[str, Any]) -> Any:
    """The KV cache that a pass is given; transformers 5.24 named it anew."""
    return kwargs.get("cache", kwargs.get("past_key_values"))
