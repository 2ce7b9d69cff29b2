"""The engine: a transformers model whose experts come and go, and its counters."""

from __future__ import annotations

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
from runtime.errors import UsageError
from runtime.experts import Kernel, LayerRunner, Reroute
from runtime.model import read_tokenizer
from runtime.passes import PassTracker
from runtime.pool import Pool
from runtime.predictors.artifact import Artifact, check_target, write_artifact
from runtime.profile import Profile
from runtime.telemetry import EngineStats, engine_stats
from runtime.trace import RoutingTrace, TraceRecorder
from runtime.vocabulary import Load, Pass, Phase

if TYPE_CHECKING:
    from runtime.predictors.gate_lookahead import RankedLookahead

RoutingObserver = Callable[[int, npt.NDArray[np.int64], torch.Tensor], None]
"""Is told a layer (from 0), its router's choice [tokens, top_k] and the weights of that, [tokens, top_k]."""

LOOKAHEAD_MARGIN = 3
"""Experts beyond top_k of each recorded lookahead: recall@(k + 3) can be told from it."""


class Engine:
    """What `runtime.load` returns.

    Attributes:
        model: an ordinary transformers model: `generate`, streaming, sampling, batches. It cannot be saved.
        profile: the configuration that runs, with every size resolved.
        kernels: the kernel class of each phase; may be changed between passes.
        source: the checkpoint.
        passes: follows the model's forward passes.
        needed_loads: loads that the run needed, in order, where `record_loads` was asked for.
    """

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
    ) -> None:
        self.model, self.profile, self.source, self.kernels = model, profile, source, kernels
        self._notes, self.needed_loads = tuple(notes), needed_loads
        self._runners, self._pools, self.passes = tuple(runners), tuple(pools), passes
        self._expert_bytes, self._ranked_lookahead = expert_bytes, ranked_lookahead
        self._recorder: TraceRecorder | None = None
        self._stop_trace: Callable[[], None] = lambda: None
        self._num_passes = self._num_tokens = 0
        self.on_pass(self._count)

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each thing that was decided or left out, on loading or since."""
        verdicts = [pool.coordinator.governor.verdict for pool in self._pools]
        return (*self._notes, *(verdict for verdict in verdicts if verdict is not None))

    @property
    def num_pools(self) -> int:
        """Expert shapes, each with slots of its own; 0 for a resident model."""
        return len(self._pools)

    def on_pass(self, listener: Callable[[Pass], None]) -> None:
        """Call `listener` at the beginning of every forward pass."""
        self.passes.listeners.append(listener)

    def observe_routing(self, observer: RoutingObserver) -> Callable[[], None]:
        """Show `observer` every layer's routing from now on, until what this returns is called."""
        own = [partial(observer, layer) for layer in range(len(self._runners))]
        for runner, observe in zip(self._runners, own, strict=True):
            runner.observers.append(observe)

        def stop() -> None:
            for runner, observe in zip(self._runners, own, strict=True):
                runner.observers.remove(observe)

        return stop

    @contextmanager
    def without_experts(self) -> Iterator[None]:
        """Passes in which experts add nothing: none is loaded, nobody is told of them and nothing is counted."""
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
            transfers=[pool.coordinator.transfer.stats() for pool in self._pools],
            num_passes=self._num_passes,
            num_tokens=self._num_tokens,
            peak_resident_bytes=machine.peak_resident_bytes(),
        )

    def reset_stats(self) -> None:
        """Set the counters to zero; what is cached stays."""
        self._num_passes = self._num_tokens = 0
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
        self.on_pass(recorder.begin)
        stop_observing = self.observe_routing(partial(_record, recorder, ranked))

        def stop() -> None:
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

        An engine whose `predictor.artifact` names that file starts with it. Call it between passes.

        Raises:
            UsageError, ArtifactError: see `predictor_file`.
        """
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
        for pool in self._pools:
            pool.coordinator.residency.check_integrity()

    def replay_loads(self, loads: Sequence[Load]) -> float:
        """Seconds that `loads` take through this engine's transfer alone, as fast as it goes; what was cached is put
        back.

        Only for an engine with one pool, as all models but those with differing experts have.
        """
        (pool,) = self._pools
        pool.coordinator.transfer.drain()
        start = time.perf_counter()
        pool.replay(loads)
        elapsed = time.perf_counter() - start
        pool.restore()
        return elapsed

    def close(self) -> None:
        """Stop the I/O threads and close the files. The model cannot run afterwards. Idempotent."""
        for pool in self._pools:
            pool.coordinator.transfer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count(self, passing: Pass) -> None:
        self._num_passes += 1
        self._num_tokens += passing.num_tokens


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
    layer: int,
    choice: npt.NDArray[np.int64],
    weights: torch.Tensor,
) -> None:
    predicted = None if ranked is None else ranked(layer, choice.shape[1] + LOOKAHEAD_MARGIN)
    recorder.record(layer, choice, weights.detach().float().cpu().numpy(), predicted)
