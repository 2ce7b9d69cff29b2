"""How a trial ended, and what the trials of one configuration say together."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from harness.measure.stats import median
from harness.search.space import Params
from runtime.errors import UsageError
from runtime.machine import parse_bytes


class Kind(enum.StrEnum):
    """The outcomes.

    All but three say that the configuration cannot be used, not that the search failed. `ok` was measured; `hopeless`
    was stopped early, since what it had shown was worse than another configuration in every objective;
    `environment_changed` says nothing about the configuration.
    """

    OK = "ok"
    TOO_LARGE = "too_large"
    """Predicted not to fit, and not launched."""
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    CRASH = "crash"
    WRONG_TOKENS = "wrong_tokens"
    ERROR = "error"
    HOPELESS = "hopeless"
    ENVIRONMENT = "environment_changed"


FAILURES = frozenset(Kind) - {Kind.OK, Kind.HOPELESS, Kind.ENVIRONMENT}
"""Outcomes that make a configuration unusable."""
OUT_OF_MEMORY = frozenset({Kind.TOO_LARGE, Kind.OUT_OF_MEMORY})


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
    """`message` says why it is not ok; `result` is what the trial's process answered.

    `cpu_s` is the CPU time of that process, `cpu_wait_share` the share of the time in which its main thread could have
    run but waited for a CPU (None: not known), `environment` what went on beside it (`harness.measure.environment`);
    `foretold_ms` the latency that the simulator expected beforehand.
    """

    kind: Kind
    message: str = ""
    result: dict[str, Any] | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    cpu_wait_share: float | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    foretold_ms: float | None = None

    @property
    def measurement(self) -> Measurement:
        """The result of a trial that measured; ValueError for one that is not ok."""
        if self.kind is not Kind.OK or self.result is None:
            raise ValueError(f"a trial that ended with {self.kind} has no measurement")
        return Measurement(**{**self.result, "notes": tuple(self.result.get("notes", ()))})

    @property
    def was_launched(self) -> bool:
        """False for one that was predicted not to fit."""
        return self.kind is not Kind.TOO_LARGE


@dataclass(frozen=True)
class Record:
    """One finished trial. `reused` marks a duplicate that was told what was known and not run; `source` says who
    proposed it: default, seed, simulator, sampler, or, at the end, repeat or verify."""

    number: int
    params: Params
    outcome: Outcome
    reused: bool
    source: str = "sampler"


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
    def ttft_ms_p50(self) -> float:
        """Median over the runs."""
        return median([run.ttft_ms_p50 for run in self.runs])

    @property
    def tpot_ms_p50(self) -> float | None:
        """Median over the runs; None where no request had a second token."""
        known = [run.tpot_ms_p50 for run in self.runs if run.tpot_ms_p50 is not None]
        return median(known) if known else None

    @property
    def tokens_per_s(self) -> float:
        """Median over the runs."""
        return median([run.tokens_per_s for run in self.runs])

    @property
    def peak_memory_bytes(self) -> int:
        """The highest of the runs: it is a promise."""
        return max(run.peak_memory_bytes for run in self.runs)


@dataclass(frozen=True)
class Limits:
    """What the user will not have exceeded; None: no limit.

    Attributes:
        max_memory_bytes: on the peak. slo_tpot_ms, slo_ttft_ms: on the medians over requests.
    """

    max_memory_bytes: int | None = None
    slo_tpot_ms: float | None = None
    slo_ttft_ms: float | None = None

    @classmethod
    def parse(cls, max_memory: str | None, slo_tpot_ms: float | None, slo_ttft_ms: float | None) -> Limits:
        """From the options of a command line; UsageError where one is no limit."""
        for option, value in (("--slo-tpot", slo_tpot_ms), ("--slo-ttft", slo_ttft_ms)):
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{option} {value:g}: milliseconds above 0 are needed")
        return cls(None if max_memory is None else parse_bytes(max_memory), slo_tpot_ms, slo_ttft_ms)

    def excess(self, one: Tried) -> dict[str, float]:
        """How far above each limit, as a share of it, by its name: 0.1 is 10 % too much, below 0 is within.

        Every limit is there, in one order; one that is not set is at -1.
        """
        return self.excess_of(one.peak_memory_bytes, one.tpot_ms_p50, one.ttft_ms_p50)

    def excess_of(self, peak_memory_bytes: float, tpot_ms: float | None, ttft_ms: float) -> dict[str, float]:
        """See `excess`, of figures that were not measured together."""
        pairs = {
            "memory": (peak_memory_bytes, self.max_memory_bytes),
            "slo_tpot": (tpot_ms, self.slo_tpot_ms),
            "slo_ttft": (ttft_ms, self.slo_ttft_ms),
        }
        return {
            name: -1.0 if value is None or limit is None else value / limit - 1
            for name, (value, limit) in pairs.items()
        }

    def allow(self, one: Tried) -> bool:
        """True when nothing is exceeded."""
        return all(value <= 0 for value in self.excess(one).values())


def feasible(tried: Iterable[Tried], limits: Limits) -> list[Tried]:
    """Those within the limits, fastest first."""
    return sorted((one for one in tried if limits.allow(one)), key=lambda one: one.latency_ms_p50)


def front(tried: Sequence[Tried]) -> list[Tried]:
    """The configurations that no other beats in latency and peak memory at once, fastest first."""
    best: list[Tried] = []
    for one in sorted(tried, key=lambda one: (one.latency_ms_p50, one.peak_memory_bytes)):
        if not best or one.peak_memory_bytes < best[-1].peak_memory_bytes:
            best.append(one)
    return best
