"""The steps of a GPU's check: that each is run and ended, and that what failed is said, whatever it was."""

from __future__ import annotations

import json
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from harness import gpu_bench, gpu_check, probe, tune
from harness.gpu_check import BUDGET_S, GRACE_S, Step, check, run_steps, steps
from harness.measure import exactness

JUNIT = """<testsuites><testsuite errors="1" failures="2" skipped="2" tests="8">
<testcase classname="tests.gpu.test_a" name="test_good"/>
<testcase classname="tests.gpu.test_a" name="test_bad"><failure message="assert 1 == 2&#10;more"/></testcase>
<testcase classname="tests.gpu.test_a" name="test_command"><failure message="AssertionError: Traceback (most \
recent call last):&#10;  File&#10;runtime.errors.DeviceError: lost&#10;assert 1 == 0&#10; +  where"/></testcase>
<testcase classname="tests.gpu.test_b" name="test_worse"><error message="no GPU"/></testcase>
</testsuite></testsuites>"""


def code(name: str, text: str, timeout_s: float = 20.0, **more: Any) -> Step:
    return Step(name, ("-c", text), timeout_s, **more)


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def run_step(step: Step, out: Path, **more: Any) -> dict[str, Any]:
    (found,) = run_steps([step], out, **more)
    return found


def test_every_step_runs_and_the_end_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = folder(tmp_path / "logs")
    junit = f"open({str(logs / 'tests.xml')!r}, 'w').write({JUNIT!r}); raise SystemExit(1)"
    wanted = [
        code("test_gpu", junit, junit="tests.xml"),
        code("probe", "import sys; print('{}'); print('told', file=sys.stderr)", output=tmp_path / "probe.json"),
        code("tune", "import sys; sys.exit('error: --gpu 0: not yet')"),
        code("hangs", "import time; time.sleep(60)", timeout_s=0.5),
    ]
    assert not check(wanted, tmp_path, logs)
    found = json.loads((tmp_path / "check.json").read_text())
    tests, probed, tuned, hung = found["steps"]
    assert [one["status"] for one in found["steps"]] == ["failed", "passed", "failed", "failed"]
    assert tests["summary"]["tests"] == 8 and tests["summary"]["skipped"] == 2
    assert [one["why"] for one in tests["summary"]["failed"]] == [
        "assert 1 == 2",
        "runtime.errors.DeviceError: lost",
        "no GPU",
    ]
    assert (tmp_path / "probe.json").read_text() == "{}\n" and (logs / "probe.log").read_text() == "told\n"
    assert probed["exit_code"] == 0 and tuned["why"] == "exit code 1: error: --gpu 0: not yet"
    assert hung["why"] == "not done within 0.5 s" and hung["seconds"] < 20
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "gpu-check: passed: probe; FAILED: test_gpu, tune, hangs"
    assert "    test_bad: assert 1 == 2" in lines and "    error: --gpu 0: not yet" in lines


