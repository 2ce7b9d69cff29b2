"""The parent's end of one side of the paired check: start its process, ask it, and end it whatever happens."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from harness.checks.worktrees import Tree
from harness.measure.line_process import HasEnded, LineProcess, NoAnswer
from runtime.errors import ExpertFlowError

_WORKER = Path(__file__).with_name("worker.py")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_DROPPED = ("PYTEST_", "GIT_", "NUMBA_CACHE_DIR")
"""Beginnings of variables that would bring in what is not of the tree: options, plug-ins, another's compiled code."""
_TAIL_LINES = 12


class SideFailed(ExpertFlowError):
    """A side could not do what it was asked.

    Attributes:
        side: its name.
        kind: "missing" (its tree lacks something that the benchmark needs), "skipped", "error", "wrong tree" (modules
            of another were imported), "crash" or "hang".
    """

    def __init__(self, side: str, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.side, self.kind = side, kind


@dataclass(frozen=True)
class Timeouts:
    """Seconds after which a process counts as hung."""

    start_s: float = 300.0
    begin_s: float = 600.0
    """Compiles whatever the tree compiles, once."""
    sample_s: float = 120.0


@dataclass(frozen=True)
class Sample:
    """One run of a benchmark: its wall time, and for the surroundings its CPU time, and how long its main thread ran
    and waited for a CPU."""

    seconds: float
    cpu_s: float
    ran_ns: int
    waited_ns: int


@dataclass(frozen=True)
class Ended:
    """What a benchmark said of itself, and the most memory that its process has had so far; None: not known."""

    info: dict[str, Any]
    peak_bytes: int | None


class Side:
    """A process that runs the benchmarks of `benchmarks` with the code of `tree`; use it in a `with` block.

    Args:
        benchmarks: the folder of the benchmarks; that of the head for both sides.
        log: where the process writes what it prints.

    Attributes:
        collected: the names of its benchmarks, once it is ready. uncollected: why files of them could not be loaded.

    Raises:
        SideFailed: from every method.
    """

    def __init__(self, tree: Tree, root: Path, benchmarks: Path, log: Path, timeouts: Timeouts | None = None) -> None:
        self._tree, self._log, self._timeouts = tree, log, timeouts or Timeouts()
        self._spec = {"tree": str(tree.path), "root": str(root), "benchmarks": str(benchmarks)}
        self.collected: tuple[str, ...] = ()
        self.uncollected: dict[str, str] = {}

    def __enter__(self) -> Self:
        command = [self._tree.python, "-P", str(_WORKER), json.dumps(self._spec)]
        self._process = LineProcess(
            command, log=self._log, environment=_environment(self._tree.path), folder=self._tree.path
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.end()

    def ready(self) -> None:
        """Wait until the process has found its benchmarks."""
        told = self._answer(lambda: self._process.receive(self._timeouts.start_s))
        self.collected, self.uncollected = tuple(told["collected"]), told["uncollected"]

    def begin(self, name: str) -> None:
        """Set a benchmark up and run it once unmeasured."""
        self._ask({"op": "begin", "name": name}, self._timeouts.begin_s)

    def sample(self) -> Sample:
        """Run the benchmark that has begun once."""
        return Sample(**self._ask({"op": "sample"}, self._timeouts.sample_s))

    def end(self) -> Ended:
        """Finish the benchmark that has begun."""
        answer = self._ask({"op": "end"}, self._timeouts.sample_s)
        return Ended(answer["ended"], answer["peak_bytes"])

    def _ask(self, command: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        return self._answer(lambda: self._process.ask(command, timeout_s))

    def _answer(self, receive: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        name = self._tree.name
        try:
            answer = receive()
        except NoAnswer as error:
            raise SideFailed(name, "hang", str(error)) from None
        except HasEnded as error:
            words = " / ".join(line.strip() for line in self._process.last_words(_TAIL_LINES) if line.strip())
            raise SideFailed(name, "crash", f"{_ending(error.code)}; its last words: {words or 'none'}") from None
        if (failed := answer.get("failed")) is not None:
            raise SideFailed(name, failed["kind"], failed["reason"])
        return answer


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"


def _environment(tree: Path) -> dict[str, str]:
    """The same for both sides but for the tree, which comes before whatever is installed."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_DROPPED)}
    return {
        **kept,
        **dict.fromkeys(_THREADS, "1"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")])),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
