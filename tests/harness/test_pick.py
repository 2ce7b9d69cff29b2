"""Another point of a finished search, from its `run.json` alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_report import LIMITS, confirmed, measurement, run_file, searched, space, tried_of

from harness import pick
from harness.report.run_file import Run, RunFile
from harness.search.objective import Objective
from harness.search.outcome import Limits, feasible
from runtime.profile import load_profile

ROOT = Path(__file__).parents[2]
RECORDS = searched()
TRIED = tried_of(RECORDS)
DEFAULT = space().default
FASTEST = feasible(TRIED, LIMITS)[0]


def write(folder: Path, run: RunFile) -> list[str]:
    """The run as arguments."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(run.to_json())
    return ["--run", str(folder)]


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    return write(tmp_path / "R", run_file(RECORDS, FASTEST.params, confirmed=confirmed(FASTEST.params)))


def test_without_limits_it_is_the_run_s_choice_with_its_proof(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pick.main(given) == 0
    profile = load_profile(tmp_path / "R" / "picked.yaml")
    assert profile.cache.slots == FASTEST.params["slots"]
    assert profile.evidence is not None and profile.evidence.ratio is not None and profile.evidence.pairs == 12
    said = capsys.readouterr().out
    assert "80.0 ms per output token" in said and "98.0% interval of the latency 0.75 to 0.85, 12 pairs" in said


def test_a_tighter_limit_gives_a_smaller_configuration_and_claims_no_interval(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.yaml"
    assert pick.main([*given, "--max-memory", "450MB", "--out", str(out)]) == 0
    profile, wanted = load_profile(out), feasible(TRIED, Limits(450_000_000))[0]
    assert profile.cache.slots == wanted.params["slots"] != FASTEST.params["slots"]
    assert profile.objectives is not None and profile.objectives.latency_ms_p50 == wanted.latency_ms_p50
    assert profile.evidence is not None and profile.evidence.ratio is None and profile.evidence.pairs is None
    assert profile.evidence.baseline is not None and profile.evidence.baseline.latency_ms_p50 == 100.0
    assert profile.limits is not None and profile.limits.max_memory_bytes == 450_000_000
    assert profile.provenance is not None and profile.provenance.command is not None
    first, second = profile.provenance.command.split(" && ")
    assert first == "python -m harness.tune --out R" and second.startswith("python -m harness.pick --run")
    assert "not confirmed side by side" in capsys.readouterr().out


def test_limits_that_are_not_given_are_those_of_the_run(given: list[str], tmp_path: Path) -> None:
    assert pick.main([*given, "--objective", "memory"]) == 0
    profile = load_profile(tmp_path / "R" / "picked.yaml")
    within = [one for one in feasible(TRIED, LIMITS) if one.latency_ms_p50 <= 105]
    assert profile.objectives is not None
    assert profile.objectives.peak_memory_bytes == min(one.peak_memory_bytes for one in within)
    assert profile.limits is not None and profile.limits.max_memory_bytes == LIMITS.max_memory_bytes


def test_what_was_not_proven_is_not_picked_instead_of_the_default() -> None:
    refuted = confirmed(FASTEST.params, (1.0, 0.95, 1.05))
    run = run_file(RECORDS, DEFAULT, confirmed=refuted)
    tighter = Limits(599_000_000)
    assert pick.pick(run, LIMITS, Objective.LATENCY).params == DEFAULT
    second = feasible(TRIED, tighter)[1]
    assert pick.pick(run, tighter, Objective.LATENCY).params == second.params
    without_default = Limits(499_000_000)
    smaller = Run.of(measurement(FASTEST.latency_ms_p50, 480_000_000))
    points = [
        point.model_copy(update={"runs": (smaller,)}) if point.params == FASTEST.params else point
        for point in run.points
    ]
    small = run.model_copy(update={"points": tuple(points)})
    assert pick.pick(small, without_default, Objective.LATENCY).params == FASTEST.params


def test_a_peak_that_only_the_confirmation_saw_counts_for_the_limit() -> None:
    limits = Limits(505_000_000)
    assert pick.pick(run_file(RECORDS, FASTEST.params), limits, Objective.LATENCY).params == DEFAULT
    beside = run_file(RECORDS, FASTEST.params, confirmed=confirmed(FASTEST.params))  # there it came to 510 MB
    assert pick.pick(beside, limits, Objective.LATENCY).params != DEFAULT


def test_what_failed_beside_the_default_is_never_picked() -> None:
    run = run_file(RECORDS, DEFAULT, failed=(dict(FASTEST.params),))
    for objective in Objective:
        assert pick.pick(run, Limits(599_000_000), objective).params != FASTEST.params


def test_when_nothing_fits_it_says_what_is_closest_and_writes_nothing(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smallest = min(TRIED, key=lambda one: one.peak_memory_bytes)
    assert pick.main([*given, "--max-memory", "300MB"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--max-memory 300 MB by" in error
    assert f"slots {smallest.params['slots']}," in error and f"{smallest.peak_memory_bytes / 1e6:.0f} MB" in error
    assert [path.name for path in (tmp_path / "R").iterdir()] == ["run.json"]


def test_the_list_shows_the_front_within_the_limits_and_writes_nothing(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pick.main([*given, "--list", "--max-memory", "520MB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "vs default" in lines[0] and sum(line.lstrip().startswith("*") for line in lines) == 1
    assert sum("default" in line for line in lines[1:]) == 1
    assert [path.name for path in (tmp_path / "R").iterdir()] == ["run.json"]


def test_the_list_leaves_out_what_failed_beside_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_file(RECORDS, DEFAULT, failed=(dict(FASTEST.params),))
    assert pick.main([*write(tmp_path / "R", run), "--list"]) == 0
    assert f" {FASTEST.latency_ms_p50:.1f} " not in capsys.readouterr().out


def test_a_run_in_which_nothing_ran_has_nothing_to_pick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = write(tmp_path / "R", run_file([], None))
    assert pick.main(given) == 2 and "no configuration of this run ever ran" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-memory", "much"], "1.5GiB"),
        (["--slo-tpot", "-3"], "--slo-tpot -3"),
        (["--slo-ttft", "nan"], "--slo-ttft nan"),
        (["--out", "/dev/null/p.yaml"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(
    given: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert pick.main([*given, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "harness.tune"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"schema_version": 2}', "schema_version"),
        ("\xff\x00", "damaged"),
    ],
)
def test_a_folder_that_holds_no_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content.encode("latin-1"))
    assert pick.main(["--run", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and str(tmp_path) in error
    assert pick.main(["--run", str(tmp_path / "nowhere")]) == 2


def test_a_run_that_was_edited_to_something_impossible_is_refused(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "R" / "run.json"
    content = json.loads(path.read_text())
    content["points"][0]["runs"] = []
    path.write_text(json.dumps(content))
    assert pick.main(given) == 2 and "points.0.runs" in capsys.readouterr().err
    content["points"] = []
    content["base"]["cache"]["policy"] = "bogus"
    path.write_text(json.dumps(content))
    assert pick.main(given) == 2 and "bogus" in capsys.readouterr().err


def test_picking_needs_no_torch_and_no_study(given: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'optuna', 'matplotlib'): sys.modules[name] = None\n"
        f"from harness.pick import main\nsys.exit(main({[*given, '--max-memory', '450MB']!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert load_profile(tmp_path / "R" / "picked.yaml").cache.slots
