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

QUANTUM = 8
"""Default of `quantum`. More saves further loads, ever fewer, and lets the other requests pause for longer."""


class RouteOverlap(Scheduler):
    """Prompts are computed as they come, as in `fifo`; then all decoding requests make one *unit*.

    A unit is planned once: its requests are split into batches of `group` by their routes, and the batches take turns
    of `quantum` decode passes. The places of requests that finish are taken by such as begin to decode meanwhile, else
    by members of the last batch; whoever finds no place joins the next unit. A request is in any
    `(2 * window - 1) * quantum` consecutive decode passes at least once. An incomplete unit makes as few batches as
    hold it.

    The paper plans for one token. A batch that decodes several in turn finds most experts where its last token left
    them, which saves more loads than the split itself does: what consecutive tokens of a text have in common is more
    than what texts have in common.

    Routes are read when a unit of more than one batch is planned and at no other time. Requests whose route is not
    known fill up the batches of the others; without any route the order is that of admission.

    Args:
        group, window: see `Scheduler`.
        quantum: at least 1, which is the paper's.
    """

    needs_routes = True

    def __init__(self, group: int, window: int, quantum: int = QUANTUM) -> None:
        super().__init__(group, window)
        self.quantum = quantum
        self._unit: deque[list[str]] = deque()  # batches, the one whose turn it is first
        self._left = 0  # passes of that turn
        self._members: set[str] = set()  # of the unit, since it was planned
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
        if batch := self._goes_on(decoding):
            return batch
        self._unit.extend(self._planned(decoding, routes))
        self._members, self._left = set(decoding), self.quantum
        return self._goes_on(decoding)

    def _goes_on(self, decoding: Sequence[str]) -> list[str]:
        """The batch whose turn it is, as far as it is still there, its free places taken; empty: the unit is over."""
        while self._unit:
            self._unit[0] = [name for name in self._unit[0] if name in decoding]
            if self._unit[0] and self._left:
                self._fill(decoding)
                self._left -= 1
                return self._unit[0]
            self._unit.popleft()
            self._left = self.quantum
        return []

    def _fill(self, decoding: Sequence[str]) -> None:
        """Free places go to requests that began to decode since, else to those whose turn would come last."""
        batch = self._unit[0]
        new = [name for name in decoding if name not in self._members][: self.group - len(batch)]
        self._members.update(new)
        batch += new
        while len(batch) < self.group and len(self._unit) > 1:
            last = self._unit[-1]
            if not last:
                self._unit.pop()
            elif (name := last.pop(0)) in decoding:
                batch.append(name)

    def _planned(self, decoding: Sequence[str], routes: Mapping[str, Route]) -> list[list[str]]:
        if len(decoding) <= self.group:
            return [list(decoding)]
        known = {name: route for name in decoding if (route := routes.get(name)) is not None}
        if not known:
            return [list(decoding[start : start + self.group]) for start in range(0, len(decoding), self.group)]
        unknown = np.zeros_like(next(iter(known.values())))
        rows = np.stack([known.get(name, unknown) for name in decoding])
        return [[decoding[row] for row in batch] for batch in partition(rows, self.group)]
