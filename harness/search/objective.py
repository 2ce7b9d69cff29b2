"""What the user wants of a configuration, as one number to make small."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from harness.search.outcome import Tried

SLOWDOWN = 1.05
"""What `memory` may cost: latency over that of the default at most."""


class Objective(enum.StrEnum):
    """`latency`: the fastest. `memory`: the smallest that is hardly slower than the default. `balanced`: the smallest
    product of latency and peak memory."""

    LATENCY = "latency"
    MEMORY = "memory"
    BALANCED = "balanced"

    def cost(self, latency_ms: float, peak_memory_bytes: float) -> float:
        """Positive; a ratio of two costs is how many times better one is."""
        match self:
            case Objective.LATENCY:
                return latency_ms
            case Objective.MEMORY:
                return peak_memory_bytes
            case Objective.BALANCED:
                return latency_ms * peak_memory_bytes

    def rank(self, within: Sequence[Tried], default: Tried | None) -> list[Tried]:
        """The best first; `memory` leaves out what is slower than it may be.

        Args:
            within: configurations within the limits. default: measured, or None where it cannot be used.
        """
        usable = [
            one
            for one in within
            if self is not Objective.MEMORY
            or default is None
            or one.latency_ms_p50 <= SLOWDOWN * default.latency_ms_p50
        ]
        return sorted(usable, key=lambda one: self.cost(one.latency_ms_p50, one.peak_memory_bytes))
