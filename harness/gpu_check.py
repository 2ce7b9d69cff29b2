"""Everything that a GPU has to show, in less than nine minutes: `python -m harness.gpu_check --out FOLDER`.

Exactness bit by bit, systems at the expert width of a model, the probe, a short tune, and, in the time that is left,
the tests that need a GPU. Each step is a process with a time limit of its own, at which it is interrupted and writes
what it has; one that fails is said to, and the next one runs. Runs offline.
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
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from harness.measure.provenance import provenance
from runtime.errors import UsageError, cli_main
from runtime.files import write_atomic

ROOT = Path(__file__).parents[1]
BUDGET_S = 530.0
GRACE_S = 8.0  # after each of two interrupts, for a step to write what it has
_LEAST_S = 10.0  # with less time than that, no step is begun
_POLL_S = 0.05
_ALONE = ("test_gpu_probe.py", "test_gpu_trials.py")
_MOST_FAILURES = 20


class Step(NamedTuple):
    """A command (words after `python`) and the seconds it may take.

    `output`: the file that its stdout goes to. `junit`: the file of results that pytest writes there. `at_once`: it
    times nothing, and runs at the same time as its neighbours of that kind.
    """

    name: str
    words: tuple[str, ...]
    timeout_s: float
    output: str | None = None
    junit: str | None = None
    at_once: bool = False


def steps(out: Path, gpu: int) -> Iterator[Step]:
    """In the order in which they run, the most telling first; what they leave of the time is for the tests."""
    device = f"cuda:{gpu}"
    exact = ("-m", "harness.measure.exactness", "--device", device, "--out", str(out / "exactness.json"))
    yield Step("exactness", exact, 95)  # the first to import torch from the disk, and to compile the cache
    bench = ("-m", "harness.gpu_bench", "--shape", "olmoe-1b-7b", "--device", device, "--requests", "3")
    yield Step("bench", (*bench, "--budget-s", "125", "--out", str(out)), 138)
    yield Step("probe", ("-m", "harness.probe", "--gpu", str(gpu), "--seconds", "3", "--json"), 45, "probe.json")
    # Half as many requests as by default: trials are to be short enough for the time that there is.
    tune = ("-m", "harness.tune", "--gpu", str(gpu), "--demo", "--time-budget", "60s", "--concurrency", "4")
    folder = f"tune-{datetime.now(UTC):%Y%m%d-%H%M%S}"  # one that holds a run is refused
    where = ("--out", str(out / folder), "--profile-out", str(out / "tuned.yaml"))
    yield Step("tune", (*tune, *where), 180)
    yield from _tests(out)


def _tests(out: Path) -> Iterator[Step]:
    """A step per file. Those that look at what the whole GPU does or has free come last, one by one."""
    # Of pytest's own options, those that name plug-ins which need not be here are left out.
    options = ("-o", "addopts=--strict-markers", "-o", "faulthandler_timeout=60", "-p", "no:cacheprovider")
    for file in sorted(Path(ROOT, "tests/gpu").glob("test_*.py"), key=lambda file: (file.name in _ALONE, file.name)):
        name, junit = file.stem, f"{file.stem}.xml"
        words = ("-m", "pytest", *options, "-m", "gpu", "-v", str(file.relative_to(ROOT)), f"--junit-xml={out / junit}")
        yield Step(name, words, 300, junit=junit, at_once=file.name not in _ALONE)


def run_steps(together: Sequence[Step], out: Path, python: str = sys.executable) -> Iterator[dict[str, Any]]:
    """Run them at the same time, each to its end or its limit, what they say in `out`/NAME.log; how each went, in the
    order in which they end.

    At the limit, or when this process is interrupted, a step is interrupted, and ended where that does not end it.
    """
    running: list[_Running] = []
    try:
        for step in together:
            try:
                running.append(_Running.start(step, out, python))
            except OSError as error:
                yield {**_head(step, time.perf_counter()), "status": "failed", "why": f"{python}: {error.strerror}"}
        while running:
            over = [(one, one.ended(out)) for one in running if one.is_over]
            _end([one.process for one, _ in over])
            for one, found in over:
                running.remove(one)
                yield found if one.step.junit is None else {**found, "summary": tests_summary(out / one.step.junit)}
            time.sleep(_POLL_S)
    finally:
        _end([one.process for one in running])


class _Running(NamedTuple):
    step: Step
    process: subprocess.Popen[bytes]
    began: float

    @classmethod
    def start(cls, step: Step, out: Path, python: str) -> _Running:
        log, began = out / f"{step.name}.log", time.perf_counter()
        with log.open("ab") as errors, (out / (step.output or log.name)).open("ab") as output:  # one file at most times
            for file in (errors, output):
                file.truncate(0)
            command = [python, *step.words]
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
            )
        return cls(step, process, began)

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None or time.perf_counter() - self.began > self.step.timeout_s

    def ended(self, out: Path) -> dict[str, Any]:
        """How, once it `is_over`."""
        code = self.process.poll()
        found = {**_head(self.step, self.began), "exit_code": code, "status": "passed" if code == 0 else "failed"}
        if code is None:
            found["why"] = f"not done within {self.step.timeout_s:.3g} s"
        elif code:
            found["why"] = f"exit code {code}: {_last_line(out / f'{self.step.name}.log')}"
        return found


def _head(step: Step, began: float) -> dict[str, Any]:
    words = [Path(word).name if word.startswith("/") else word for word in step.words]
    return {"name": step.name, "command": shlex.join(["python", *words]), "seconds": time.perf_counter() - began}


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """They and whatever they have started: interrupted (once to finish what is under way, twice to stop), then
    killed."""
    for _ in range(2):
        alive = [process for process in processes if process.poll() is None]
        _signal(alive, signal.SIGINT)
        end_s = time.perf_counter() + GRACE_S
        for process in alive:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end_s - time.perf_counter()))
    _signal(processes, signal.SIGKILL)
    for process in processes:
        process.wait()


def _signal(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)


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


def check(wanted: Sequence[Step], out: Path, python: str = sys.executable, *, budget_s: float = BUDGET_S) -> bool:
    """Run the steps, none beyond `budget_s`; `out`/check.json is written anew after each. Whether all have passed."""
    end_s = time.perf_counter() + budget_s
    report: dict[str, Any] = {**provenance("harness.gpu_check", datetime.now(UTC)), "steps": []}
    for together in _batches(wanted):
        left_s = end_s - time.perf_counter() - 2 * GRACE_S
        for found in _run_within(together, left_s, out, python):
            report["steps"].append(found)
            write_atomic(out / "check.json", json.dumps(report, indent=1) + "\n")
            print(f"{found['name']:<17}{_verdict(found)}, {found['seconds']:.0f} s", flush=True)
    failed = [one["name"] for one in report["steps"] if one["status"] != "passed"]
    passed = [one["name"] for one in report["steps"] if one["status"] == "passed"]
    print(f"gpu-check: passed: {', '.join(passed) or 'nothing'}; FAILED: {', '.join(failed) or 'nothing'}")
    return not failed


def _batches(wanted: Sequence[Step]) -> Iterator[list[Step]]:
    for at_once, neighbours in groupby(wanted, key=lambda step: step.at_once):
        batch = list(neighbours)
        yield from [batch] if at_once else ([step] for step in batch)


def _run_within(together: Sequence[Step], left_s: float, out: Path, python: str) -> Iterator[dict[str, Any]]:
    if left_s < _LEAST_S:
        for step in together:
            yield {"name": step.name, "status": "left out", "seconds": 0.0, "why": "no time was left"}
        return
    limited = [step._replace(timeout_s=min(step.timeout_s, left_s)) for step in together]
    for step in limited:
        print(f"{step.name:<17}… at most {step.timeout_s:.0f} s", flush=True)
    yield from run_steps(limited, out, python)


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
        if name not in ("tests", *(step.name for step in every)):
            raise UsageError(f"--only {name}: known are tests, {', '.join(step.name for step in every)}")
    for old in ("check.json", *(step.junit for step in every if step.junit)):
        (out / old).unlink(missing_ok=True)
    named = options.only or [step.name for step in every]
    wanted = [step for step in every if step.name in named or (step.junit is not None and "tests" in named)]
    return 0 if check(wanted, out, budget_s=options.budget_s) else 1


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a step failed."""
    parser = argparse.ArgumentParser(prog="python -m harness.gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of all results (%(default)s)")
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="(default %(default)s)")
    only = "exactness, bench, probe, tune or tests only; may be repeated"
    parser.add_argument("--only", action="append", metavar="STEP", help=only)
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, metavar="S", help="in all (%(default)g)")
    options = parser.parse_args(arguments)
    # The running step ends with it. A shell's background jobs ignore Ctrl-C, and steps would inherit that.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    return cli_main(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
