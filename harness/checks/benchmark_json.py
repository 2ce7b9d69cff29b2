"""Samples in pytest-benchmark's JSON format, for `pytest-benchmark compare`, `--series` and dashboards that read it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from harness.checks.report import Report
from harness.measure.provenance import commit_and_date
from runtime import machine


def benchmark_json(
    samples: Mapping[str, Sequence[float]], *, commit: str, extra: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """One file's content, for `json.dumps`.

    Args:
        samples: seconds of every run, by benchmark. One without a sample is left out.
        commit: that was measured; with "+" at its end where the working tree was changed.
        extra: by benchmark, what is to be kept with it (`extra_info`).
    """
    from pytest_benchmark import __version__  # needed by those who measure only

    name, date = commit_and_date(commit.removesuffix("+"))
    return {
        "machine_info": _machine_info(),
        "commit_info": {
            "id": name,
            "time": date,
            "author_time": date,
            "dirty": commit.endswith("+"),
            "project": "expertflow",
            "branch": None,
        },
        "benchmarks": [_benchmark(name, data, extra.get(name, {})) for name, data in samples.items() if len(data)],
        "datetime": datetime.now(UTC).isoformat(),
        "version": __version__,
    }


def of_report(report: Report) -> dict[str, Any]:
    """What the paired layer measured of the head; what it measured of the base is that of another commit."""
    metrics = report.figures["samples"]
    return benchmark_json(
        {name: metric["head"] for name, metric in metrics.items()},
        commit=report.figures["head"]["commit"],
        extra={name: metric["info"] for name, metric in metrics.items()},
    )


def _benchmark(name: str, data: Sequence[float], extra: Mapping[str, Any]) -> dict[str, Any]:
    from pytest_benchmark.stats import Stats

    untyped: Any = Stats
    stats = untyped()
    for seconds in data:
        stats.update(seconds)
    return {
        "group": None,
        "name": name.rpartition("::")[2],
        "fullname": name,
        "params": None,
        "param": None,
        "extra_info": dict(extra),
        "options": {"disable_gc": False, "timer": "perf_counter", "min_rounds": len(data), "warmup": False},
        "stats": {**stats.as_dict(), "data": list(data), "iterations": 1},
    }


def _machine_info() -> dict[str, Any]:
    """The names that pytest-benchmark gives to them, and the fingerprint; no host name."""
    fingerprint = machine.fingerprint()
    return {
        "node": "",
        "machine": platform.machine(),
        "processor": platform.processor(),
        "system": platform.system(),
        "release": platform.release(),
        "python_implementation": platform.python_implementation(),
        "python_implementation_version": platform.python_version(),
        "python_version": platform.python_version(),
        "cpu": {"brand_raw": fingerprint["cpu"], "count": fingerprint["cores"]},
        "fingerprint": fingerprint,
    }
