"""Stand-ins for contender processes: they answer at a given speed, and need a given amount of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from harness.measure.process import ContenderFailed, Spec


class FakeProcess:
    """Decodes at `tokens_per_s`; predicts `prediction` at every step. Dies in block `dies_at` of its life."""

    def __init__(self, tokens_per_s: float, prediction: int = 7, dies_at: int | None = None, **facts: Any) -> None:
        self.tokens_per_s, self.prediction, self.facts = tokens_per_s, prediction, facts
        self.dies_at, self.asked, self.peak_bytes = dies_at, [], 1000

    def ask(self, op: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        self.asked.append(op)
        if self.dies_at is not None and self.asked.count("run") > self.dies_at:
            raise ContenderFailed("killed by the kernel: out of memory", out_of_memory=True)
        if op == "replay_loads":
            return {"replay_s": 0.5}
        num_tokens = len(arguments["output_ids"])
        self.peak_bytes += 1
        counted = (
            {
                "needed_loads": 4,
                "stats": {"num_lookups": 8, "num_hits": 6, "stall_s": 1.0, "busy_s": 9.0, "num_loads": 4},
            }
            if "slots" in self.facts
            else {}
        )
        return {
            "decode_s": (num_tokens - 1) / self.tokens_per_s,
            "decode_tokens": num_tokens - 1,
            "ttft_ms": 5.0,
            "predicted_ids": [self.prediction] * num_tokens,
            "read_bytes": 100 * (num_tokens - 1),
            "peak_resident_bytes": 2000,
            "demands": [[0, 1], [2, 3]],
            **counted,
        }


class Arena:
    """Where fakes start: `needs` says how much memory a spec needs, `speed` how fast it is. Counts who is running."""

    def __init__(self, needs: Callable[[Spec], int], speed: Callable[[Spec], float]) -> None:
        self.needs, self.speed = needs, speed
        self.running: list[Spec] = []
        self.limits_tried: list[int | None] = []

    @contextmanager
    def start(self, name: str, spec: Spec, *, limit_bytes: int | None, use_cgroup: bool) -> Iterator[FakeProcess]:
        self.limits_tried.append(limit_bytes)
        if limit_bytes is not None and self.needs(spec) > limit_bytes:
            raise ContenderFailed("killed by the kernel: out of memory", out_of_memory=True)
        self.running.append(spec)
        slots = {"slots": spec.overrides["cache.slots"]} if spec.kind == "engine" else {}
        try:
            yield FakeProcess(self.speed(spec), **slots)
        finally:
            self.running.remove(spec)
