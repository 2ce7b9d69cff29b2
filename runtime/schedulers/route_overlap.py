"""`route_overlap`: requests whose next tokens need the same experts are decoded together.

The token scheduler of ExpertFlow (arXiv 2410.17954), for requests that are decoded instead of the tokens of two
batches: see `partition` for how they are split. The paper moves KV states to their new batch; a paged KV cache needs
none of that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from runtime.schedulers.base import Request, Route, Scheduler
from runtime.schedulers.fifo import next_prompt
from runtime.schedulers.partition import partition


class RouteOverlap(Scheduler):
    """Prompts are computed as they come, as in `fifo`; then all decoding requests make one *unit*.

    A unit is planned once: its requests are split into batches of `group` by their routes, and the batches run in
    turn. Each request gets one token in it; a route is known for one token, so the next unit is planned anew. Requests
    that finish meanwhile drop out of it, and those that begin to decode meanwhile join the next one: a request is in
    any `2 * window - 1` consecutive decode passes at least once. An incomplete unit makes as few batches as hold it.

    Routes are read when a unit of more than one batch is planned and at no other time. Requests whose route is not
    known fill up the batches of the others; without any route the order is that of admission.
    """

    needs_routes = True

    def __init__(self, group: int, window: int) -> None:
        super().__init__(group, window)
        self._unit: deque[list[str]] = deque()
        partition(np.eye(2, dtype=np.bool_)[:, None], 1)  # compiles now rather than in the middle of serving

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
        decoding = [request.id for request in running if request.is_decoding]
        while self._unit:
            if batch := [name for name in self._unit.popleft() if name in decoding]:
                return batch
        self._unit.extend(self._planned(decoding, routes))
        return self._unit.popleft()

    def _planned(self, decoding: Sequence[str], routes: Mapping[str, Route]) -> list[list[str]]:
        if len(decoding) <= self.group:
            return [list(decoding)]
        known = {name: route for name in decoding if (route := routes.get(name)) is not None}
        if not known:
            return [list(decoding[start : start + self.group]) for start in range(0, len(decoding), self.group)]
        unknown = np.zeros_like(next(iter(known.values())))
        rows = np.stack([known.get(name, unknown) for name in decoding])
        return [[decoding[row] for row in batch] for batch in partition(rows, self.group)]
