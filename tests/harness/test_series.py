"""The history of figures: what is appended, what is refused, and which steps are found."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.checks.monte_carlo import Noise
from harness.checks.report import Verdict
from harness.checks.series import MIN_POINTS, RECENT_POINTS, WINDOW, find_changes, read_history, scan_series
from runtime.errors import UsageError

METRIC = "tests/benchmarks/test_decode.py::test_decode"
START = datetime(2026, 1, 1, tzinfo=UTC)


def _values(length: int, scatter: float = 0.02, seed: int = 0, steps: Sequence[tuple[int, float]] = ()) -> list[float]:
    """Seconds, with bad nights now and then; each step is (from which point on, ratio)."""
    random, noise = np.random.default_rng(seed), Noise()
    spikes = random.exponential(noise.spike, length) * (random.random(length) < noise.spike_share)
    values = 0.01 * np.exp(random.normal(0, scatter, length) + spikes)
    for at, ratio in steps:
        values[at:] *= ratio
    return [float(value) for value in values]


def _date(number: int) -> str:
    return (START + timedelta(hours=number)).isoformat()


def _write(history: Path, values: Sequence[float], fingerprint: str = "aaaa", metric: str = METRIC) -> None:
    history.mkdir(exist_ok=True)
    with (history / f"{fingerprint}.jsonl").open("a") as file:
        for number, value in enumerate(values):
            point = {"commit": f"commit{number}", "date": _date(number), "fingerprint": fingerprint, "metric": metric}
            file.write(json.dumps({**point, "median_s": value, "num_samples": 5}) + "\n")


def _benchmark(path: Path, commit: str = "c0ffee" * 6, median_s: float = 0.01, **other: Any) -> Path:
    """A file as pytest-benchmark writes it, as far as it is read."""
    stats = {"median": median_s, "rounds": 7, "mean": 1.0}
    content: dict[str, Any] = {
        "machine_info": {
            "node": "secret-host",
            "machine": "x86_64",
            "system": "Linux",
            "release": "6.1",
            "python_version": "3.11.7",
            "cpu": {"brand_raw": "A CPU", "count": 2},
        },
        "commit_info": {"id": commit, "time": "2026-11-26T10:00:00+01:00", "dirty": False},
        "benchmarks": [{"fullname": name, "stats": stats} for name in ("a::one", "a::two")],
        "datetime": "2026-11-26T10:00:00+00:00",
    }
    path.write_text(json.dumps({**content, **other}))
    return path


@pytest.mark.parametrize("at", [8, 30, 53])
@pytest.mark.parametrize("ratio", [1.15, 1 / 1.15])
def test_a_step_is_found_at_its_commit(tmp_path: Path, at: int, ratio: float) -> None:
    _write(tmp_path, _values(60, steps=[(at, ratio)]))
    (found,) = scan_series(tmp_path, None).findings
    (change,) = found.figures["changes"]
    number = int(change["commit"].removeprefix("commit"))
    assert abs(number - at) <= 1 and change["date"] == _date(number)
    before, after = (int(change[end].removeprefix("commit")) for end in ("before", "after"))
    assert number - 2 == before < at <= after == number + 1
    assert 1 + change["change"] == pytest.approx(ratio, rel=0.03)
    assert found.verdict is Verdict.PASS and f" about commit{number} of 2026-01-0" in found.reason


def test_an_alert_names_the_command_that_confirms_it_and_stays_a_pass(tmp_path: Path) -> None:
    _write(tmp_path, [0.01, 0.0101] * 25 + [0.011, 0.0111] * 5)
    report = scan_series(tmp_path, None)
    (note,) = report.notes
    assert note == (
        f"{METRIC} on aaaa: +10.0% about commit50 of 2026-01-03, in commit48..commit51; to confirm: "
        "git checkout commit51 && python -m harness.check --base commit48"
    )
    assert report.verdict is Verdict.PASS
    assert report.reproduce == f"python -m harness.check --series --history {tmp_path}"
    json.dumps(report.as_dict())


def test_an_old_change_is_no_alert_any_more(tmp_path: Path) -> None:
    _write(tmp_path, _values(60, steps=[(60 - RECENT_POINTS - 5, 1.2)]))
    report = scan_series(tmp_path, None)
    assert report.notes == () and len(report.findings[0].figures["changes"]) == 1


def test_several_steps_are_all_found() -> None:
    found = find_changes(_values(90, 0.01, steps=[(30, 1.1), (60, 0.85)]))
    assert len(found) == 2 and abs(found[0] - 30) <= 1 and abs(found[1] - 60) <= 1


@pytest.mark.parametrize("scatter", [0.01, 0.05])
def test_noise_has_no_steps(scatter: float) -> None:
    num_series = 200
    assert sum(bool(find_changes(_values(40, scatter, seed))) for seed in range(num_series)) <= 0.01 * num_series


@pytest.mark.slow
@pytest.mark.parametrize("length", [MIN_POINTS, 40])
def test_noise_has_no_steps_in_many_series(length: int) -> None:
    assert sum(bool(find_changes(_values(length, 0.03, 10_000 + seed))) for seed in range(1000)) <= 10


def test_most_steps_are_found_where_they_are() -> None:
    found = [find_changes(_values(40, 0.02, seed, [(20, 1.08)])) for seed in range(100)]
    assert sum(any(abs(at - 20) <= 1 for at in one) for one in found) >= 85


def test_less_than_the_least_change_is_none_however_clear() -> None:
    assert find_changes(_values(60, 0.001, steps=[(30, 1.02)])) == []
    assert find_changes(_values(60, 0.001, steps=[(30, 1.04)])) == [30]
    assert find_changes([0.01] * 60) == [] and find_changes([0.01] * 30 + [0.011] * 30) == [30]


def test_a_short_series_says_so(tmp_path: Path) -> None:
    _write(tmp_path, [0.01] * 9 + [0.02] * (MIN_POINTS - 10))
    (found,) = scan_series(tmp_path, None).findings
    assert found.reason == "too short to be searched: 19 of 20 commits; now 20 ms" and found.figures["changes"] == []


def test_machines_and_metrics_are_never_mixed(tmp_path: Path) -> None:
    """Two machines, one twice as fast, take turns: each has 30 points, and neither has a step."""
    values = _values(60)
    for number, fingerprint in enumerate(("fast", "slow")):
        _write(tmp_path, [value * (1 + number) for value in values[number::2]], fingerprint)
    _write(tmp_path, [5 * value for value in values], "slow", "other")
    findings = scan_series(tmp_path, None).findings
    assert [one.name for one in findings] == ["other on slow", f"{METRIC} on fast", f"{METRIC} on slow"]
    assert all(one.figures["changes"] == [] for one in findings)
    assert [one.figures["num_points"] for one in findings] == [60, 30, 30]


def test_points_are_in_the_order_of_their_commits_and_old_ones_are_left_out(tmp_path: Path) -> None:
    _write(tmp_path, _values(WINDOW + 20, 0.01, steps=[(5, 2.0), (WINDOW, 1.2)]))
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    np.random.default_rng(0).shuffle(lines)
    path.write_text("".join(lines))
    (found,) = scan_series(tmp_path, None).findings
    assert [change["commit"] for change in found.figures["changes"]] == [f"commit{WINDOW}"]
    assert found.figures["num_points"] == WINDOW


def test_figures_of_a_commit_are_appended_once(tmp_path: Path) -> None:
    history, new = tmp_path / "history", _benchmark(tmp_path / "new.json")
    report = scan_series(history, new)
    (path,) = history.iterdir()
    before = path.read_bytes()
    assert report.notes == (f"{path}: 2 figures of c0ffeec0ffee added",)
    assert [(point.metric, point.median_s, point.num_samples) for point in read_history(history)] == [
        ("a::one", 0.01, 7),
        ("a::two", 0.01, 7),
    ]
    assert b"secret" not in before and path.stem == read_history(history)[0].fingerprint
    again = scan_series(history, _benchmark(new, median_s=9.0))
    assert path.read_bytes() == before and again.notes[0].endswith("0 figures of c0ffeec0ffee added, 2 were there")
    scan_series(history, _benchmark(new, commit="another"))
    assert path.read_bytes().startswith(before) and len(read_history(history)) == 4


def test_another_machine_has_another_fingerprint_and_another_host_of_the_same_kind_has_not(tmp_path: Path) -> None:
    new = tmp_path / "new.json"
    info = json.loads(_benchmark(new).read_bytes())["machine_info"]
    kinds = [
        {},
        {"node": "other", "release": "6.2", "python_version": "3.11.9"},
        {"python_version": "3.12.1"},
        {"cpu": {**info["cpu"], "count": 4}},
        {"cpu": {**info["cpu"], "brand_raw": "B"}},
    ]
    for number, kind in enumerate(kinds):
        scan_series(tmp_path / "history", _benchmark(new, str(number + 1), machine_info={**info, **kind}))
    prints = {point.commit: point.fingerprint for point in read_history(tmp_path / "history")}
    assert prints["1"] == prints["2"] and len(set(prints.values())) == 4


def test_a_changed_source_tree_is_of_no_commit(tmp_path: Path) -> None:
    _write(tmp_path, _values(20))
    new = _benchmark(tmp_path / "new.json", commit_info={"id": "c", "time": _date(0), "dirty": True})
    report = scan_series(tmp_path, new)
    assert "of no commit; nothing was added" in report.notes[0] and len(report.findings) == 1
    with pytest.raises(UsageError, match=r"no figures yet; .*of no commit"):
        scan_series(tmp_path / "empty", new)


def test_appending_at_the_same_time_loses_nothing(tmp_path: Path) -> None:
    history = tmp_path / "history"
    files = [_benchmark(tmp_path / f"{number}.json", f"commit{number}") for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: scan_series(history, path), files))
    assert {point.commit for point in read_history(history)} == {f"commit{number}" for number in range(16)}
    assert sum(1 for path in history.iterdir() for _ in path.open()) == 32 and len(list(history.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("{", "Expecting property name"),
        ("[1]", "list where an object should be"),
        ("[" * 100_000, "line 3"),
        ({"median_s": -1.0}, "median_s -1.0 is no positive number"),
        ({"median_s": "1"}, "median_s '1' is no positive number"),
        ({"num_samples": True}, "num_samples True"),
        ({"date": "yesterday"}, "yesterday"),
        ({"commit": ""}, "commit '' is no text"),
        ({"host": "x"}, "unexpected keyword argument 'host'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, change: str | dict[str, Any], said: str) -> None:
    _write(tmp_path, _values(3))
    path = tmp_path / "aaaa.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = change if isinstance(change, str) else json.dumps({**json.loads(lines[2]), **change})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=r"aaaa\.jsonl, line 3: .*mend or delete the line") as error:
        scan_series(tmp_path, None)
    assert said in str(error.value) and "Point" not in str(error.value)


def test_an_append_to_a_damaged_history_changes_nothing(tmp_path: Path) -> None:
    history, new = tmp_path / "history", _benchmark(tmp_path / "new.json")
    scan_series(history, new)
    (path,) = history.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    before = path.read_bytes()
    with pytest.raises(UsageError, match="line 2"):
        scan_series(history, _benchmark(new, commit="another"))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "other",
    [
        {"commit_info": {"id": "unknown", "time": None, "dirty": False}},
        {"commit_info": {}},
        {"machine_info": None},
        {"benchmarks": [{"fullname": "a", "stats": {"median": 0.0, "rounds": 1}}]},
        {"benchmarks": [{"fullname": ["a"], "stats": {}}]},
        {"benchmarks": {"a": 1}},
    ],
)
def test_what_pytest_benchmark_did_not_write_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    new = _benchmark(tmp_path / "new.json", **other)
    with pytest.raises(UsageError, match=r"new\.json: no figures of a commit"):
        scan_series(tmp_path / "history", new)
    assert not (tmp_path / "history").exists()


def test_other_mistakes_of_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no figures yet"):
        scan_series(tmp_path, None)
    with pytest.raises(UsageError, match=r"absent\.json: cannot be read"):
        scan_series(tmp_path, tmp_path / "absent.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        scan_series(tmp_path / "file", _benchmark(tmp_path / "new.json"))
    monkeypatch.setitem(sys.modules, "ruptures", None)
    with pytest.raises(UsageError, match=r"pip install 'expertflow\[ci\]'"):
        scan_series(tmp_path / "history", tmp_path / "new.json")
    assert not (tmp_path / "history").exists()
