"""The engine: a transformers model whose experts come and go, and its counters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from runtime import machine
from runtime.experts import Kernel, LayerRunner
from runtime.passes import PassTracker
from runtime.pool import Pool
from runtime.profile import Profile
from runtime.telemetry import EngineStats, engine_stats
from runtime.trace import RoutingTrace, TraceRecorder
from runtime.vocabulary import Load, Pass, Phase


class Engine:
    """What `runtime.load` returns.

    Attributes:
        model: an ordinary transformers model: `generate`, streaming, sampling, batches. It cannot be saved.
        profile: the configuration that runs, with every size resolved.
        notes: one line for each thing that was decided or left out on loading.
        kernels: the kernel class of each phase; may be changed between passes.
        source: the checkpoint.
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
    ) -> None:
        self.model, self.profile, self.source, self.kernels = model, profile, source, kernels
        self.notes, self.needed_loads = tuple(notes), needed_loads
        self._runners, self._pools, self._passes = tuple(runners), tuple(pools), passes
        self._recorder: TraceRecorder | None = None
        self._num_passes = self._num_tokens = 0
        self.on_pass(self._count)

    @property
    def num_pools(self) -> int:
        """Expert shapes, each with slots of its own; 0 for a resident model."""
        return len(self._pools)

    def on_pass(self, listener: Callable[[Pass], None]) -> None:
        """Call `listener` at the beginning of every forward pass."""
        self._passes.listeners.append(listener)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        return AutoTokenizer.from_pretrained(self.source)

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

    def start_trace(self, meta: dict[str, Any] | None = None) -> None:
        """Record the routing of every pass from now on; `meta` is added to the trace's own."""
        facts = {"model": self.source, "expert_bytes": self._pools[0].store.expert_bytes if self._pools else None}
        num_experts = max(int(runner.module.num_experts) for runner in self._runners)
        recorder = TraceRecorder(len(self._runners), num_experts, {**facts, **(meta or {})})
        self.on_pass(recorder.begin)
        for layer, runner in enumerate(self._runners):
            runner.observers.append(partial(_record, recorder, layer))
        self._recorder = recorder

    def trace(self) -> RoutingTrace:
        """The routing recorded since `start_trace`, which must have been called."""
        assert self._recorder is not None, "start_trace() was not called"
        return self._recorder.trace()

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


def _record(recorder: TraceRecorder, layer: int, choice: npt.NDArray[np.int64], weights: torch.Tensor) -> None:
    recorder.record(layer, choice, weights.detach().float().cpu().numpy())
