"""A child process that is asked and answers in lines of JSON on its standard streams, and ends whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class NoAnswer(Exception):
    """Nothing came in time, and the process was killed."""


class HasEnded(Exception):
    """The process ended instead of answering; `code` as `Popen.returncode`."""

    def __init__(self, code: int) -> None:
        super().__init__(f"ended with code {code}")
        self.code = code


class LineProcess:
    """The parent's end.

    Args:
        log: where the process writes what it prints on stderr.
        environment: all of it. folder: that it runs in; None: this one's.
    """

    def __init__(
        self, command: Sequence[str], *, log: Path, environment: Mapping[str, str], folder: Path | None = None
    ) -> None:
        self._log = log
        with log.open("wb") as errors:
            # A session of its own: Ctrl-C reaches only the parent, and whatever it has started ends with it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=folder,
                env=environment,
                text=True,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """It has not ended yet."""
        return self._process.poll() is None

    def ask(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a message and wait for the answer; see `receive`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        return self.receive(timeout_s)

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next answer. Raises NoAnswer, HasEnded."""
        assert self._process.stdout is not None
        is_late = threading.Event()

        def expire() -> None:
            is_late.set()
            self._kill()

        timer = threading.Timer(timeout_s, expire)
        timer.daemon = True  # a signal may come before it can be cancelled: nobody waits for it then
        try:
            timer.start()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if is_late.is_set():
            raise NoAnswer(f"no answer within {timeout_s:.0f} s")
        if not line:
            raise HasEnded(self._process.wait())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def last_words(self, most: int) -> list[str]:
        """The last lines that it wrote on stderr."""
        return self._log.read_text(errors="replace").strip().splitlines()[-most:]

    def end(self) -> None:
        """Kill it if it runs, and close its streams. Idempotent."""
        if self.is_running:
            self._kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
