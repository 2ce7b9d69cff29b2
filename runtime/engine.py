"""The engine: a transformers model whose experts come and go, and its counters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runtime import machine
from runtime.devices import finish, peak_bytes
from runtime.errors import UsageError
from runtime.experts import LayerRunner, Reroute
from runtime.kernels import Kernel
from runtime.latency import LatencyWatch
from runtime.model import read_tokenizer
from runtime.passes import PassTracker
from runtime.pool import Pool
from runtime.predictors.artifact import Artifact, check_target, write_artifact
from runtime.pressure import PressureWatch
from runtime.profile import MatchResult, Profile
from runtime.readback import Reader, as_array
from runtime.slot_budget import SlotBudget
from runtime.telemetry import EngineStats, SlotStats, engine_stats
from runtime.trace import RoutingTrace, TraceRecorder
from runtime.transfer.base import TransferStats
from runtime.vocabulary import Load, Pass, Phase

if TYPE_CHECKING:
    from runtime.predictors.gate_lookahead import RankedLookahead

RoutingObserver = Callable[[int, npt.NDArray[np.int64], torch.Tensor], None]
"""Is told a layer (from 0), its router's choice [tokens, top_k] and the weights of that, [tokens, top_k]."""

LOOKAHEAD_MARGIN = 3
"""Experts beyond top_k of each recorded lookahead: recall@(k + 3) can be told from it."""


