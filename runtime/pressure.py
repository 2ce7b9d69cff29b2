"""Memory pressure: whether the memory that the machine has left is short, looked at off the hot path."""

from __future__ import annotations

import time
from collections.abc import Callable

from runtime import machine

RESERVE_BYTES = 64 << 20
"""Memory that is left alone; less than `facts.BUFFER_BYTES`, so that slots that fitted on loading go on to fit."""

LOOK_EVERY_S = 1.0
CALM_LOOKS = 10
"""In so many looks one after the other there must have been memory to spare before any of it is taken again."""


class PressureWatch:
    """Compares what is available with a reserve, at most once a second: a look takes a fraction of a millisecond.

    Args:
        available_bytes: memory that this process can still take.
        resident_bytes: what it has taken. now_s: the clock, in seconds.

    Attributes:
        limit_bytes: of the resident memory of the process, beside what the machine has; None: no limit.
    """

    def __init__(
        self,
        available_bytes: Callable[[], int] = machine.available_memory_bytes,
        resident_bytes: Callable[[], int] = machine.resident_bytes,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._available_bytes, self._resident_bytes, self._now_s = available_bytes, resident_bytes, now_s
        self.limit_bytes: int | None = None
        self._next_look_s, self._num_calm = now_s(), 0

    def look(self, uncharged_bytes: int) -> int:
        """Bytes to give back, negative, or that may be taken in addition, positive; 0: none, or too early to say.

        There is a gap between the two, and some time, so that memory which comes and goes is not followed.

        Args:
            uncharged_bytes: the process will take them as things are.
        """
        if self._now_s() < self._next_look_s:
            return 0
        self._next_look_s = self._now_s() + LOOK_EVERY_S
        spare_bytes = self.spare_bytes(uncharged_bytes)
        may_take_bytes = spare_bytes - RESERVE_BYTES
        self._num_calm = self._num_calm + 1 if may_take_bytes > 0 else 0
        if spare_bytes < 0:
            return spare_bytes
        return may_take_bytes if self._num_calm >= CALM_LOOKS else 0

    def spare_bytes(self, uncharged_bytes: int) -> int:
        """What is available now, less the reserve and what will be taken; negative: memory is short."""
        available_bytes = self._available_bytes()
        if self.limit_bytes is not None:
            available_bytes = min(available_bytes, self.limit_bytes - self._resident_bytes())
        return available_bytes - RESERVE_BYTES - uncharged_bytes
