"""One side of the paired check: benchmarks that run when they are told to. `python -P worker.py SPEC`

Reads commands and writes answers, JSON lines over its standard input and output: `begin NAME` sets a benchmark up and
runs it once unmeasured, `sample` runs it once and answers its seconds, `end` finishes its test. What is loaded stays so
between samples.

It stands alone, with the standard library and pytest: the tree that it measures may be older than this file.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import pytest

MARKER = "paired"
"""Of the benchmarks that the check compares."""
_PACKAGES = ("runtime", "harness")
_MISSING = (ImportError, AttributeError, NameError, TypeError)
"""What asking for something that is not there yet raises."""


class Channel:
    """The pipes to the parent, under descriptors of their own: whatever libraries print goes to stderr."""

    def __init__(self) -> None:
        self._input: TextIO = os.fdopen(os.dup(0), "r")
        self._output: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)

    def send(self, answer: Mapping[str, Any]) -> None:
        """Answer the parent."""
        print(json.dumps(answer), file=self._output)

    def receive(self) -> dict[str, Any] | None:
        """The parent's next command; None when there will be none."""
        line = self._input.readline()
        command: dict[str, Any] | None = json.loads(line) if line else None
        return command


class DrivenBenchmark:
    """Stands in for pytest-benchmark's fixture: what it would time in a loop of its own, it times on command."""

    enabled, disabled, stats = True, False, None

    def __init__(self, channel: Channel, tree: Path) -> None:
        self.extra_info: dict[str, Any] = {}
        self._channel, self._tree, self._is_used = channel, tree, False

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As pytest-benchmark's."""
        return self.pedantic(function, args, kwargs)

    def pedantic(
        self,
        target: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        setup: Callable[[], Any] | None = None,
        teardown: Callable[..., Any] | None = None,
        rounds: int = 1,
        warmup_rounds: int = 1,
        iterations: int = 1,
    ) -> Any:
        """As pytest-benchmark's, but for `rounds`: the parent says how many."""
        if self._is_used:
            raise RuntimeError("a test can use its benchmark once")
        self._is_used = True

        def once() -> tuple[dict[str, float], Any]:
            given = setup() if setup is not None else None
            own_args, own_kwargs = given or (args, kwargs or {})
            found = _timed(lambda: [target(*own_args, **own_kwargs) for _ in range(iterations)][-1])
            if teardown is not None:
                teardown(*own_args, **own_kwargs)
            return found

        for _ in range(max(1, warmup_rounds)):  # compiles, fills caches
            _, result = once()
        if strangers := _strangers(self._tree):
            raise WrongTree(f"measures {strangers[0]}, not {self._tree}")
        gc.collect()
        gc.freeze()
        try:
            self._channel.send({"ready": True})
            while (command := self._channel.receive()) is not None and command["op"] == "sample":
                sample, result = once()
                self._channel.send(sample)
        finally:
            gc.unfreeze()
        if command is None:
            pytest.exit("the parent is gone")
        return result


class WrongTree(Exception):
    """A module was imported from somewhere else than the tree that is to be measured."""


def _strangers(tree: Path) -> list[str]:
    """Modules of the project that come from elsewhere: an installed copy that wins makes both sides the same code."""
    files = {
        name: getattr(module, "__file__", None)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in _PACKAGES
    }
    return [f"{name} of {file}" for name, file in files.items() if file and not _is_within(Path(file), tree)]


def _is_within(file: Path, tree: Path) -> bool:
    return file.resolve().is_relative_to(tree.resolve())


