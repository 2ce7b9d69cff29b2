"""The parent's end of a contender process: start it in its memory cgroup, ask it, and end it whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness.measure.cgroup import MemoryCgroup, memory_cgroup
from runtime.errors import ExpertFlowError

Kind = Literal["engine", "reference", "resident", "accelerate_experts", "accelerate_layers", "batch", "batch_resident"]

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
    `folder` is where accelerate may write.
    """

    kind: Kind
    model: str
    threads: int
    profile: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    implementation: str | None = None
    folder: str | None = None


class ContenderProcess:
    """A running contender. Made by `start`."""

    def __init__(self, spec: Spec, group: MemoryCgroup | None, log: Path) -> None:
        self.spec, self.group, self._log = spec, group, log
        argument = json.dumps({**asdict(spec), "cgroup": None if group is None else str(group.path)})
        threads = str(spec.threads)
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        # A session of its own, so that Ctrl-C reaches only the parent, which then ends its children in order.
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.measure.contenders", argument],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                start_new_session=True,
            )
        self.facts: dict[str, Any] = {}

    def ask(self, op: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            ContenderFailed: the process died, reported an error, or took longer than `timeout_s` (and was ended).
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
        return self.receive(timeout_s)

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next answer; see `ask`."""
        assert self._process.stdout is not None
        timed_out = threading.Event()

        def expire() -> None:
            timed_out.set()
            self._process.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if timed_out.is_set():
            raise ContenderFailed(f"no answer within {timeout_s:.0f} s", out_of_memory=False)
        if not line:
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
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
            if self._process.poll() is None:
                self.ask("close", timeout_s=5.0)
        self._end()

    def kill(self) -> None:
        """End the process now."""
        self._end()

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _death(self) -> ContenderFailed:
        code = self._process.wait()
        if code == -signal.SIGKILL and self.group is not None and self.group.num_oom_kills:
            return ContenderFailed("killed by the kernel: out of memory", out_of_memory=True)
        lines = self._log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "nothing on stderr"
        return ContenderFailed(f"ended with code {code}: {last}", out_of_memory=_is_out_of_memory(last))


def _is_out_of_memory(message: str) -> bool:
    told = ("MemoryError", "BudgetError", "not enough memory", "can't allocate memory", "Cannot allocate memory")
    return any(words in message for words in told)


@contextlib.contextmanager
def start(name: str, spec: Spec, *, limit_bytes: int | None, use_cgroup: bool) -> Iterator[ContenderProcess]:
    """A contender that has loaded its model, in a memory cgroup of its own where `use_cgroup`; ended with the block.

    Raises:
        ContenderFailed: it could not load.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertflow-bench-")))
        group = stack.enter_context(memory_cgroup(name, limit_bytes)) if use_cgroup else None
        process = ContenderProcess(spec, group, folder / "stderr")
        try:
            process.facts = process.receive(LOAD_TIMEOUT_S)
            yield process
        except BaseException:
            process.kill()
            raise
        finally:
            process.close()