def test_what_is_carried_off_is_few_files_and_what_is_printed_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the command is killed in the middle, too: the archive is as after the last step that has ended."""
    logs, out = folder(tmp_path / "logs"), folder(tmp_path / "out")
    deep = (
        f"import pathlib; at = pathlib.Path({str(logs)!r}, 'run/a'); at.mkdir(parents=True); at.joinpath('b').touch()"
    )
    peek = f"import tarfile; print('before', tarfile.open({str(out / 'logs.tar.gz')!r}).getnames())"
    wanted = [
        code("bench", f"{deep}; print('x' * 9000); print('25 %', flush=True); raise SystemExit(1)", printed=100),
        code("quiet", peek),
    ]
    assert not check(wanted, out, logs)
    assert {file.name for file in out.iterdir()} == {"check.json", "logs.tar.gz"}
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert set(archive.getnames()) == {"logs/bench.log", "logs/quiet.log", "logs/run/a/b"}
        kept = archive.extractfile("logs/quiet.log")
        assert kept is not None and b"'logs/bench.log', 'logs/run/a/b'" in kept.read()
    said = capsys.readouterr().out
    assert "    25 %\n" in said and "before" not in said and len(said) < 2000


def test_interrupted_it_keeps_what_the_running_step_said(tmp_path: Path) -> None:
    logs = folder(tmp_path / "logs")
    text = f"import os, time; print('half', flush=True); os.kill({os.getpid()}, 2); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        check([code("one", ""), code("two", text)], tmp_path, logs)
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        kept = archive.extractfile("logs/two.log")
        assert kept is not None and kept.read().startswith(b"half\n")
    assert [one["name"] for one in json.loads((tmp_path / "check.json").read_text())["steps"]] == ["one"]


def test_all_that_passed_is_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check([code("one", "print('fine')")], tmp_path, tmp_path)
    assert (tmp_path / "one.log").read_text() == "fine\n"
    assert capsys.readouterr().out.splitlines()[-1] == "gpu-check: passed: one; FAILED: nothing"


def test_logs_are_whole_and_without_progress_bars(tmp_path: Path) -> None:
    """Also of a step that is killed: its last lines are not in a buffer."""
    text = "import os, time; from huggingface_hub.utils import are_progress_bars_disabled as off; " \
           "print(off(), os.environ['HF_HUB_OFFLINE']); os.kill(os.getpid(), 9)"  # fmt: skip
    run_step(code("one", text), tmp_path)
    assert (tmp_path / "one.log").read_text() == "True 1\n"


def test_a_step_that_hangs_takes_what_it_started_with_it(tmp_path: Path) -> None:
    text = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    found = run_step(code("hangs", text, timeout_s=3.0), tmp_path)
    assert found["status"] == "failed" and found["exit_code"] is None
    child = int((tmp_path / "hangs.log").read_text().split()[0])
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        pytest.fail("it lives on")


def test_a_missing_interpreter_is_a_failed_step(tmp_path: Path) -> None:
    found = run_step(code("one", ""), tmp_path, python=str(tmp_path / "python"))
    assert found["status"] == "failed" and "No such file" in found["why"]


@pytest.mark.slow
def test_a_step_is_interrupted_so_that_it_writes_what_it_has(tmp_path: Path) -> None:
    """Also one that finishes what is under way first, and so wants a second interrupt; both at the same time."""
    once = "import time\ntry: time.sleep(60)\nfinally: print('written')"
    twice = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: pass\n" + once.partition("\n")[2]
    began = time.perf_counter()
    found = list(run_steps([code("one", once, 1.0), code("two", twice, 1.0)], tmp_path))
    assert [one["why"] for one in found] == ["not done within 1 s"] * 2
    assert all("written" in (tmp_path / f"{name}.log").read_text() for name in ("one", "two"))
    assert time.perf_counter() - began < 2 * GRACE_S + 3


def test_steps_that_time_nothing_run_at_once(tmp_path: Path) -> None:
    meet = "import sys, time, pathlib\n" \
           "own, other = (pathlib.Path(name) for name in sys.argv[1:])\n" \
           "own.touch()\n" \
           "while not other.exists(): time.sleep(0.01)"  # fmt: skip
    names = [str(tmp_path / name) for name in "ab"]
    both = [Step(name, ("-c", meet, *files), 20.0, at_once=True) for name, files in (("x", names), ("y", names[::-1]))]
    assert check([code("first", ""), *both], tmp_path, tmp_path)
    assert json.loads((tmp_path / "check.json").read_text())["steps"][0]["name"] == "first"


@pytest.mark.slow
def test_without_time_steps_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [code("one", ""), code("two", "", at_once=True)]
    assert not check(wanted, tmp_path, tmp_path, budget_s=2 * GRACE_S + 5)
    found = json.loads((tmp_path / "check.json").read_text())["steps"]
    assert [one["status"] for one in found] == ["left out"] * 2
    assert "two              left out: no time was left, 0 s" in capsys.readouterr().out
    hangs = [code("hangs", "import time; time.sleep(60)", timeout_s=60.0)]
    assert not check(hangs, tmp_path, tmp_path, budget_s=2 * GRACE_S + 11)
    assert json.loads((tmp_path / "check.json").read_text())["steps"][0]["why"] == "not done within 11 s"


def test_the_steps_fit_nine_minutes_and_are_commands_that_exist(tmp_path: Path) -> None:
    out, logs = tmp_path / "out", tmp_path / "logs"
    wanted = list(steps(out, logs, 1))
    figures = [step for step in wanted if step.junit is None]
    *before, last = figures
    left_s = BUDGET_S - 2 * GRACE_S - sum(step.timeout_s + 2 * GRACE_S for step in before)
    assert 180 < left_s < last.timeout_s and BUDGET_S < 9 * 60 and last.name == "tune"
    carried = [Path(word) for step in wanted for word in (*step.words, str(step.output)) if str(out) in word]
    assert all(path == out or path.parent == out for path in carried) and len({*carried} - {out}) == 3
    parsers = {
        "harness.measure.exactness": exactness._parser(),
        "harness.probe": probe._parser(),
        "harness.gpu_bench": gpu_bench._parser(),
        "harness.tune": tune._parser(),
    }
    parsed = [parsers[step.words[1]].parse_args(step.words[2:]) for step in wanted if step.words[1] in parsers]
    assert all(one.gpu == 1 for one in parsed) and "--device" not in {word for step in wanted for word in step.words}
    assert len(parsed) == 4 and [one.name for one in figures] == ["exactness", "bench", "probe", "tune"]
    tests = [step for step in wanted if step.junit is not None]
    files = {Path(word).name for step in tests for word in step.words if word.endswith(".py")}
    assert files == {file.name for file in Path(__file__).parent.glob("gpu/test_*.py")} and len(files) == len(tests)
    assert [step.name for step in tests if not step.at_once] == ["test_gpu_probe", "test_gpu_trials"]


@pytest.mark.parametrize("more", [["--only", "everything"], ["--out", "/proc/nowhere"]])
def test_mistakes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path), *more]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_pytest_runs_without_its_plug_ins(tmp_path: Path) -> None:
    """As where pytest alone is installed: the options in pyproject.toml name a plug-in."""
    (step,) = [one for one in steps(tmp_path, tmp_path, 0) if one.name == "test_gpu_engine"]
    words = (*step.words, "-p", "no:benchmark", "--collect-only")
    found = run_step(step._replace(words=words, timeout_s=100.0), tmp_path)
    assert found["status"] == "passed", (tmp_path / "test_gpu_engine.log").read_text()
    assert "test_logits_equal" in (tmp_path / "test_gpu_engine.log").read_text()