def _timed(run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """What one run took, without garbage collection in it, and what it returned."""
    gc.collect()
    gc.disable()
    try:
        ran_ns, waited_ns = _scheduled()
        cpu_s, start = time.process_time(), time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
    finally:
        gc.enable()
    after = _scheduled()
    found = {
        "seconds": seconds,
        "cpu_s": time.process_time() - cpu_s,
        "ran_ns": after[0] - ran_ns,
        "waited_ns": after[1] - waited_ns,
    }
    return found, result


def _scheduled() -> tuple[int, int]:
    """Nanoseconds in which the main thread ran, and in which it could have but waited for a CPU."""
    try:
        ran, waited = Path("/proc/self/schedstat").read_text().split()[:2]
    except OSError:
        return 0, 0
    return int(ran), int(waited)


def _peak_bytes() -> int | None:
    """Most memory that was resident; `ru_maxrss` would begin with that of the parent."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


class Driver:
    """The pytest plugin: runs the benchmarks that the parent names, one after another."""

    def __init__(self, channel: Channel, tree: Path) -> None:
        self._channel, self._tree = channel, tree
        self._uncollected: dict[str, str] = {}
        self._benchmark: DrivenBenchmark | None = None
        self._failure: dict[str, str] | None = None

    @pytest.fixture
    def benchmark(self) -> Iterator[DrivenBenchmark]:
        """Takes the place of pytest-benchmark's."""
        self._benchmark = DrivenBenchmark(self._channel, self._tree)
        yield self._benchmark

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep what could not be collected: a file that needs what its tree does not have."""
        if report.failed:
            self._uncollected[Path(report.nodeid).name] = _one_line(report)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        """Keep how a benchmark failed first."""
        report: pytest.TestReport = yield
        if self._failure is None and call.excinfo is not None:
            kind = _kind(call.excinfo.type)
            reason = str(call.excinfo.value) if kind == "wrong tree" else _one_line(report)
            self._failure = {"kind": kind, "reason": reason}
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Instead of every test in turn: those that the parent names."""
        items = {benchmark_name(item): item for item in session.items if item.get_closest_marker(MARKER) is not None}
        self._channel.send({"collected": list(items), "uncollected": self._uncollected})
        while (command := self._channel.receive()) is not None:
            if command["op"] == "begin":
                self._channel.send(self._run(items.get(command["name"])))
        return True

    def _run(self, item: pytest.Item | None) -> dict[str, Any]:
        """Run one benchmark to its end; what to tell the parent of it, which has got its samples by then."""
        if item is None:
            return {"failed": {"kind": "missing", "reason": "; ".join(self._uncollected.values()) or "not there"}}
        self._benchmark = self._failure = None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        if self._failure is not None:
            return {"failed": self._failure}
        if self._benchmark is None:
            return {"failed": {"kind": "error", "reason": "it does not use the fixture `benchmark`"}}
        return {"ended": self._benchmark.extra_info, "peak_bytes": _peak_bytes()}


def benchmark_name(item: pytest.Item) -> str:
    """What a benchmark is called in reports: its test without `test_`."""
    return item.name.removeprefix("test_")


def _kind(error: type[BaseException]) -> str:
    if issubclass(error, pytest.skip.Exception):
        return "skipped"
    if issubclass(error, WrongTree):
        return "wrong tree"
    return "missing" if issubclass(error, _MISSING) else "error"


def _one_line(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The error itself, without its traceback, which is in the log."""
    told = report.longrepr
    if isinstance(told, tuple):  # of a skip: file, line, reason
        return str(told[2])
    crash = getattr(told, "reprcrash", None)
    lines = (crash.message if crash is not None else str(told)).strip().splitlines()
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E  ")]  # of a file not collected
    return " ".join((errors[-1] if errors else lines[0] if lines else "no reason given").split())


def main(argument: str) -> int:
    """Run the benchmarks in the folder that the JSON in `argument` names, from its tree."""
    spec = json.loads(argument)
    benchmarks, tree = Path(spec["benchmarks"]), Path(spec["tree"])
    options = ["-q", "-s", "-o", "addopts=", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    # The fixture of pytest-benchmark would win, and its loop is not driven from outside.
    options += ["-p", "no:benchmark", f"--rootdir={spec['root']}", "-c", str(Path(spec["root"], "pyproject.toml"))]
    return int(pytest.main([*options, str(benchmarks)], plugins=[Driver(Channel(), tree)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
