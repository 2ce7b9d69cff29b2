"""Memory before launch: what a configuration will need, as a sum, from the sizes of the model and of a bare process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime import machine
from runtime.machine import MemorySum

if TYPE_CHECKING:
    from runtime.build import ModelFacts


@dataclass(frozen=True)
class MemoryModel:
    """Peak resident memory of a process that serves one model.

    Attributes:
        buffer_bytes: the bare process (interpreter, torch, transformers) and what loading and activations take.
        kv_bytes_per_sequence: KV cache of one sequence at the workload's context; 0 where it is not known.
    """

    num_experts: int
    slot_bytes: int
    dense_bytes: int
    buffer_bytes: int
    kv_bytes_per_sequence: int

    @classmethod
    def of(cls, facts: ModelFacts, *, process_bytes: int, context: int) -> MemoryModel:
        """The sum that `runtime.build` makes on loading, for a process that is yet to start.

        Args:
            facts: `runtime.build.describe`.
            process_bytes: resident memory of a process that has imported the engine and loaded nothing.
            context: tokens of the longest sequence.
        """
        from runtime.build import BUFFER_BYTES

        kv_bytes = machine.kv_cache_bytes(facts.config, context, batch=1, dtype_bytes=facts.dtype.itemsize)
        return cls(facts.num_experts_total, facts.slot_bytes, facts.dense_bytes, process_bytes + BUFFER_BYTES, kv_bytes)

    def predict(self, num_slots: int, group: int) -> MemorySum:
        """The sum for `num_slots` slots and `group` sequences decoded together."""
        kv_bytes = group * self.kv_bytes_per_sequence
        return machine.required_bytes(self.dense_bytes, num_slots, self.slot_bytes, kv_bytes, self.buffer_bytes)

    def slots_that_fit(self, limit_bytes: int, group: int) -> int:
        """The most slots, at most all experts, with which the sum for `group` sequences stays within `limit_bytes`.

        Raises:
            BudgetError: not even one fits.
        """
        kv_bytes = group * self.kv_bytes_per_sequence
        fit = machine.slots_that_fit(limit_bytes, self.dense_bytes, self.slot_bytes, kv_bytes, self.buffer_bytes)
        return min(self.num_experts, fit)
