"""Everything that a GPU has to show, in less than nine minutes: `python -m harness.gpu_check --out FOLDER`.

Exactness bit by bit, systems at the expert width of a model, the probe, a short tune, and, in the time that is left,
the tests that need a GPU. Each step is a process with a time limit of its own, at which it is interrupted and writes
what it has; one that fails is said to, and the next one runs. Runs offline.

What is printed holds the figures, and FOLDER few files, to be carried off: the results, and the logs in one archive.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
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
_MOST_FAILURES, _MOST_PRINTED = 20, 4
_SAID_CHARS = 700  # printed of what a failed step said last
_LOGS = "logs.tar.gz"
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}


class Step(NamedTuple):
    """A command (words after `python`) and the seconds it may take.

    `output`: the file that its stdout goes to. `junit`: the file of results that pytest writes among the logs.
    `at_once`: it times nothing, and runs at the same time as its neighbours of that kind. `printed`: so many characters
    of what it said last are printed when it has ended.
    """

    name: str
    words: tuple[str, ...]
    timeout_s: float
    output: Path | None = None
    junit: str | None = None
    at_once: bool = False
    printed: int = 0


def steps(out: Path, logs: Path, gpu: int) -> Iterator[Step]:
    """In the order in which they run, the most telling first; what they leave of the time is for the tests.

    Results go to `out`, all else to `logs`.
    """
    exact = ("-m", "harness.measure.exactness", "--gpu", str(gpu), "--out", str(out / "exactness.json"))
    yield Step("exactness", exact, 95, printed=600)  # the first to import torch from disk, and to compile the cache
    bench = ("-m", "harness.gpu_bench", "--shape", "olmoe-1b-7b", "--gpu", str(gpu), "--requests", "3")
    yield Step("bench", (*bench, "--budget-s", "125", "--out", str(out)), 138, printed=5000)
    probe = ("-m", "harness.probe", "--gpu", str(gpu), "--seconds", "3", "--json")
    yield Step("probe", probe, 45, output=out / "probe.json")
    # Half as many requests as by default: trials are to be short enough for the time that there is.
    tune = ("-m", "harness.tune", "--gpu", str(gpu), "--demo", "--time-budget", "45s", "--concurrency", "4")
    where = ("--out", str(logs / "tune"), "--profile-out", str(out / "tuned.yaml"))
    # Cut off it would leave no profile: it may take of the tests' time, too.
    yield Step("tune", (*tune, *where), 260, printed=2500)
    yield from _tests(logs)


def _tests(logs: Path) -> Iterator[Step]:
    """A step per file. Those that look at what the whole GPU does or has free come last, one by one."""
    # Of pytest's own options, those that name plug-ins which need not be here are left out.
    options = ("-o", "addopts=--strict-markers", "-o", "faulthandler_timeout=60", "-p", "no:cacheprovider", "-rP")
    for file in sorted(Path(ROOT, "tests/gpu").glob("test_*.py"), key=lambda file: (file.name in _ALONE, file.name)):
        name, junit = file.stem, f"{file.stem}.xml"
        words = (
            "-m",
            "pytest",
            *options,
            "-m",
            "gpu",
            "-v",
            str(file.relative_to(ROOT)),
            f"--junit-xml={logs / junit}",
        )
        yield Step(name, words, 300, junit=junit, at_once=file.name not in _ALONE)


def run_steps(together: Sequence[Step], logs: Path, python: str = sys.executable) -> Iterator[dict[str, Any]]:
    """Run them at the same time, each to its end or its limit, what they say in `logs`/NAME.log; how each went, in the
    order in which they end.

    At the limit, or when this process is interrupted, a step is interrupted, and ended where that does not end it.
    """
    running: list[_Running] = []
    try:
        for step in together:
            try:
                running.append(_Running.start(step, logs, python))
            except OSError as error:
                yield {**_head(step, time.perf_counter()), "status": "failed", "why": f"{python}: {error.strerror}"}
        while running:
            over = [(one, one.ended(logs)) for one in running if one.is_over]
            _end([one.process for one, _ in over])
            for one, found in over:
                running.remove(one)
                yield found if one.step.junit is None else {**found, "summary": tests_summary(logs / one.step.junit)}
            time.sleep(_POLL_S)
    finally:
        _end([one.process for one in running])


class _Running(NamedTuple):
    """The process of a step, and when it began (`time.perf_counter`)."""

    step: Step
    process: subprocess.Popen[bytes]
    began: float

    @classmethod
    def start(cls, step: Step, logs: Path, python: str) -> _Running:
        log, began = logs / f"{step.name}.log", time.perf_counter()
        with log.open("ab") as errors, (step.output or log).open("ab") as output:  # one file at most times
            for file in (errors, output):
                file.truncate(0)
            command, environment = [python, *step.words], {**os.environ, **_ENVIRONMENT}
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        return cls(step, process, began)

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None or time.perf_counter() - self.began > self.step.timeout_s

    def ended(self, logs: Path) -> dict[str, Any]:
        """How, once it `is_over`."""
        code = self.process.poll()
        found = {**_head(self.step, self.began), "exit_code": code, "status": "passed" if code == 0 else "failed"}
        if code is None:
            found["why"] = f"not done within {self.step.timeout_s:.3g} s"
        elif code:
            found["why"] = f"exit code {code}: {_last_line(logs / f'{self.step.name}.log')}"
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
    return _said(log, 300).rpartition("\n")[2] or "it said nothing"


def _said(log: Path, most: int) -> str:
    """The last characters of a log, `most` of them at most."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return text.replace("\r", "\n").strip()[-most:] if most else ""


