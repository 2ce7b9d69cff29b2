"""A GPU that a test holds: streams that run one step at a time, in any order that the events allow.

A copy takes two steps, one half of the bytes each. A kernel takes two steps, too, and its slot must hold the expert in
both: a copy that starts too early or a kernel that does is seen, whatever the order.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from runtime.transfer.cuda import Lane


@dataclass(eq=False)
class FakeEvent:
    """Each recording has a number; `happened` says when the device came to it."""

    recorded: int = 0
    happened: dict[int, float] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.recorded == 0 or self.recorded in self.happened


Step = Callable[[], bool]
"""Runs a step of a stream; False: an event has not happened yet."""


class FakeStreams:
    """See `runtime.transfer.cuda.Streams`. `step` and `run` are the test's.

    Attributes:
        copied: experts in the order in which their copies began.
        refused: experts that `copy` raises for. wrong: what kernels found that was not their expert's.
        ignored: lanes on which waiting is left out, to see that the test notices.
        is_lost: the device answers nothing any more.
        num_blocked: calls that blocked the host. num_calls: that a device was asked for anything.
    """

    def __init__(self, num_experts: int, num_slots: int, num_bytes: int, seed: int = 0) -> None:
        self.num_bytes = num_bytes
        self.random = random.Random(seed)
        self.experts = np.random.default_rng(seed).integers(0, 255, (num_experts, num_bytes), np.uint8)
        self.slots = np.full((num_slots, num_bytes), 255, np.uint8)
        self.queues: dict[Lane, deque[Step]] = {lane: deque() for lane in Lane}
        self.copied: list[int] = []
        self.refused: set[int] = set()
        self.wrong: list[str] = []
        self.ignored: set[Lane] = set()
        self.is_lost = self.is_closed = False
        self.num_blocked = self.num_read = self.num_events = self.num_calls = 0
        self._now_s = 0.0

    def new_event(self) -> FakeEvent:
        self.num_events += 1
        return FakeEvent()

    def record(self, event: FakeEvent, lane: Lane) -> None:
        self.num_calls += 1
        event.recorded += 1
        number = event.recorded

        def happen() -> bool:
            event.happened[number] = self._now_s
            return True

        self.queues[lane].append(happen)

    def wait(self, event: FakeEvent, lane: Lane) -> None:
        self.num_calls += 1
        number = event.recorded
        if lane not in self.ignored and number:
            self.queues[lane].append(lambda: number in event.happened)

    def copy(self, lane: Lane, expert: int, slot: int, start: int, num_bytes: int) -> None:
        self.num_calls += 1
        if self.is_lost or expert in self.refused:
            raise RuntimeError(f"CUDA error: no copy of {expert}\nand a second line")
        middle, end = start + num_bytes // 2, start + num_bytes

        def begin() -> bool:
            if not self.copied or self.copied[-1] != expert or start == 0:
                self.copied.append(expert)
            self.slots[slot, start:middle] = self.experts[expert, start:middle]
            return True

        def finish() -> bool:
            self.slots[slot, middle:end] = self.experts[expert, middle:end]
            return True

        self.queues[lane] += (begin, finish)

    def is_done(self, event: FakeEvent) -> bool:
        self.num_calls += 1
        if self.is_lost:
            raise RuntimeError("CUDA error: device lost")
        return event.is_done

    def synchronize(self, event: FakeEvent) -> None:
        if self.is_lost:
            raise RuntimeError("CUDA error: device lost")
        self.num_blocked += 1
        while not event.is_done:
            assert self.step(), "the event waits for ever"

    def finish(self) -> None:
        if self.is_lost:
            raise RuntimeError("CUDA error: device lost")
        self.num_blocked += 1
        while self.queues[Lane.DEMAND] or self.queues[Lane.PREFETCH]:
            assert self.step(), "a stream waits for ever"

    def elapsed_s(self, begin: FakeEvent, end: FakeEvent) -> float:
        self.num_calls += 1
        return end.happened[end.recorded] - begin.happened[begin.recorded]

    def close(self) -> None:
        self.is_closed = True

    def read(self, slot: int, expert: int) -> None:
        """Enqueue a kernel that reads an expert in its slot."""

        def look() -> bool:
            self.num_read += 1
            if not np.array_equal(self.slots[slot], self.experts[expert]):
                self.wrong.append(f"slot {slot} does not hold expert {expert}")
            return True

        self.queues[Lane.COMPUTE] += (look, look)

    def step(self) -> bool:
        """Run one step of a stream that can go on, chosen at random; False when none can."""
        lanes = [lane for lane in Lane if self.queues[lane]]
        self.random.shuffle(lanes)
        for lane in lanes:
            if self.queues[lane][0]():
                self.queues[lane].popleft()
                self._now_s += 0.001
                return True
        return False

    def run(self) -> None:
        """Run everything."""
        while self.step():
            pass
        assert not any(self.queues.values()), "streams wait for each other"
