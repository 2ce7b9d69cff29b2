"""Ctrl-C and SIGTERM in a command: once to finish what is under way, twice to stop at once.

Commands listen, the engine never does: a server has handlers of its own. It ends a text by a `StoppingCriteria` that it
gives to `engine.model.generate`, a batch by `stop` of `serving.run_batch`, one request of it by an `on_token` that
returns False; the running pass is always completed, and the engine stays usable.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

ECHO_S = 0.25
"""A second signal this soon is the first one again: `timeout` and others signal the process and its group."""


def _to_stderr(text: str) -> None:
    """Past the buffers of Python, which the program may be writing to right now."""
    os.write(2, f"{text}\n".encode())


class StopRequest:
    """Whether somebody wants to stop. Call it to ask.

    Attributes:
        signal: the first one that came; None: nobody does.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        """True after the first signal."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """As shells have it, of what a signal ended: 128 + its number; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal

    def raise_if_set(self) -> None:
        """Raise KeyboardInterrupt after the first signal."""
        if self():
            raise KeyboardInterrupt

    def heeded(self, call: Callable[P, T]) -> Callable[P, T]:
        """The same call, which after the first signal is not begun any more: it raises KeyboardInterrupt."""

        def heeding(*args: P.args, **kwargs: P.kwargs) -> T:
            self.raise_if_set()
            return call(*args, **kwargs)

        return heeding

    @contextmanager
    def listening(
        self,
        until: str,
        signals: Sequence[signal.Signals] = (signal.SIGINT,),
        say: Callable[[str], None] = _to_stderr,
    ) -> Iterator[StopRequest]:
        """Within: the first of `signals` sets the request, a second one does what it would do outside.

        Signals can be handled in the main thread only; elsewhere this does nothing.

        Args:
            until: what is finished first, for people: "this run is measured".
            say: told once what happens now, wherever the program is.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        first_s = 0.0

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal first_s
            if self.signal is None:
                self.signal, first_s = signal.Signals(number), time.monotonic()
                again = "Ctrl-C" if number == signal.SIGINT else self.signal.name
                say(f"stopping when {until}; {again} again to stop now")
            elif time.monotonic() - first_s >= ECHO_S:
                signal.signal(number, before[signal.Signals(number)])
                os.kill(os.getpid(), number)

        before = {number: signal.signal(number, handle) for number in signals}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
