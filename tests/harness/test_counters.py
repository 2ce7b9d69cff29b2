"""The counters gate: what is committed is what the decisions are, and whatever changes one is caught and named."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.checks import counters, scenarios
from harness.checks.counters import bless, check_counters
from harness.checks.report import Report, Verdict
from harness.checks.scenarios import LOWER_IS_BETTER, Counts, Scenarios, count_scenarios
from harness.measure.provenance import commit
from runtime.cache.policies import POLICIES, Policy
from runtime.cache.residency import Residency
from runtime.errors import UsageError
from runtime.trace import read_trace
from runtime.vocabulary import Plan

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "data" / "counters-golden.json"
TRACE = GOLDENS.with_name("demo-routing.npz")
FEW = (
    Scenarios("recorded", (0.25,), ("lru", "td_next_use"), ("none", "gate_lookahead")),
    Scenarios("deadline", (0.25,), ("td_next_use",), ("none",)),
)


@pytest.fixture(scope="module")
def counted() -> dict[str, Counts]:
    """Every scenario, as the working tree decides."""
    return count_scenarios(read_trace(TRACE))


@pytest.fixture
def goldens(tmp_path: Path, counted: dict[str, Counts], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what is committed; checks of it need not count again."""
    monkeypatch.setattr(counters, "count_scenarios", lambda trace, on_done: counted)
    return _copied(tmp_path)


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Goldens of few scenarios, which are counted each time; just blessed."""
    monkeypatch.setattr(scenarios, "SCENARIOS", FEW)
    shutil.copy(TRACE, tmp_path)
    path = tmp_path / "few.json"
    bless(path, "the first")
    return path


def _copied(folder: Path) -> Path:
    shutil.copy(TRACE, folder)
    return Path(shutil.copy(GOLDENS, folder))


def _edit(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def _failed(report: Report) -> dict[str, str]:
    return {one.name: one.reason for one in report.findings if one.verdict is not Verdict.PASS}


def test_the_decisions_are_those_that_are_committed(goldens: Path) -> None:
    """A failure here is a change of decisions; where it is meant: `python -m harness.check --bless --reason "why"`."""
    report = check_counters(goldens)
    assert _failed(report) == {} and report.verdict is Verdict.PASS
    assert len(report.findings) == scenarios.num_scenarios() > 180


def test_every_policy_predictor_and_scheduler_is_counted(counted: dict[str, Counts]) -> None:
    words = {word for name in counted for word in name.split()}
    assert words >= {*POLICIES, "belady", *scenarios.UNTRAINED, "fifo", "route_overlap", "deadline"}
    for counts in counted.values():
        assert counts.keys() <= LOWER_IS_BETTER.keys()
        assert counts["hits"] + counts["prefetch_late"] + counts["misses"] == counts["lookups"]
    moving = [counter for counter in LOWER_IS_BETTER if len({one.get(counter) for one in counted.values()}) > 1]
    assert moving == list(LOWER_IS_BETTER)  # one that is the same everywhere would say nothing


def test_schedulers_decide_differently(counted: dict[str, Counts]) -> None:
    by_scheduler = [counted[f"{kind} 25% td_next_use none"] for kind in ("fifo", "route_overlap", "deadline")]
    assert len({one["lookups"] for one in by_scheduler}) == 3
    fifo, _, deadline = (one["in_slo"] for one in by_scheduler)
    assert 0 < fifo < deadline < 16


def test_one_extra_miss_is_caught(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_counters(few).verdict is Verdict.PASS
    plan, num_hits = Residency.plan, [0]

    def forgetful(self: Residency, layer: int, demand: Sequence[int], *rest: Any, **first: bool) -> Plan:
        here = [expert for expert in demand if self.slot_of(expert) >= 0 and not self.is_loading(expert)]
        num_hits[0] += len(here)
        if here and num_hits[0] - len(here) < 1000 <= num_hits[0]:
            self.drop(here[0])
        return plan(self, layer, demand, *rest, **first)

    monkeypatch.setattr(Residency, "plan", forgetful)
    report = check_counters(few)
    assert report.verdict is Verdict.REGRESSION
    ((name, reason),) = _failed(report).items()
    assert name == "recorded 25% lru gate_lookahead" and re.match(r"misses (\d+), golden \d+ \(\+1, worse\); ", reason)
    assert any("--bless --reason" in note for note in report.notes)


def test_a_policy_that_decides_otherwise_is_caught_where_it_rules(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "lru", Policy.STATIC)
    report = check_counters(few)
    assert _failed(report).keys() == {"recorded 25% lru none", "recorded 25% lru gate_lookahead"}
    assert "worse" in _failed(report)["recorded 25% lru none"]
    assert any(note.startswith("scenarios that differ, added up: misses") for note in report.notes)


@pytest.mark.slow
def test_an_edited_formula_is_caught_by_the_command(tmp_path: Path) -> None:
    """One least recently used expert in a hundred is taken for the oldest: in the source, compiled anew."""
    for package in ("harness", "runtime", "tests/data"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    source = tmp_path / "runtime" / "cache" / "policies.py"
    before = "return float(last_used)\n"
    assert source.read_text().count(before) == 1
    source.write_text(source.read_text().replace(before, "return float(last_used if last_used % 100 else 0)\n"))
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "compiled")}
    command = [sys.executable, "-m", "harness.check", "--json"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stderr
    failed = {one["name"] for one in json.loads(found.stdout)["findings"] if one["verdict"] == "regression"}
    assert failed and all(" lru " in name for name in failed)


@pytest.mark.parametrize(
    ("golden", "reason"),
    [
        (4500, "misses 4506, golden 4500 (+6, worse)"),
        (4507, "misses 4506, golden 4507 (-1, better)"),
    ],
)
def test_any_difference_fails_and_says_which_way(goldens: Path, golden: int, reason: str) -> None:
    _edit(goldens, lambda document: document["counters"]["recorded 15% lru none"].update(misses=golden))
    report = check_counters(goldens)
    assert _failed(report) == {"recorded 15% lru none": reason}
    assert int(report.verdict) == 1


def test_virtual_seconds_are_the_same_but_for_rounding(goldens: Path) -> None:
    name = "recorded 15% lru none"

    def stretch(share: float) -> Callable[[Any], object]:
        def change(document: Any) -> None:
            document["counters"][name]["stall_s"] *= 1 + share

        return change

    _edit(goldens, stretch(1e-11))
    assert check_counters(goldens).verdict is Verdict.PASS
    _edit(goldens, stretch(-1e-6))
    assert "stall_s" in _failed(check_counters(goldens))[name]
    assert "worse" in _failed(check_counters(goldens))[name]


def test_a_scenario_or_a_counter_on_one_side_only_fails(goldens: Path) -> None:
    def change(document: Any) -> None:
        document["counters"]["gone"] = document["counters"].pop("recorded 15% lru none")
        del document["counters"]["recorded 15% lfu none"]["waves"]
        document["counters"]["recorded 15% lfru none"]["former"] = 3

    _edit(goldens, change)
    assert _failed(check_counters(goldens)) == {
        "recorded 15% lru none": "not in the goldens",
        "gone": "in the goldens, but no longer counted",
        "recorded 15% lfu none": "waves 1312, golden none",
        "recorded 15% lfru none": "former none, golden 3",
    }


def test_another_trace_is_no_regression_but_nothing_to_compare_with(goldens: Path) -> None:
    _edit(goldens, lambda document: document["trace"].update(sha256="0" * 64))
    report = check_counters(goldens)
    assert report.verdict is Verdict.INVALID and "golden 000000000000" in report.findings[0].reason


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there are no counters"),
        ("", "not a file of counters"),
        ("[1]", "not a file of counters"),
        ('{"trace": {"name": "t", "sha256": ""}, "history": []}', "counters: Field required"),
        ('{"trace": {"name": "t", "sha256": ""}, "history": [], "counters": {"a": {"hits": "1"}}}', "counters.a.hits"),
        ('{"trace": {"name": "t", "sha256": ""}, "history": [], "counters": {"a": {"hits": NaN}}}', "counters.a.hits"),
        ("[" * 100_000, "not a file of counters"),
        ("\udcff", "not a file of counters"),
    ],
)
def test_goldens_that_cannot_be_read_are_the_users_mistake(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "goldens.json"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=message.replace(".", r"\.")) as caught:
        check_counters(path)
    assert "--bless" in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_trace_beside_the_goldens(goldens: Path) -> None:
    goldens.with_name(TRACE.name).unlink()
    with pytest.raises(UsageError, match="in a checkout"):
        check_counters(goldens)


def test_blessing_makes_the_counters_the_committed_ones_and_keeps_the_reason(goldens: Path) -> None:
    committed = goldens.read_text()

    def change(document: Any) -> None:
        document["counters"]["recorded 15% lru none"]["misses"] -= 6
        document["counters"]["recorded 15% lru none"]["stall_s"] *= 1 + 1e-12
        document["counters"]["recorded 15% lfu none"]["stall_s"] *= 1 + 1e-12
        document["counters"]["gone"] = document["counters"].pop("recorded 15% lfru none")

    _edit(goldens, change)
    told = bless(goldens, "  a reason\nof two lines ")
    assert "1 of 185 scenarios changed, 1 added, 1 removed" in told
    assert "misses 4506, golden 4500 (+6, worse)" in told
    assert check_counters(goldens).verdict is Verdict.PASS
    document = json.loads(goldens.read_text())
    assert document["history"][:-1] == json.loads(committed)["history"]
    last = document["history"][-1]
    assert last["reason"] == "a reason of two lines" and last["date"][:2] == "20" and last["commit"] == commit()
    assert last["changed"] == {"scenarios": 1, "added": 1, "removed": 1, "misses": [4500, 4506]}
    # One line a scenario, in the order of the table; what was the same but for rounding is not in the diff.
    before, after = committed.splitlines(), goldens.read_text().splitlines()
    assert [line for line in after if line not in before and '"reason"' not in line] == [
        line for line in after if line.startswith('"recorded 15% lfu none"')
    ]
    assert "gone" not in document["counters"]


def test_blessing_what_is_as_committed_writes_nothing(few: Path) -> None:
    before = few.read_bytes()
    assert bless(few, "again").startswith("nothing changed: 5 scenarios")
    assert few.read_bytes() == before


@pytest.mark.parametrize("reason", ["", " \n"])
def test_blessing_needs_a_reason(few: Path, reason: str) -> None:
    with pytest.raises(UsageError, match="reason"):
        bless(few, reason)


def test_blessing_never_throws_away_a_history_that_it_cannot_read(goldens: Path) -> None:
    goldens.write_text(goldens.read_text()[:-9])
    before = goldens.read_bytes()
    with pytest.raises(UsageError, match="git checkout"):
        bless(goldens, "a reason")
    assert goldens.read_bytes() == before


def test_counting_needs_no_torch(tmp_path: Path) -> None:
    shutil.copy(TRACE, tmp_path)
    code = """
import sys
for missing in ("torch", "transformers", "optuna", "matplotlib"):  # see .github/workflows/counters.yml
    sys.modules[missing] = None
from harness.checks import scenarios
scenarios.SCENARIOS = scenarios.SCENARIOS[-3:]
from harness.check import main
goldens = ["--goldens", sys.argv[1]]
sys.exit(main([*goldens, "--bless", "--reason", "new"]) or main(goldens))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "goldens.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "12 added" in result.stdout and "pass: 12 checked" in result.stdout
