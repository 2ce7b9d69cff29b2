"""Which systems a GPU bench visits, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.measure.gpu_figures import ACCELERATE, ON_DEMAND, SYNCHRONOUS
from harness.measure.process import Kind

NO_PREFETCH = {"prefetch.depth": 0, "predictor.kind": "none"}


@dataclass(frozen=True)
class Visit:
    """One configuration of a system. Those that name the same `system` share its process.

    `warms_all`: every request is decoded once before any is timed, so that all that it needs is there.
    """

    name: str
    system: str
    kind: Kind
    overrides: Mapping[str, Any] = field(default_factory=dict)
    most_blocks: int = 100
    has_prefill: bool = True
    warms_all: bool = False


def visits(top_k: int) -> Iterator[Visit]:
    """In the order in which they are made: the most telling first."""

    def residency(share: str, **more: Any) -> Visit:
        overrides = {"cache.slots": f"{share}%", **NO_PREFETCH}
        return Visit(f"{share} %", "offloaded", "gpu_engine", overrides, **more)

    lru = {"cache.policy": "lru", **NO_PREFETCH}
    yield residency("25")
    yield residency("6.25")
    yield residency("100", warms_all=True)
    yield Visit(ACCELERATE, ACCELERATE, "gpu_accelerate", most_blocks=3, has_prefill=False)
    yield residency("10")
    yield residency("50")
    yield Visit(ON_DEMAND, ON_DEMAND, "gpu_engine", {"cache.slots": top_k, **lru})
    # A prompt streams whole layers, which nobody does who waits for each copy.
    waits = {"cache.slots": "25%", **lru}
    yield Visit(SYNCHRONOUS, SYNCHRONOUS, "gpu_synchronous", waits, has_prefill=False)
    yield Visit("transformers", "transformers", "gpu_plain")
    yield Visit("25 %, LRU", "offloaded", "gpu_engine", {"cache.slots": "25%", **lru})
    yield Visit("25 %, prefetch", "offloaded", "gpu_engine", {"cache.slots": "25%", "prefetch.on_trial": False})
