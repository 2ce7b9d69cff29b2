"""The engine: a transformers model whose experts come and go, and its counters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from runtime import machine
from runtime.passes import PassTracker
from runtime.pool import Pool
from runtime.profile import Profile
from runtime.telemetry import EngineStats, engine_stats
from runtime.trace import RoutingTrace, TraceRecorder
from runtime.vocabulary import Load, Pass


class Engine:
    """What `runtime.load` returns.

    Attributes:
        model: an ordinary transformers model: `generate`, streaming, sampling, batches. It cannot be saved.
        profile: the configuration that runs, with every size resolved.
        notes: one line for each thing that was decided or left out on loading.
        needed_loads: loads that the run needed, in order, where `record_loads` was asked for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        profile: Profile,
        pools: Sequence[Pool],
        passes: PassTracker,
        source: str,
        notes: Sequence[str] = (),
        needed_loads: list[Load] | None = None,
    ) -> None:
        self.model, self.profile, self.notes = model, profile, tuple(notes)
        self.needed_loads = needed_loads
        self.recorder: TraceRecorder | None = None
        self._pools, self._source = tuple(pools), source
        self._num_passes = self._num_tokens = 0
        passes.listeners.append(self._count)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        return AutoTokenizer.from_pretrained(self._source)

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
        """Record the routing of every pass from now on; see `trace`."""
        raise NotImplementedError

    def trace(self) -> RoutingTrace:
        """The routing recorded since `start_trace`."""
        raise NotImplementedError

    def replay_loads(self, loads: Sequence[Load]) -> float:
        """Seconds that `loads` take through this engine's transfer alone, as fast as it goes; what was cached is put back.

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
