"""The promise on memory: loading, a prompt of 512 tokens and 64 tokens more stay within slots + dense + 500 MB."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from harness.measure.blocks import CALL_TIMEOUT_S
from harness.measure.limits import ModelBytes
from harness.measure.process import Spec, start
from harness.measure.workload import TokenRequest
from runtime.machine import format_bytes

ALLOWANCE_BYTES = 500_000_000


@dataclass(frozen=True)
class MemoryCheck:
    """Peak resident memory of a whole process against its promise."""

    peak_resident_bytes: int
    dense_bytes: int
    num_slots: int
    slot_bytes: int
    allowance_bytes: int = ALLOWANCE_BYTES

    @property
    def promised_bytes(self) -> int:
        """slots + dense + allowance."""
        return self.dense_bytes + self.num_slots * self.slot_bytes + self.allowance_bytes

    @property
    def passed(self) -> bool:
        """True within the promise."""
        return self.peak_resident_bytes <= self.promised_bytes

    def describe(self) -> str:
        """The verdict in one line."""
        slots = f"{self.num_slots} slots {format_bytes(self.num_slots * self.slot_bytes)}"
        promise = f"{slots} + dense {format_bytes(self.dense_bytes)} + {format_bytes(self.allowance_bytes)}"
        verdict = "PASS" if self.passed else "OVER"
        return (
            f"{verdict}: peak resident memory {format_bytes(self.peak_resident_bytes)} of load, prompt and decode; "
            f"promised {format_bytes(self.promised_bytes)} = {promise}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "promised_bytes": self.promised_bytes, "passed": self.passed}


def check_memory(spec: Spec, sizes: ModelBytes, request: TokenRequest) -> MemoryCheck:
    """Load the engine that `spec` describes in a process of its own, run `request`, and compare its peak.

    Raises:
        ContenderFailed: it did not run.
    """
    with start("memory-check", spec, limit_bytes=None, use_cgroup=False) as process:
        prompt, output = list(request.prompt_ids), list(request.output_ids)
        answer = process.ask("run", timeout_s=CALL_TIMEOUT_S, prompt_ids=prompt, output_ids=output)
        slots = process.facts["slots"]
    return MemoryCheck(answer["peak_resident_bytes"], sizes.dense_bytes, slots, sizes.slot_bytes)
