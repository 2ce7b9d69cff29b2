"""One trial in its own process: a crash, a hang or an exhausted memory ends the trial and nothing else.

Processes are forked from a server that has torch, transformers and the engine imported. Each is the leader of its own
session, writes to a log file, dies with the server, and answers one JSON object through a pipe.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from harness.hardware.memory import map_files_like
from harness.measure.workload import TokenRequest
from harness.search.outcome import Kind, Measurement, Outcome
from runtime import machine
from runtime.errors import BudgetError, ExpertFlowError

Work = Callable[[Any], dict[str, Any]]

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
_WARM_UP_TOKENS = (8, 3)
_EXIT_GRACE_S = 10.0


@dataclass(frozen=True)
class TrialSpec:
    """What to measure: `requests`, `concurrency` of them outstanding. `overrides` are dotted profile keys."""

    model: str
    overrides: dict[str, Any] = field(hash=False)
    requests: tuple[TokenRequest, ...]
    concurrency: int


def measure(spec: TrialSpec) -> dict[str, Any]:
    """Load the engine, warm it up, replay the workload. Runs in the trial's process.

    Peak memory is that of the whole process from before loading on.
    """
    from transformers.utils import logging

    import runtime
    from harness.measure.runner import serve

    logging.disable_progress_bar()  # its lock is a semaphore, which a killed trial would leave behind
    machine.reset_peak()
    start = time.perf_counter()
    # A configuration is measured as it is, not while the engine finds out whether its prefetching pays.
    with runtime.load(spec.model, overrides={**spec.overrides, "prefetch.on_trial": False}) as engine:
        loaded = time.perf_counter()
        serve(engine, [_shortened(spec.requests[-1])], concurrency=1)
        engine.reset_stats()
        began = time.perf_counter()
        run = serve(engine, spec.requests, spec.concurrency)
        return Measurement(
            latency_ms_p50=run.latency_ms_p50,
            ttft_ms_p50=run.ttft_ms_p50,
            tpot_ms_p50=run.tpot_ms_p50,
            tokens_per_s=run.tokens_per_s,
            tokens_sha256=run.sha256,
            peak_memory_bytes=machine.peak_resident_bytes(),
            slots=int(engine.profile.cache.slots or 0),
            load_s=loaded - start,
            run_s=time.perf_counter() - began,
            num_tokens=sum(len(request.output_ids) for request in spec.requests),
            stats=engine.stats().as_dict(),
            notes=engine.notes,
        ).as_dict()


def bare_process(_: None) -> dict[str, Any]:
    """Resident memory of a trial's process before it loads anything."""
    return {"resident_bytes": machine.resident_bytes()}


def _shortened(request: TokenRequest) -> TokenRequest:
    prompt_tokens, output_tokens = _WARM_UP_TOKENS
    return TokenRequest(
        request.id, request.task, request.prompt_ids[:prompt_tokens], request.output_ids[:output_tokens]
    )


class TrialRunner:
    """Runs trials one after another.

    Args:
        log: what the trials print is appended here.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)

    def run(self, work: Work, argument: Any, timeout_s: float) -> Outcome:
        """Run `work(argument)` in a process of its own; both must be picklable, the result JSON.

        Whatever ends this call, Ctrl-C included, the process and its children are gone afterwards.
        """
        start, oom_kills = time.perf_counter(), _oom_kills()
        log_start = self._log.stat().st_size if self._log.exists() else 0
        with self._process(work, argument) as (process, receiver):
            connection.wait([receiver, process.sentinel], timeout_s)
            answer = _receive(receiver)
            if answer is None and process.is_alive():
                outcome = Outcome(Kind.TIMEOUT, f"ran longer than {timeout_s:.0f} s")
            else:
                process.join(_EXIT_GRACE_S)
                was_killed_for_memory = _oom_kills() > oom_kills
                outcome = _outcome(answer, process.exitcode, was_killed_for_memory, self._tail(log_start))
        return Outcome(outcome.kind, outcome.message, outcome.result, time.perf_counter() - start)

    @contextlib.contextmanager
    def _process(self, work: Work, argument: Any) -> Iterator[tuple[ForkServerProcess, Any]]:
        _start_server()
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_child, args=(sender, str(self._log), work, argument), daemon=True)
        try:
            process.start()
            sender.close()
            yield process, receiver
        finally:
            receiver.close()
            _kill(process)

    def _tail(self, start: int) -> str:
        """The last line that the trial printed."""
        if not self._log.exists():
            return ""
        with self._log.open("rb") as file:
            file.seek(start)
            lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def _start_server() -> None:
    """Start the fork server with Ctrl-C blocked: it goes to the whole foreground group, and is for the tuner alone.

    Python before 3.11.9 and 3.12.3 does not pass `sys.path` on (gh-117378) and leaves out what it then cannot import.
    """
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


def _child(sender: Any, log: str, work: Work, argument: Any) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    map_files_like(os.getppid())
    kind, message, result = _answer(work, argument)
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send_bytes(json.dumps({"kind": kind, "message": message, "result": result}).encode())


def _answer(work: Work, argument: Any) -> tuple[Kind, str, dict[str, Any] | None]:
    try:
        return Kind.OK, "", work(argument)
    except (MemoryError, BudgetError) as error:
        return Kind.OUT_OF_MEMORY, str(error) or "MemoryError", None
    except ExpertFlowError as error:
        return Kind.ERROR, str(error), None
    except Exception as error:
        traceback.print_exc()
        # torch's CPU allocator raises a plain RuntimeError.
        is_memory = "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError"
        return Kind.OUT_OF_MEMORY if is_memory else Kind.ERROR, f"{type(error).__name__}: {error}", None


def _receive(receiver: Any) -> bytes | None:
    try:
        return bytes(receiver.recv_bytes()) if receiver.poll() else None
    except (EOFError, OSError):
        return b""


def _outcome(answer: bytes | None, exit_code: int | None, was_killed_for_memory: bool, tail: str) -> Outcome:
    if answer:
        try:
            found = json.loads(answer)
            return Outcome(Kind(found["kind"]), found["message"], found["result"])
        except (ValueError, KeyError, TypeError) as error:
            return Outcome(Kind.ERROR, f"the trial answered something else than a result: {error}")
    said = f"; it last said: {tail}" if tail else ""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        if -exit_code == signal.SIGKILL and was_killed_for_memory:
            return Outcome(Kind.OUT_OF_MEMORY, f"the kernel ended it for lack of memory{said}")
        return Outcome(Kind.CRASH, f"ended by {name}{said}")
    return Outcome(Kind.CRASH, f"ended with exit code {exit_code} and no result{said}")


def _kill(process: ForkServerProcess) -> None:
    """End the process and whatever it started."""
    if process.pid is None:
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()
    process.join()


def _oom_kills() -> int:
    """Processes that the kernel has ended for lack of memory since it started."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(fields.get("oom_kill", 0))
    return 0
