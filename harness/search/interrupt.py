"""Ctrl-C: once to finish what is being measured, twice to stop at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class StopRequest:
    """Whether the user wants to stop. Call it to ask."""

    def __init__(self) -> None:
        self._is_set = threading.Event()

    def __call__(self) -> bool:
        """True after the first Ctrl-C."""
        return self._is_set.is_set()

    def raise_if_set(self) -> None:
        """Raise KeyboardInterrupt after the first Ctrl-C."""
        if self._is_set.is_set():
            raise KeyboardInterrupt

    def heeded(self, call: Callable[P, T]) -> Callable[P, T]:
        """The same call, which after the first Ctrl-C is not begun any more: it raises KeyboardInterrupt."""

        def heeding(*args: P.args, **kwargs: P.kwargs) -> T:
            self.raise_if_set()
            return call(*args, **kwargs)

        return heeding

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[StopRequest]:
        """Within: the first Ctrl-C sets the request, the second raises KeyboardInterrupt.

        Signals can be handled in the main thread only; elsewhere this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self._is_set.is_set():
                raise KeyboardInterrupt
            self._is_set.set()
            say("stopping when this run is measured; Ctrl-C again to stop now")

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)
