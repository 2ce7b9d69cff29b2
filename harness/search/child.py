"""A process of its own for a trial: a crash, a hang or an exhausted memory ends it and nothing else.

Processes are forked from a server that has torch, transformers and the engine imported. Each is the leader of its own
session, writes to a log file, dies with the server, and talks to its parent in JSON lines through a socket: questions
one way; progress and answers the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from harness.hardware.counters import process_fields
from harness.hardware.memory import map_files_like
from harness.search.outcome import Kind, Outcome
from runtime.errors import BudgetError, ExpertFlowError

Work = Callable[[Any], dict[str, Any]]
Watch = Callable[[dict[str, Any]], str]
"""Is given each report of a process; says why to stop it now, empty: go on."""

_PRELOAD = [
    "torch",
    "transformers",
    "runtime.build",
    "runtime.serving",
    "harness.measure.runner",
    "harness.search.trial",
]
_ROOT = Path(__file__).parents[2]
_PR_SET_PDEATHSIG = 1
_EXIT_GRACE_S = 10.0
_MOST_LINE_BYTES = 64 << 20
_SERVER_IS_GONE = 255
"""Exit code that multiprocessing gives when the fork server, which would know it, has ended as well."""

_pipe: socket.socket | None = None


def report(progress: dict[str, Any]) -> None:
    """Tell the parent how far this process is; does nothing in one that `start` has not started."""
    _send({"progress": progress})


def reply(work: Callable[[], dict[str, Any]]) -> Kind:
    """Send the parent what `work()` returns, or how it failed; how it ended."""
    kind, message, result = _answered(work)
    sys.stdout.flush()
    sys.stderr.flush()
    _send({"kind": kind, "message": message, "result": result, **_cpu_use(os.getpid())})
    return kind


def questions() -> Iterator[Any]:
    """What the parent asks, until it has no more questions. Each wants one `reply`."""
    assert _pipe is not None
    with _pipe.makefile("r", encoding="utf-8") as lines, contextlib.suppress(ConnectionResetError):
        for line in lines:
            yield json.loads(line)


def _send(message: dict[str, Any]) -> None:
    if _pipe is not None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody listens any more
            _pipe.sendall(json.dumps(message).encode() + b"\n")


def _answered(work: Callable[[], dict[str, Any]]) -> tuple[Kind, str, dict[str, Any] | None]:
    try:
        result = work()
        json.dumps(result)
        return Kind.OK, "", result
    except (MemoryError, BudgetError) as error:
        return Kind.OUT_OF_MEMORY, str(error) or "MemoryError", None
    except ExpertFlowError as error:
        return Kind.ERROR, str(error), None
    except Exception as error:
        traceback.print_exc()
        return Kind.OUT_OF_MEMORY if _is_out_of_memory(error) else Kind.ERROR, f"{type(error).__name__}: {error}", None


def _is_out_of_memory(error: Exception) -> bool:
    """torch's CPU allocator and CUDA's raise plain RuntimeErrors, the system an OSError."""
    told = ("allocate memory", "out of memory")
    return type(error).__name__ == "OutOfMemoryError" or any(words in str(error).lower() for words in told)


def _main(pipe: socket.socket, log: str, work: Work, argument: Any) -> None:
    global _pipe
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    map_files_like(os.getppid())
    _pipe = pipe
    reply(lambda: work(argument))


class Child:
    """The parent's end of a process that `start` has started."""

    def __init__(self, process: ForkServerProcess, pipe: socket.socket, log: Path) -> None:
        self._process, self._pipe, self._log = process, pipe, log
        self._received = b""
        self._begin()

    def ask(self, question: Any, timeout_s: float) -> Outcome:
        """Put a question (JSON) and wait for its answer, as `answer`."""
        self._begin()
        self._pipe.settimeout(timeout_s)
        try:
            self._pipe.sendall(json.dumps(question).encode() + b"\n")
        except TimeoutError:
            return self._timed(Outcome(Kind.TIMEOUT, f"took no question within {timeout_s:.0f} s"))
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended, and the answer will be how
        return self.answer(timeout_s)

    def answer(self, timeout_s: float, watch: Watch | None = None) -> Outcome:
        """Wait for the next answer; how the process ended, where it ends before, or exceeds `timeout_s`.

        A process that `watch` wants stopped is HOPELESS, with the last report as result. It runs on: leaving `start`
        ends it.
        """
        deadline = time.perf_counter() + timeout_s
        while (line := self._line(deadline)) is not None:
            if not line:
                return self._timed(self._ending())
            found = _read(line)
            if isinstance(found, Outcome):
                return self._timed(found)
            if watch is not None and (reason := watch(found)):
                return self._timed(Outcome(Kind.HOPELESS, reason, found))
        return self._timed(Outcome(Kind.TIMEOUT, f"ran longer than {timeout_s:.0f} s"))

    def finish(self) -> None:
        """No more questions: let a process that has answered end in order."""
        self._pipe.close()
        self._process.join(_EXIT_GRACE_S)

    def kill(self) -> None:
        """End the process and whatever it started, now. Idempotent."""
        self._pipe.close()
        _kill(self._process)

    def _begin(self) -> None:
        """What is said from now on belongs to the next answer."""
        self._began, self._num_oom_kills = time.perf_counter(), _oom_kills()
        self._log_start = self._log.stat().st_size if self._log.exists() else 0

    def _line(self, deadline: float) -> bytes | None:
        """The next line, empty when there will be none; None past the deadline."""
        while b"\n" not in self._received:
            left_s = deadline - time.perf_counter()
            ready = connection.wait([self._pipe, self._process.sentinel], left_s) if left_s > 0 else []
            if not ready:
                return None
            # What it wrote before it ended is still to be read.
            if self._pipe not in ready and not connection.wait([self._pipe], 0):
                return b""
            data = self._read_some()
            self._received += data
            if not data or len(self._received) > _MOST_LINE_BYTES:
                line, self._received = self._received, b""
                return line
        line, _, self._received = self._received.partition(b"\n")
        return line + b"\n"

    def _read_some(self) -> bytes:
        try:
            return self._pipe.recv(1 << 16)
        except ConnectionResetError:
            return b""

    def _ending(self) -> Outcome:
        self._process.join(_EXIT_GRACE_S)
        code, said = self._process.exitcode, f"; it last said: {tail}" if (tail := self._tail()) else ""
        if code in (-signal.SIGKILL, _SERVER_IS_GONE) and _oom_kills() > self._num_oom_kills:
            return Outcome(Kind.OUT_OF_MEMORY, f"the kernel ended it for lack of memory{said}")
        if code is not None and code < 0:
            return Outcome(Kind.CRASH, f"ended by {signal.Signals(-code).name}{said}")
        how = "closed its pipe" if code is None else f"ended with exit code {code}"
        return Outcome(Kind.CRASH, f"{how} and gave no result{said}")

    def _tail(self) -> str:
        """The last line that was printed since `_begin`."""
        if not self._log.exists():
            return ""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def _timed(self, outcome: Outcome) -> Outcome:
        use = {} if outcome.cpu_s else _cpu_use(self._process.pid)
        return replace(outcome, wall_s=time.perf_counter() - self._began, **use)


