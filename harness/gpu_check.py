"""Everything that a GPU has to show, in less than nine minutes: `python -m harness.gpu_check --out FOLDER`.

The tests that need a GPU, exactness bit by bit, the probe, one shape at 25 % of its slots, and a short tune. Each step
is a process with a time limit of its own; one that fails is said to, and the next one runs. Runs offline.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from harness.measure.provenance import provenance
from runtime.errors import UsageError, cli_main
from runtime.files import write_atomic

ROOT = Path(__file__).parents[1]
GRACE_S = 5.0  # for a step that has no time left to end by itself
_MOST_FAILURES = 20


class Step(NamedTuple):
    """A command (words after `python`) and the seconds it may take. `output`: the file that its stdout goes to."""

    name: str
    words: tuple[str, ...]
    timeout_s: float
    output: str | None = None


def steps(out: Path, gpu: int) -> Iterator[Step]:
    """In the order in which they run; their limits and the grace of each sum up to less than nine minutes."""
    # Of pytest's own options, those that name plug-ins which need not be here are left out.
    tests = ("-m", "pytest", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "-m", "gpu", "-q", "tests/gpu")
    device = f"cuda:{gpu}"
    yield Step("tests", (*tests, f"--junit-xml={out / 'tests.xml'}"), 205)
    exact = ("-m", "harness.measure.exactness", "--device", device, "--out", str(out / "exactness.json"))
    yield Step("exactness", exact, 60)
    yield Step("probe", ("-m", "harness.probe", "--gpu", str(gpu), "--seconds", "3", "--json"), 40, "probe.json")
    bench = ("-m", "harness.gpu_bench", "--shape", "1MiB", "--device", device, "--only", "25 %", "--requests", "3")
    yield Step("bench", (*bench, "--budget-s", "52", "--out", str(out)), 60)
    tune = ("-m", "harness.tune", "--gpu", str(gpu), "--time-budget", "60s")
    folder = f"tune-{datetime.now(UTC):%Y%m%d-%H%M%S}"  # one that holds a run is refused
    where = ("--out", str(out / folder), "--profile-out", str(out / "tuned.yaml"))
    yield Step("tune", (*tune, *where), 145)


def run_step(step: Step, out: Path, python: str = sys.executable) -> dict[str, Any]:
    """Run it to its end or its time limit, what it says in `out`/NAME.log; how it went."""
    command, log = [python, *step.words], out / f"{step.name}.log"
    began = time.perf_counter()
    with log.open("ab") as errors, (out / (step.output or log.name)).open("ab") as output:  # one file at most times
        for file in (errors, output):
            file.truncate(0)
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
            )
        except OSError as error:
            return {**_head(step, began), "status": "failed", "why": f"{python}: {error.strerror}"}
        try:
            code: int | None = process.wait(step.timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    found = {**_head(step, began), "exit_code": code}
    if code == 0:
        return {**found, "status": "passed"}
    if code is None:
        return {**found, "status": "failed", "why": f"not done within {step.timeout_s:g} s"}
    return {**found, "status": "failed", "why": f"exit code {code}: {_last_line(log)}"}


def _head(step: Step, began: float) -> dict[str, Any]:
    words = [Path(word).name if word.startswith("/") else word for word in step.words]
    return {"name": step.name, "command": shlex.join(["python", *words]), "seconds": time.perf_counter() - began}


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and whatever it has started: asked first, so that it ends those in sessions of their own, then killed."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1][-300:] if lines else "it said nothing"


def tests_summary(junit: Path) -> dict[str, Any] | None:
    """Counts, and the first failures by name with their message; None where pytest wrote nothing that can be read."""
    try:
        suites = list(ET.parse(junit).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        return None
    names = ("tests", "failures", "errors", "skipped")
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}
    bad = [
        {"name": f"{case.get('classname')}::{case.get('name')}", "why": (found.get("message") or "").partition("\n")[0]}
        for suite in suites
        for case in suite.iter("testcase")
        for found in (*case.iter("failure"), *case.iter("error"))
    ]
    return {**counts, "failed": bad[:_MOST_FAILURES]}


def check(wanted: Sequence[Step], out: Path, python: str = sys.executable) -> bool:
    """Run the steps; `out`/check.json is written anew after each. Whether all of them passed."""
    report: dict[str, Any] = {**provenance("harness.gpu_check", datetime.now(UTC)), "steps": []}
    for step in wanted:
        print(f"{step.name:<10}… at most {step.timeout_s:.0f} s", flush=True)
        found = run_step(step, out, python)
        if step.name == "tests":
            found["summary"] = tests_summary(out / "tests.xml")
        report["steps"].append(found)
        write_atomic(out / "check.json", json.dumps(report, indent=1) + "\n")
        print(f"{step.name:<10}{_verdict(found)}, {found['seconds']:.0f} s", flush=True)
    failed = [one["name"] for one in report["steps"] if one["status"] != "passed"]
    passed = [one["name"] for one in report["steps"] if one["status"] == "passed"]
    print(f"gpu-check: passed: {', '.join(passed) or 'nothing'}; FAILED: {', '.join(failed) or 'nothing'}")
    return not failed


def _verdict(found: dict[str, Any]) -> str:
    summary = found.get("summary")
    counts = ""
    if summary is not None:
        failed = summary["failures"] + summary["errors"]
        counts = f" ({summary['tests']} tests, {failed} failed, {summary['skipped']} skipped)"
    return f"{found['status']}{counts}" + (f": {found['why']}" if "why" in found else "")


def _run(options: argparse.Namespace) -> int:
    out = options.out.absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {options.out}: cannot be made: {error.strerror}") from error
    every = list(steps(out, options.gpu))
    for name in options.only or ():
        if name not in (step.name for step in every):
            raise UsageError(f"--only {name}: known are {', '.join(step.name for step in every)}")
    for old in ("tests.xml", "check.json"):
        (out / old).unlink(missing_ok=True)
    wanted = [step for step in every if not options.only or step.name in options.only]
    return 0 if check(wanted, out) else 1


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a step failed."""
    parser = argparse.ArgumentParser(prog="python -m harness.gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of all results (%(default)s)")
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="(default %(default)s)")
    parser.add_argument("--only", action="append", metavar="STEP", help="run this step only; may be repeated")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the running step ends with it
    return cli_main(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
