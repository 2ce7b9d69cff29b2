"""The parent's end of a contender process: start it in its memory cgroup, ask it, and end it whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness.measure.cgroup import MemoryCgroup, memory_cgroup
from harness.measure.line_process import HasEnded, LineProcess, NoAnswer
from runtime.errors import ExpertFlowError

Kind = Literal[
    "engine",
    "reference",
    "resident",
    "accelerate_experts",
    "accelerate_layers",
    "batch",
    "batch_resident",
    "gpu_reference",
    "gpu_engine",
    "gpu_synchronous",
    "gpu_plain",
    "gpu_accelerate",
]

LOAD_TIMEOUT_S = 600.0
_ROOT = Path(__file__).parents[2]


class ContenderFailed(ExpertFlowError):
    """A contender did not load or answer; the message says why, `out_of_memory` whether memory was the reason."""

    def __init__(self, reason: str, *, out_of_memory: bool) -> None:
        super().__init__(reason)
        self.out_of_memory = out_of_memory


@dataclass(frozen=True)
class Spec:
    """What a contender process loads.

    `overrides` and `profile` are for the engine and the reference, `implementation` (of experts) for the others;
    `folder` is where accelerate may write. `device` is for those of a GPU, which load when they are asked to.
    """

    kind: Kind
    model: str
    threads: int
    profile: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    implementation: str | None = None
    folder: str | None = None
    device: str | None = None


class ContenderProcess:
    """A running contender. Made by `start`."""

    def __init__(self, spec: Spec, group: MemoryCgroup | None, log: Path) -> None:
        self.spec, self.group = spec, group
        argument = json.dumps({**asdict(spec), "cgroup": None if group is None else str(group.path)})
        threads = str(spec.threads)
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        command = [sys.executable, "-m", "harness.measure.contenders", argument]
        self._process = LineProcess(command, log=log, environment=environment)
        self.facts: dict[str, Any] = {}

    def ask(self, op: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            ContenderFailed: the process died, reported an error, or took longer than `timeout_s` (and was ended).
        """
        return self._answer(lambda: self._process.ask({"op": op, **arguments}, timeout_s))

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next answer; see `ask`."""
        return self._answer(lambda: self._process.receive(timeout_s))

    def _answer(self, receive: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            answer = receive()
        except NoAnswer as error:
            raise ContenderFailed(str(error), out_of_memory=False) from None
        except HasEnded as error:
            raise self._death(error.code) from None
        if "error" in answer:
            raise ContenderFailed(answer["error"], out_of_memory=_is_out_of_memory(answer["error"]))
        return answer

    @property
    def peak_bytes(self) -> int | None:
        """Most memory that its cgroup was charged, page cache included; None without a cgroup."""
        return None if self.group is None else self.group.peak_bytes

    def close(self) -> None:
        """End the process, by asking or else by killing it. Idempotent."""
        with contextlib.suppress(ContenderFailed, ValueError, OSError):
            if self._process.is_running:
                self.ask("close", timeout_s=5.0)
        self._process.end()

    def kill(self) -> None:
        """End the process now."""
        self._process.end()

    def _death(self, code: int) -> ContenderFailed:
        if code == -signal.SIGKILL and self.group is not None and self.group.num_oom_kills:
            return ContenderFailed("killed by the kernel: out of memory", out_of_memory=True)
        last = next(iter(self._process.last_words(1)), "nothing on stderr")
        return ContenderFailed(f"ended with code {code}: {last}", out_of_memory=_is_out_of_memory(last))


def _is_out_of_memory(message: str) -> bool:
    told = (
        "MemoryError",
        "BudgetError",
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "Cannot allocate memory",
    )
    return any(words in message for words in told)


@contextlib.contextmanager
def start(
    name: str, spec: Spec, *, limit_bytes: int | None, use_cgroup: bool, load_timeout_s: float = LOAD_TIMEOUT_S
) -> Iterator[ContenderProcess]:
    """A contender that has loaded its model, in a memory cgroup of its own where `use_cgroup`; ended with the block.

    Raises:
        ContenderFailed: it could not load.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertflow-bench-")))
        group = stack.enter_context(memory_cgroup(name, limit_bytes)) if use_cgroup else None
        process = ContenderProcess(spec, group, folder / "stderr")
        try:
            process.facts = process.receive(load_timeout_s)
            yield process
        except BaseException:
            process.kill()
            raise
        finally:
            process.close()
