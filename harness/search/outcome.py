"""How a trial ended, and what the trials of one configuration say together."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from harness.measure.stats import median
from harness.search.space import Params


class Kind(enum.StrEnum):
    """The outcomes. All but `ok` say that the configuration cannot be used, not that the search failed."""

    OK = "ok"
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    CRASH = "crash"
    WRONG_TOKENS = "wrong_tokens"
    ERROR = "error"


@dataclass(frozen=True)
class Measurement:
    """One run of a workload. `slots` is what the engine resolved; `stats` are its counters over the run."""

    latency_ms_p50: float
    ttft_ms_p50: float
    tpot_ms_p50: float | None
    tokens_per_s: float
    tokens_sha256: str
    peak_memory_bytes: int
    slots: int
    load_s: float
    run_s: float
    num_tokens: int
    stats: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """`message` says why it is not ok; `result` is what the trial's process answered."""

    kind: Kind
    message: str = ""
    result: dict[str, Any] | None = None
    wall_s: float = 0.0

    @property
    def measurement(self) -> Measurement:
        """The result of a trial that measured; ValueError for one that is not ok."""
        if self.kind is not Kind.OK or self.result is None:
            raise ValueError(f"a trial that ended with {self.kind} has no measurement")
        return Measurement(**{**self.result, "notes": tuple(self.result.get("notes", ()))})


@dataclass(frozen=True)
class Record:
    """One finished trial. `reused` marks a duplicate that was told what was known and not run."""

    number: int
    params: Params
    outcome: Outcome
    reused: bool


@dataclass(frozen=True)
class Tried:
    """One configuration and its runs that went well (at least one); medians are pooled over them."""

    params: Params
    runs: tuple[Measurement, ...]

    @property
    def latency_ms_p50(self) -> float:
        """Median over the runs."""
        return median([run.latency_ms_p50 for run in self.runs])

    @property
    def tokens_per_s(self) -> float:
        """Median over the runs."""
        return median([run.tokens_per_s for run in self.runs])

    @property
    def peak_memory_bytes(self) -> int:
        """The highest of the runs: it is a promise."""
        return max(run.peak_memory_bytes for run in self.runs)


def feasible(tried: Iterable[Tried], max_memory_bytes: int | None) -> list[Tried]:
    """Those within the limit, fastest first."""
    within = [one for one in tried if max_memory_bytes is None or one.peak_memory_bytes <= max_memory_bytes]
    return sorted(within, key=lambda one: one.latency_ms_p50)


def front(tried: Sequence[Tried]) -> list[Tried]:
    """The configurations that no other beats in latency and peak memory at once, fastest first."""
    best: list[Tried] = []
    for one in sorted(tried, key=lambda one: (one.latency_ms_p50, one.peak_memory_bytes)):
        if not best or one.peak_memory_bytes < best[-1].peak_memory_bytes:
            best.append(one)
    return best
