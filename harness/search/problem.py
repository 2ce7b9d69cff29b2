"""A tuning problem whose optimum can be known: a recorded workload, made-up costs and memory, the grid of a space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.hardware.memory import MemoryModel
from harness.search.costs import Costs
from harness.search.hidden import HiddenMachine, biased
from harness.search.memory_guard import MemoryGuard
from harness.search.simulator import Simulator
from harness.search.space import Setting, Space
from harness.search.tracing import WorkloadTrace, served
from runtime.errors import UsageError
from runtime.profile import Profile
from runtime.trace import read_trace

MAX_GRID = 20_000
FIXED: Mapping[str, Any] = {"predictor.every": 1, "compute.prefill": "grouped_mm", "compute.threads": 1}
"""Knobs that are left out, so that every configuration of the rest can be simulated for every seed."""
_MIB = 1 << 20
_EXPERT_BYTES = _MIB
_DENSE_BYTES, _BUFFER_BYTES, _KV_BYTES = 20 * _MIB, 300 * _MIB, 32 * _MIB
_RESIDENT_SHARE = 0.6
_LOAD_S = {1: 1.2e-3, 2: 0.8e-3, 4: 0.7e-3}
_KERNEL_S = {"eager": 150e-6, "grouped_mm": 180e-6, "gemv": 120e-6}
_TOKENS = {1: 1.0, 8: 1.8, 64: 6.0}  # times the seconds of one token


@dataclass(frozen=True)
class Problem:
    """All but the bias is the same for every seed.

    The sizes are those of the demo widened to experts of 1 MiB, the costs what a probe finds for it on two cores.

    Attributes:
        trace: file of a routing trace with phases. num_output_tokens: of each request, at most.
        concurrency: requests outstanding.
        fixed: profile keys that are not searched.
    """

    trace: Path
    num_output_tokens: int = 12
    concurrency: int = 4
    fixed: tuple[tuple[str, Any], ...] = field(default=tuple(FIXED.items()), hash=False)  # values may be lists

    @cached_property
    def workload(self) -> WorkloadTrace:
        """Raises TraceError for a trace without phases."""
        return served(read_trace(self.trace), self.num_output_tokens)

    @cached_property
    def base(self) -> Profile:
        """What the default configuration is made of."""
        return Profile.default().with_overrides(dict(self.fixed))

    @cached_property
    def memory(self) -> MemoryModel:
        """What the search believes."""
        trace = self.workload.trace
        return MemoryModel(trace.num_layers * trace.num_experts, _EXPERT_BYTES, _DENSE_BYTES, _BUFFER_BYTES, _KV_BYTES)

    @property
    def limit_bytes(self) -> int:
        """Room for a share of the experts and one request."""
        return self.memory.predict(round(_RESIDENT_SHARE * self.memory.num_experts), 1).total_bytes

    @cached_property
    def space(self) -> Space:
        """Raises UsageError for more configurations than can be tabulated."""
        memory = self.memory
        num_slots_fit = memory.slots_that_fit(self.limit_bytes, self.base.scheduler.num_sequences)
        space = Space(Setting(memory.num_experts, num_slots_fit, self.concurrency), self.base, dict(self.fixed))
        if space.size() > MAX_GRID:
            raise UsageError(
                f"a grid of {space.size()} configurations is more than {MAX_GRID}; take a smaller --concurrency"
            )
        return space

    @cached_property
    def simulator(self) -> Simulator:
        """With the coefficients that a search begins with."""
        times = [
            (kernel, 1, num_tokens, seconds * factor)
            for kernel, seconds in _KERNEL_S.items()
            for num_tokens, factor in _TOKENS.items()
        ]
        return Simulator(self.workload, self.base, self.concurrency, Costs.prior(_LOAD_S, times, dense_layer_experts=2))

    def guard(self) -> MemoryGuard:
        """A search's own."""
        return MemoryGuard(self.memory, self.memory, self.space, self.limit_bytes)

    def hidden(self, seed: int, guard: MemoryGuard) -> HiddenMachine:
        """The machine that a search is to be right about."""
        simulator = self.simulator
        hidden = Simulator(self.workload, self.base, self.concurrency, biased(simulator.costs, seed))
        return HiddenMachine(hidden, self.space, guard, seed)