@contextlib.contextmanager
def start(work: Work, argument: Any, log: Path) -> Iterator[Child]:
    """Run `work(argument)`, both picklable, in a process of its own; whatever it prints is appended to `log`.

    However the block ends, Ctrl-C included, the process and its children are gone afterwards.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    _start_server()
    ours, theirs = socket.socketpair()
    process = context.Process(target=_main, args=(theirs, str(log), work, argument), daemon=True)
    child = Child(process, ours, log)
    try:
        process.start()
        theirs.close()
        yield child
    finally:
        theirs.close()
        child.kill()


def _start_server() -> None:
    """Start the fork server with Ctrl-C blocked: it goes to the whole foreground group, and is for the tuner alone.

    The resource tracker, which the server needs, unblocks it when it starts, so that it has to be there before.
    Python before 3.11.9 and 3.12.3 does not pass `sys.path` on (gh-117378) and leaves out what it then cannot import.
    """
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *([path] if path else [])])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path


def _read(line: bytes) -> Outcome | dict[str, Any]:
    """An answer, or a report."""
    try:
        found = json.loads(line)
        if "progress" in found:
            return dict(found["progress"])
        return Outcome(
            Kind(found["kind"]), found["message"], found["result"], 0.0, found["cpu_s"], found["cpu_wait_share"]
        )
    except (ValueError, KeyError, TypeError) as error:
        return Outcome(Kind.ERROR, f"the trial answered something else than a result: {error}")


def _kill(process: ForkServerProcess) -> None:
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()
    process.join()


def _cpu_use(pid: int | None) -> dict[str, Any]:
    """`cpu_s` and `cpu_wait_share` of a running process, see `Outcome`; the time is that of its ended children too."""
    cpu_s, wait_share = 0.0, None
    with contextlib.suppress(OSError, IndexError, ValueError):
        cpu_s = sum(map(int, process_fields(pid)[11:15])) / os.sysconf("SC_CLK_TCK")
        ran_ns, waited_ns = map(int, Path(f"/proc/{pid}/schedstat").read_text().split()[:2])
        wait_share = waited_ns / max(1, ran_ns + waited_ns)
    return {"cpu_s": cpu_s, "cpu_wait_share": wait_share}


def _oom_kills() -> int:
    """Processes that the kernel has ended for lack of memory since it started."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(fields.get("oom_kill", 0))
    return 0