def tests_summary(junit: Path) -> dict[str, Any] | None:
    """Counts, and the first failures by name with their message; None where pytest wrote nothing that can be read."""
    try:
        suites = list(ET.parse(junit).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        return None
    names = ("tests", "failures", "errors", "skipped")
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in names}
    bad = [
        {"name": f"{case.get('classname')}::{case.get('name')}", "why": _reason(found.get("message") or "")}
        for suite in suites
        for case in suite.iter("testcase")
        for found in (*case.iter("failure"), *case.iter("error"))
    ]
    return {**counts, "failed": bad[:_MOST_FAILURES]}


def _reason(message: str) -> str:
    """The line of a failure's message that says most: the first one, or what the traceback of a command ends with."""
    lines = message.splitlines() or [""]
    raised = [line for line in lines[1:] if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return raised[-1] if raised and "Traceback" in lines[0] else lines[0]


def check(
    wanted: Sequence[Step], out: Path, logs: Path, python: str = sys.executable, *, budget_s: float = BUDGET_S
) -> bool:
    """Run the steps, none beyond `budget_s`. Whether all have passed.

    After each, `out`/check.json and the archive of `logs` are written anew, and what it said is printed.
    """
    end_s = time.perf_counter() + budget_s
    report: dict[str, Any] = {**provenance("harness.gpu_check", datetime.now(UTC)), "steps": []}
    printed = {step.name: step.printed for step in wanted}
    try:
        for together in _batches(wanted):
            left_s = end_s - time.perf_counter() - 2 * GRACE_S
            for found in _run_within(together, left_s, logs, python):
                report["steps"].append(found)
                write_atomic(out / "check.json", json.dumps(report, indent=1) + "\n")
                write_atomic(out / _LOGS, _archive(logs))
                for line in _lines(found, logs / f"{found['name']}.log", printed[found["name"]]):
                    print(line, flush=True)
    finally:  # interrupted: what the running step has said
        write_atomic(out / _LOGS, _archive(logs))
    failed = [one["name"] for one in report["steps"] if one["status"] != "passed"]
    passed = [one["name"] for one in report["steps"] if one["status"] == "passed"]
    print(f"gpu-check: passed: {', '.join(passed) or 'nothing'}; FAILED: {', '.join(failed) or 'nothing'}")
    return not failed


def _archive(folder: Path) -> bytes:
    """All files in it; steps may still be writing some."""
    found = io.BytesIO()
    with tarfile.open(fileobj=found, mode="w:gz") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                with suppress(OSError):
                    data = file.read_bytes()
                    head = tarfile.TarInfo(f"logs/{file.relative_to(folder)}")
                    head.size, head.mtime = len(data), time.time()
                    archive.addfile(head, io.BytesIO(data))
    return found.getvalue()


def _lines(found: dict[str, Any], log: Path, printed: int) -> Iterator[str]:
    """How a step went; which tests failed, or what it said last."""
    yield f"{found['name']:<17}{_verdict(found)}, {found['seconds']:.0f} s"
    summary = found.get("summary")
    if summary is not None and summary["failed"]:
        for one in summary["failed"][:_MOST_PRINTED]:
            yield f"    {one['name'].rpartition('::')[2]}: {one['why'][:160]}"
        return
    most = max(printed, _SAID_CHARS) if found["status"] == "failed" else printed
    for line in _said(log, most).splitlines():
        yield f"    {line}"


def _batches(wanted: Sequence[Step]) -> Iterator[list[Step]]:
    for at_once, neighbours in groupby(wanted, key=lambda step: step.at_once):
        batch = list(neighbours)
        yield from [batch] if at_once else ([step] for step in batch)


def _run_within(together: Sequence[Step], left_s: float, logs: Path, python: str) -> Iterator[dict[str, Any]]:
    if left_s < _LEAST_S:
        for step in together:
            yield {"name": step.name, "status": "left out", "seconds": 0.0, "why": "no time was left"}
        return
    limited = [step._replace(timeout_s=min(step.timeout_s, left_s)) for step in together]
    for step in limited:
        print(f"{step.name:<17}… at most {step.timeout_s:.0f} s", flush=True)
    yield from run_steps(limited, logs, python)


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
    with tempfile.TemporaryDirectory() as logs:
        every = list(steps(out, Path(logs), options.gpu))
        for name in options.only or ():
            if name not in ("tests", *(step.name for step in every)):
                raise UsageError(f"--only {name}: known are tests, {', '.join(step.name for step in every)}")
        for old in ("check.json", _LOGS):
            (out / old).unlink(missing_ok=True)
        named = options.only or [step.name for step in every]
        wanted = [step for step in every if step.name in named or (step.junit is not None and "tests" in named)]
        return 0 if check(wanted, out, Path(logs), budget_s=options.budget_s) else 1


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where a step failed."""
    parser = argparse.ArgumentParser(prog="python -m harness.gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of all results (%(default)s)")
    which = "as nvidia-smi numbers them (%(default)s); tests run on the first that torch sees"
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help=which)
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