class Engine:
    """What `runtime.load` returns.

    Any thread may call the model and the engine: forward passes, and whatever must not meet one, run one at a time.

    Attributes:
        model: an ordinary transformers model: `generate`, streaming, sampling, batches. It cannot be saved.
        profile: the configuration that was loaded, with every size resolved.
        kernels: the kernel class of each phase; may be changed between passes.
        source: the checkpoint.
        match: how the profile that was named, or found, fits this model and machine; None: none was.
        passes: follows the model's forward passes.
        latency: times them.
        pressure: says when memory is short; then fewer slots are used until it is free again. None: nobody looks, as
            where the slots are a GPU's.
        needed_loads: loads that the run needed, in order, where `record_loads` was asked for.
    """

    match: MatchResult | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        profile: Profile,
        source: str,
        runners: Sequence[LayerRunner],
        kernels: dict[Phase, type[Kernel]],
        passes: PassTracker,
        pools: Sequence[Pool] = (),
        notes: Sequence[str] = (),
        needed_loads: list[Load] | None = None,
        *,
        expert_bytes: int,
        ranked_lookahead: Callable[[int], RankedLookahead | str],
        read: Reader,
    ) -> None:
        self.model, self.profile, self.source, self.kernels = model, profile, source, kernels
        self._notes, self.needed_loads = tuple(notes), needed_loads
        self._runners, self._pools, self.passes = tuple(runners), tuple(pools), passes
        self._expert_bytes, self._ranked_lookahead, self._read = expert_bytes, ranked_lookahead, read
        self._recorder: TraceRecorder | None = None
        self._stop_trace: Callable[[], None] = lambda: None
        self._num_passes = self._num_tokens = 0
        passes.on_failure.append(self._recover)
        self._slots = SlotBudget(pools)
        # What the host is short of, a GPU's slots cannot give back.
        self.pressure: PressureWatch | None = PressureWatch() if self._slots.is_on_host else None
        self.on_pass(self._count)
        passes.listeners.insert(0, self._follow_pressure)  # before the pools use their slots
        self.latency = LatencyWatch()
        passes.listeners.insert(0, self.latency.begin)  # what pools do at the beginning of a pass takes time, too
        self.on_pass_end(self.latency.end)
        self._before_reset, self._reset_lock = EngineStats(), threading.Lock()

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each thing that was decided or left out, on loading or since."""
        verdicts = [pool.coordinator.governor.verdict for pool in self._pools]
        return (*self._notes, *(verdict for verdict in verdicts if verdict is not None), *self._slots.notes)

    @property
    def num_pools(self) -> int:
        """Expert shapes, each with slots of its own; 0 for a resident model."""
        return len(self._pools)

    @property
    def num_slots(self) -> int:
        """Expert slots in use now, over all pools; 0 for a resident model."""
        return self._slots.num_slots

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """No other thread's passes meanwhile; waits for the one that runs.

        Raises:
            UsageError: the engine was closed.
        """
        with self.passes.alone():
            yield

    def shrink(self, num_slots: int) -> int:
        """Use at most `num_slots` expert slots from now on, over all pools in proportion; waits for a running pass, or
        another thread's `run_batch`.

        The experts most worth keeping, by the policy, stay without being read again, and the slots' memory goes back to
        the system.

        Returns:
            bytes that the system has back; 0 where so few slots are in use already, or where the device keeps them.

        Raises:
            BudgetError: less than one slot for each pool, or more than the engine was loaded with.
            UsageError: called within a pass, or the engine was closed; a resident model has no slots.
        """
        with self._between_passes():
            return self._slots.shrink(num_slots)

    def grow(self, num_slots: int | None = None) -> None:
        """Use up to `num_slots` expert slots again, at most those that the engine was loaded with; None: all of these.

        They fill, and take memory, as experts are needed. See `shrink` for what is raised.
        """
        with self._between_passes():
            self._slots.grow(num_slots)

    def set_memory_limit(self, limit_bytes: int | None) -> None:
        """Keep the resident memory of this process within `limit_bytes` as far as expert slots can: at once, and, while
        `pressure` looks, before later passes. None: no limit but the machine's.

        Raises:
            BudgetError: not even one slot for each pool fits beside the rest of the process.
            UsageError: as for `shrink`, or the slots are a GPU's.
        """
        with self._between_passes():
            if limit_bytes is not None:
                watch = self.pressure or PressureWatch()
                self._slots.fit(limit_bytes, watch)
                self.pressure = watch
            elif self.pressure is not None:
                self.pressure.limit_bytes = None

    def on_pass(self, listener: Callable[[Pass], None]) -> None:
        """Call `listener` at the beginning of every forward pass."""
        with self.passes.lock:
            self.passes.listeners.append(listener)

    def on_pass_end(self, listener: Callable[[Pass], None]) -> None:
        """Call `listener` at the end of every forward pass that ends well."""
        with self.passes.lock:
            self.passes.end_listeners.append(listener)

    def observe_routing(self, observer: RoutingObserver) -> Callable[[], None]:
        """Show `observer` every layer's routing from now on, until what this returns is called."""
        own = [partial(observer, layer) for layer in range(len(self._runners))]
        with self.passes.lock:
            for runner, observe in zip(self._runners, own, strict=True):
                runner.observers.append(observe)

        def stop() -> None:
            with self.passes.lock:
                for runner, observe in zip(self._runners, own, strict=True):
                    runner.observers.remove(observe)

        return stop

    @contextmanager
    def without_experts(self) -> Iterator[None]:
        """Passes in which experts add nothing: none is loaded, nobody is told of them and nothing is counted."""
        with self.passes.alone():
            for runner in self._runners:
                runner.module._expertflow = _no_expert
            try:
                with self.passes.unseen():
                    yield
            finally:
                for runner in self._runners:
                    runner.module._expertflow = runner

    @contextmanager
    def rerouted(self, reroutes: Mapping[int, Reroute]) -> Iterator[None]:
        """Passes in which the choice of the routers of these layers (from 0) is replaced."""
        runners = {self._runners[layer]: reroute for layer, reroute in reroutes.items()}
        with self.passes.alone():
            before = {runner: runner.reroute for runner in runners}
            for runner, reroute in runners.items():
                runner.reroute = reroute
            try:
                yield
            finally:
                for runner, own in before.items():
                    runner.reroute = own

    @property
    def routing_shape(self) -> tuple[int, int]:
        """MoE layers, and the most experts that one of them has."""
        return len(self._runners), max(int(runner.module.num_experts) for runner in self._runners)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer. Raises CheckpointError where it has none."""
        return read_tokenizer(self.source)

    def stats(self) -> EngineStats:
        """Counters since loading or the last `reset_stats`; all zero for a resident model."""
        return engine_stats(
            residencies=[pool.coordinator.residency.counts() for pool in self._pools],
            transfers=self.transfer_stats(),
            num_passes=self._num_passes,
            num_tokens=self._num_tokens,
            peak_resident_bytes=machine.peak_resident_bytes(),
            latency=self.latency.stats(),
            slots=[_slots(pool) for pool in self._pools],
            peak_gpu_bytes=peak_bytes(self.model.device),
        )

    def transfer_stats(self) -> list[TransferStats]:
        """Of each pool; a part of `stats` that is cheap enough to be asked for after every pass."""
        return [pool.coordinator.transfer.stats() for pool in self._pools]

    def lifetime_stats(self) -> EngineStats:
        """Counters since loading, whatever was reset since: none ever falls. Any thread may ask."""
        with self._reset_lock:
            return self._before_reset + self.stats()

    def reset_stats(self) -> None:
        """Set the counters to zero; what is cached stays."""
        with self.passes.lock, self._reset_lock:
            self._before_reset += self.stats()
            self._num_passes = self._num_tokens = 0
            self.latency.reset()
            for pool in self._pools:
                pool.coordinator.residency.reset_counts()
                pool.coordinator.transfer.reset_stats()
        if self.needed_loads is not None:
            self.needed_loads.clear()

    def start_trace(self, meta: dict[str, Any] | None = None, *, lookahead: int = 0) -> None:
        """Record the routing of every pass from now on; what was recorded before is given up.

        Args:
            meta: added to the trace's own.
            lookahead: layers ahead for which each layer's gate lookahead is recorded too (`RoutingTrace.predicted`),
                the likeliest top_k + 3 experts of each; 0: none. Where the model's routers need more than the hidden
                state there is none either, and `notes` says so.
        """
        self._stop_trace()
        ranked = self._ranked_lookahead(lookahead) if lookahead else None
        if isinstance(ranked, str):
            self._notes += (f"no gate lookahead is recorded: {ranked}",)
            ranked = None
        facts = {"model": checkpoint_name(self.source), "expert_bytes": self._expert_bytes}
        recorder = TraceRecorder(*self.routing_shape, {**facts, **(meta or {})})
        with self.passes.lock:
            self.on_pass(recorder.begin)
            stop_observing = self.observe_routing(partial(_record, recorder, ranked, self._read))

        def stop() -> None:
            with self.passes.lock:
                self.passes.listeners.remove(recorder.begin)
                stop_observing()
            if ranked is not None:
                ranked.close()

        self._recorder, self._stop_trace = recorder, stop

    def trace(self) -> RoutingTrace:
        """The routing recorded since `start_trace`, which must have been called."""
        assert self._recorder is not None, "start_trace() was not called"
        return self._recorder.trace()

    def predictor_file(self, path: str | Path | None = None) -> Path:
        """Where `save_predictor` writes: `path`, else to the profile's `predictor.artifact`.

        Raises:
            UsageError: the predictor learns nothing while running, or no file is named.
            ArtifactError: the file cannot be written, or is something else that would be lost.
        """
        learned = self._learned()
        named = path or self.profile.predictor.artifact
        if named is None:
            raise UsageError("no file to save the predictor to: name one, or set predictor.artifact in the profile")
        check_target(named, learned.kind, learned.shape)
        return Path(named)

    def save_predictor(self, path: str | Path | None = None) -> Path:
        """Write what the predictor has learned so far to `predictor_file(path)`, wholly or not at all.

        An engine whose `predictor.artifact` names that file starts with it. Waits for a running pass.

        Raises:
            UsageError, ArtifactError: see `predictor_file`.
        """
        with self.passes.lock:
            file = self.predictor_file(path)
            write_artifact(file, self._learned())
        return file

    def _learned(self) -> Artifact:
        if len(self._pools) > 1:
            raise UsageError("a predictor cannot be saved for a model with several expert shapes")
        model = checkpoint_name(self.source)
        for pool in self._pools:
            if (learned := pool.coordinator.predictor.artifact(model)) is not None:
                return learned
        raise UsageError(
            f"predictor {self.profile.predictor.kind!r} learns nothing here that could be saved: "
            "activation_matrix does, while something goes by it (prefetch.depth or the policy)"
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if the cache's bookkeeping contradicts itself."""
        with self.passes.lock:
            for pool in self._pools:
                pool.coordinator.residency.check_integrity()

    def replay_loads(self, loads: Sequence[Load]) -> float:
        """Seconds that `loads` take through this engine's transfer alone, as fast as it goes; what was cached is put
        back.

        Only for an engine with one pool, as all models but those with differing experts have.
        """
        (pool,) = self._pools
        with self._between_passes():
            finish(self.model.device)  # the last pass may have computed on another stream, and still use the slots
            pool.coordinator.transfer.drain()
            start = time.perf_counter()
            pool.replay(loads)
            elapsed = time.perf_counter() - start
            pool.restore()
        return elapsed

    def close(self) -> None:
        """Stop the I/O threads and close the files, after the pass that runs. The model cannot run afterwards.

        Idempotent. Any thread may call it, but no signal handler: that interrupts what this waits for.
        """
        self.passes.close()
        for pool in self._pools:
            pool.coordinator.transfer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _between_passes(self) -> Iterator[None]:
        with self.passes.alone():
            if self.passes.is_running:
                raise UsageError("expert slots change between passes only: not from within one")
            yield

    def _follow_pressure(self, passing: Pass) -> None:
        if self.pressure is not None:
            self._slots.follow(self.pressure)

    def _recover(self) -> None:
        for pool in self._pools:
            pool.coordinator.recover()

    def _count(self, passing: Pass) -> None:
        self._num_passes += 1
        self._num_tokens += passing.num_tokens


def _slots(pool: Pool) -> SlotStats:
    residency = pool.coordinator.residency
    return SlotStats(residency.num_slots, residency.num_slots - residency.num_free, pool.arena.slot_bytes)


def checkpoint_name(source: str) -> str:
    """What a checkpoint is called wherever it lies: its hub id, else the name of its folder."""
    if not Path(source).exists():
        return source
    folder = Path(source).resolve()
    cached = [part for part in folder.parts if part.startswith("models--")]  # the hub's cache: models--owner--name
    return cached[-1].removeprefix("models--").replace("--", "/", 1) if cached else folder.name


def _no_expert(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(hidden)


def _record(
    recorder: TraceRecorder,
    ranked: RankedLookahead | None,
    read: Reader,
    layer: int,
    choice: npt.NDArray[np.int64],
    weights: torch.Tensor,
) -> None:
    asked = None if ranked is None else ranked.ask(layer)
    shares, *answers = map(as_array, read([weights.detach().float(), *(asked or ())]))
    predicted = None
    if ranked is not None and asked is not None:
        predicted = ranked.ranked(layer, answers, len(choice), choice.shape[1] + LOOKAHEAD_MARGIN)
    recorder.record(layer, choice, shares, predicted)
