"""Memory before launch: what a configuration will need, summed from the sizes of the model and of a bare process."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime import machine
from runtime.machine import MemorySum

if TYPE_CHECKING:
    from runtime.facts import ModelFacts


_PROGRAM_BYTES = 8 << 20
"""What a program that serves has imported beyond the engine; without it a profile would be clamped on loading."""


def map_files_like(pid: int) -> None:
    """Map the pages of files, such as libraries, that process `pid` has mapped: the one that this process was forked
    from.

    A fork inherits them unmapped, so that its resident memory would come out some 100 MB below that of a process
    which imported the same on its own. Where the kernel does not tell (/proc/PID/pagemap), nothing is done.
    """
    try:
        with Path(f"/proc/{pid}/pagemap").open("rb") as pagemap:
            for first, last in _file_mappings():
                for address in _present(pagemap.fileno(), first, last):
                    ctypes.string_at(address, 1)
    except OSError:
        return


def _file_mappings() -> Iterator[tuple[int, int]]:
    """First and last address of every readable mapping of a file; devices are not files."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights[0] == "r" and inode != "0" and not name[0].startswith("/dev/"):
            first, last = span.split("-")
            yield int(first, 16), int(last, 16)


def _present(pagemap: int, first: int, last: int) -> Iterator[int]:
    """Addresses of the pages in memory: bit 63 of a page's entry of 8 bytes."""
    entries = os.pread(pagemap, (last - first) // mmap.PAGESIZE * 8, first // mmap.PAGESIZE * 8)
    for page, high_byte in enumerate(entries[7::8]):
        if high_byte & 0x80:
            yield first + page * mmap.PAGESIZE


@dataclass(frozen=True)
class MemoryModel:
    """Peak memory of a process that serves one model: resident in the host, or on the GPU that it computes on.

    Attributes:
        buffer_bytes: the bare process (interpreter, torch, transformers; on a GPU: CUDA's context) and what loading and
            activations take.
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
            facts: `runtime.facts.describe`.
            process_bytes: resident memory of a process that has imported the engine and loaded nothing.
            context: tokens of the longest sequence.
        """
        from runtime.facts import BUFFER_BYTES

        kv_bytes = machine.kv_cache_bytes(facts.config, context, batch=1, dtype_bytes=facts.dtype.itemsize)
        buffer_bytes = process_bytes + BUFFER_BYTES + _PROGRAM_BYTES
        return cls(facts.num_experts_total, facts.slot_bytes, facts.dense_bytes, buffer_bytes, kv_bytes)

    @classmethod
    def of_gpu(cls, facts: ModelFacts, *, context_bytes: int, context: int) -> MemoryModel:
        """The same of a GPU's memory. `runtime.build` leaves out what CUDA itself takes: a profile is not clamped.

        Args:
            context_bytes: of the GPU that a process takes before it loads a model.
        """
        from runtime.facts import cuda_buffer_bytes

        kv_bytes = machine.kv_cache_bytes(facts.config, context, batch=1, dtype_bytes=facts.dtype.itemsize)
        buffer_bytes = context_bytes + cuda_buffer_bytes(facts, context)
        return cls(facts.num_experts_total, facts.slot_bytes, facts.dense_bytes, buffer_bytes, kv_bytes)

    def with_context(self, tokens: int, of: int) -> MemoryModel:
        """The same with sequences of `tokens` tokens, where this one is for `of` tokens."""
        return replace(self, kv_bytes_per_sequence=self.kv_bytes_per_sequence * tokens // of)

    def predict(self, num_slots: int, num_sequences: int) -> MemorySum:
        """The sum for `num_slots` slots and so many sequences under way."""
        kv_bytes = num_sequences * self.kv_bytes_per_sequence
        return machine.required_bytes(self.dense_bytes, num_slots, self.slot_bytes, kv_bytes, self.buffer_bytes)

    def slots_that_fit(self, limit_bytes: int, num_sequences: int) -> int:
        """The most slots, at most all experts, with which the sum for so many sequences stays within `limit_bytes`.

        Raises:
            BudgetError: not even one fits.
        """
        kv_bytes = num_sequences * self.kv_bytes_per_sequence
        fit = machine.slots_that_fit(limit_bytes, self.dense_bytes, self.slot_bytes, kv_bytes, self.buffer_bytes)
        return min(self.num_experts, fit)
