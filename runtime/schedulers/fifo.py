"""`fifo`: first come, first served; the floor of the family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runtime.schedulers.base import Request, Route, Scheduler


class Fifo(Scheduler):
    """Prompts are computed as they come, one a pass, while fewer than `group * window` requests are under way.

    Decoding requests are taken `group` at a time, in order of admission, the batches in turn.
    """

    def __init__(self, group: int, window: int = 1) -> None:
        super().__init__(group, window)
        self._turn: list[str] = []

    def choose(
        self,
        waiting: Sequence[Request],
        running: Sequence[Request],
        routes: Mapping[str, Route],
        now_s: float,
    ) -> Sequence[str]:
        """See `Scheduler.choose`."""
        if prompt := next_prompt(waiting, running, self.group * self.window):
            return [prompt.id]
        decoding = {request.id for request in running if request.is_decoding}
        self._turn = [name for name in self._turn if name in decoding]
        if not self._turn:
            self._turn = [request.id for request in running if request.is_decoding]
        chosen, self._turn = self._turn[: self.group], self._turn[self.group :]
        return chosen


def next_prompt(waiting: Sequence[Request], running: Sequence[Request], most: int) -> Request | None:
    """The request whose prompt is computed next, in order of arrival: a begun one, else a new one while fewer than
    `most` run; None: time to decode."""
    begun = next((request for request in running if not request.is_decoding), None)
    if begun is not None:
        return begun
    return waiting[0] if waiting and len(running) < most else None
