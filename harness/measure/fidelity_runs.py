"""Configurations measured beside the default, and what the simulator and the memory model say of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd

from harness.measure.environment import Surroundings
from harness.search.guide import Simulates
from harness.search.memory_guard import MemoryGuard
from harness.search.outcome import Kind, Measurement, Outcome, Tried
from harness.search.space import Params

Run = Callable[[Params], Outcome]


@dataclass(frozen=True)
class Pair:
    """A configuration between two runs of the default (ABBA, twice measured each), so that drift hits both alike."""

    number: int
    configuration: tuple[Outcome, ...]
    default: tuple[Outcome, ...]

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Pair:
        """From `as_dict`. Raises KeyError, TypeError or ValueError for something else."""
        outcomes = {
            name: tuple(Outcome(**{**one, "kind": Kind(one["kind"])}) for one in found[name])
            for name in ("configuration", "default")
        }
        return cls(int(found["number"]), **outcomes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def is_ok(self) -> bool:
        """All runs went well."""
        return all(one.kind is Kind.OK for one in (*self.configuration, *self.default))

    def runs(self, params: Params, default: Params) -> tuple[Tried, Tried]:
        """Those of the configuration and of the default."""
        mine, other = (tuple(one.measurement for one in of) for of in (self.configuration, self.default))
        return Tried(params, mine), Tried(default, other)


def measure_pairs(
    configurations: Sequence[Params],
    default: Params,
    run: Run,
    done: Sequence[Pair],
    on_pair: Callable[[Pair], None],
) -> None:
    """Measure those that are not `done`: the default, the configuration twice, the default."""
    known = {pair.number for pair in done}
    for number, params in enumerate(configurations):
        if number not in known:
            first, *own, last = [run(one) for one in (default, params, params, default)]
            on_pair(Pair(number, tuple(own), (first, last)))


def watched(run: Run) -> Run:
    """The same, with what went on beside it in each outcome's `environment`."""
    surroundings = Surroundings()

    def watching(params: Params) -> Outcome:
        watch = surroundings.watch()
        outcome = run(params)
        return replace(outcome, environment=watch.end(outcome.cpu_s, outcome.cpu_wait_share).as_dict())

    return watching


def calibrated(
    simulator: Simulates,
    overrides: Callable[[Params], Mapping[str, Any]],
    configurations: Sequence[Params],
    default: Params,
    pairs: Sequence[Pair],
    num_calibration: int,
) -> Simulates:
    """The simulator with costs fitted to the first so many pairs, and to nothing else."""
    observations = []
    for pair in pairs:
        if pair.number < num_calibration and pair.is_ok:
            observations += [
                (overrides(one.params), run)
                for one in pair.runs(configurations[pair.number], default)
                for run in one.runs
            ]
    return simulator.calibrated(observations)


def foretold(
    simulator: Simulates,
    overrides: Callable[[Params], Mapping[str, Any]],
    guard: MemoryGuard,
    configurations: Sequence[Params],
    default: Params,
    pairs: Sequence[Pair],
    num_calibration: int,
) -> pd.DataFrame:
    """A row for each pair that was measured: see `harness.report.fidelity.figures`."""
    baseline = simulator.run(overrides(default))
    rows = []
    for pair in sorted(pairs, key=lambda pair: pair.number):
        if not pair.is_ok:
            continue
        params = configurations[pair.number]
        mine, other = pair.runs(params, default)
        simulated = simulator.run(overrides(params))
        error = guard.error_of(mine)
        rows.append(
            {
                "number": pair.number,
                "is_calibration": pair.number < num_calibration,
                "tpot_ms": mine.tpot_ms_p50,
                "default_tpot_ms": other.tpot_ms_p50,
                "simulated_tpot_ms": simulated.tpot_ms_p50,
                "simulated_default_tpot_ms": baseline.tpot_ms_p50,
                "latency_ms": mine.latency_ms_p50,
                "default_latency_ms": other.latency_ms_p50,
                "simulated_latency_ms": simulated.latency_ms_p50,
                "simulated_default_latency_ms": baseline.latency_ms_p50,
                "bytes_per_s": bytes_per_s(mine.runs[0]),
                "peak_bytes": mine.peak_memory_bytes,
                "predicted_peak_bytes": round(mine.peak_memory_bytes / (1 + error)),
                "params": json.dumps(dict(params)),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = [
    "number",
    "is_calibration",
    *(
        f"{who}{metric}_ms"
        for metric in ("tpot", "latency")
        for who in ("", "default_", "simulated_", "simulated_default_")
    ),
    "bytes_per_s",
    "peak_bytes",
    "predicted_peak_bytes",
    "params",
]


def bytes_per_s(measured: Measurement) -> float | None:
    """Of the run's loads, while one was under way; None without loads."""
    num_bytes, busy_s = measured.stats.get("num_bytes"), measured.stats.get("busy_s")
    return num_bytes / busy_s if num_bytes and busy_s else None
