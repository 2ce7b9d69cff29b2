"""Samples in pytest-benchmark's format: pytest-benchmark itself reads them, and makes the same of them."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from harness.checks.benchmark_json import benchmark_json, of_report
from harness.checks.report import Report, Verdict
from harness.checks.series import scan_series
from harness.measure.provenance import commit

SAMPLES = {"test_decode[gemv]": [0.30, 0.31, 0.29, 0.35], "tests/benchmarks/test_a.py::test_load": [1.5], "none": []}


def _exported() -> dict[str, Any]:
    found: dict[str, Any] = benchmark_json(SAMPLES, commit="0123abcd+", extra={"test_decode[gemv]": {"of": "token"}})
    return found


def _compared(*files: Path) -> str:
    command = [sys.executable, "-m", "pytest_benchmark", "compare", *map(str, files), "--group-by=name"]
    result = subprocess.run(command, cwd=files[0].parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Failed to load" not in result.stdout + result.stderr
    return result.stdout


def test_pytest_benchmark_compares_what_is_exported(tmp_path: Path) -> None:
    older, newer = tmp_path / "0001_older.json", tmp_path / "0002_newer.json"
    older.write_text(json.dumps(_exported()))
    slower = {name: [2 * seconds for seconds in data] for name, data in SAMPLES.items()}
    newer.write_text(json.dumps(benchmark_json(slower, commit="89ab", extra={})))
    table = _compared(older, newer)
    rows = {line.split()[0] for line in table.splitlines() if line.startswith("test_")}
    assert rows == {"test_decode[gemv]", "test_load"}
    assert table.count("(2.00)") >= 2  # the newer over the older


def test_pytest_benchmarks_own_storage_loads_it(tmp_path: Path) -> None:
    from pytest_benchmark.logger import Logger
    from pytest_benchmark.storage.file import FileStorage

    (tmp_path / "0001_run.json").write_text(json.dumps(_exported()))
    one, other = FileStorage(str(tmp_path), Logger()).load_benchmarks()
    assert (one["name"], one["fullname"], one["rounds"]) == ("test_decode[gemv]", "test_decode[gemv]", 4)
    assert one["median"] == pytest.approx(statistics.median(SAMPLES["test_decode[gemv]"]))
    assert one["stddev"] == pytest.approx(statistics.stdev(SAMPLES["test_decode[gemv]"]))
    assert one["extra_info"] == {"of": "token"} and one["data"] == SAMPLES["test_decode[gemv]"]
    assert other["name"] == "test_load" and other["rounds"] == 1


def test_it_has_the_keys_of_a_file_that_pytest_benchmark_writes(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text("def test_one(benchmark): benchmark.pedantic(len, args=((),), rounds=3)\n")
    written = tmp_path / "written.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--benchmark-json={written}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    theirs, ours = json.loads(written.read_text()), _exported()
    assert ours.keys() == theirs.keys()
    assert ours["benchmarks"][0].keys() == theirs["benchmarks"][0].keys()
    assert ours["benchmarks"][0]["stats"].keys() >= theirs["benchmarks"][0]["stats"].keys()
    assert ours["commit_info"].keys() >= theirs["commit_info"].keys()


def test_a_changed_tree_is_dirty_and_no_host_is_named() -> None:
    found = _exported()
    assert (found["commit_info"]["id"], found["commit_info"]["dirty"]) == ("0123abcd", True)
    assert found["machine_info"]["node"] == "" and found["machine_info"]["fingerprint"]["cores"] >= 1


def test_a_commit_of_this_repository_has_its_full_name_and_date() -> None:
    ours = commit()
    if ours is None:
        pytest.skip("not in a git repository")
    info = benchmark_json({}, commit=ours, extra={})["commit_info"]
    assert re.fullmatch("[0-9a-f]{40}", info["id"]) and info["id"].startswith(ours.removesuffix("+"))
    assert datetime.fromisoformat(info["time"]).tzinfo is not None


def test_what_is_exported_can_be_added_to_the_history(tmp_path: Path) -> None:
    ours = commit()
    if ours is None:
        pytest.skip("not in a git repository")
    exported = tmp_path / "samples.json"
    exported.write_text(json.dumps(benchmark_json(SAMPLES, commit=ours.removesuffix("+"), extra={})))
    report = scan_series(tmp_path / "history", exported)
    assert report.verdict is Verdict.PASS and len(report.findings) == 2


def test_a_paired_report_is_exported_with_the_heads_samples() -> None:
    figures = {
        "base": {"commit": "b"},
        "head": {"commit": "h"},
        "samples": {"test_x": {"base": [1.0, 1.1], "head": [2.0, 2.1], "info": {"of": "token", "count": 8}}},
    }
    found = of_report(Report("paired", (), "again", figures=figures))
    assert found["commit_info"]["id"] == "h"
    assert found["benchmarks"][0]["stats"]["data"] == [2.0, 2.1]
    assert found["benchmarks"][0]["extra_info"] == {"of": "token", "count": 8}
