"""The contract of `runtime.transfer.base.Transfer`, over every transfer that there is.

What a test needs queued are prefetches: a transfer may start all demand at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from expert_files import GatedReads, plain_store
from fake_streams import FakeStreams
from tiers import RowStreams

from runtime.transfer.base import Transfer, TransferStats
from runtime.transfer.cuda import CudaTransfer
from runtime.transfer.disk import DiskTransfer
from runtime.transfer.host_rows import HostRows
from runtime.transfer.simulated import SimulatedTransfer
from runtime.transfer.slots import SlotArena
from runtime.transfer.tiered import TieredTransfer
from runtime.vocabulary import Load, LoadReason

NUM_EXPERTS = 8
NUM_SLOTS = 6


class Link:
    """A transfer with one link that a test holds: the load under way does not end before `finish` or `finish_one`."""

    transfer: Transfer

    def submit(self, *loads: Load) -> None:
        """Submit, and see the first load of an idle link start."""
        raise NotImplementedError

    def finish_one(self) -> None:
        """Let the load under way end and the next one start."""
        raise NotImplementedError

    def finish(self) -> list[int]:
        """Let everything end; the experts in the order in which their loads started."""
        raise NotImplementedError

    def release_when_cancelled(self, number: int) -> None:
        """Let the load under way end as soon as `number` loads are cancelled, while the test blocks in the transfer."""
        raise NotImplementedError


class SimulatedLink(Link):
    def __init__(self) -> None:
        self.transfer = self._simulated = SimulatedTransfer(1.0, load_bytes=4096)

    def submit(self, *loads: Load) -> None:
        self.transfer.submit(loads)

    def finish_one(self) -> None:
        self._simulated.advance(1.0)

    def finish(self) -> list[int]:
        order: list[int] = []
        while self._simulated.stats().num_loads < NUM_EXPERTS + 1:
            before = [expert for expert in range(NUM_EXPERTS) if self.transfer.is_ready(expert)]
            num_loads = self._simulated.stats().num_loads
            self._simulated.advance(1.0)
            if self._simulated.stats().num_loads == num_loads:
                return order
            order += [e for e in range(NUM_EXPERTS) if self.transfer.is_ready(e) and e not in before]
        raise AssertionError("more loads than were submitted")

    def release_when_cancelled(self, number: int) -> None:
        """Virtual time runs in `drain` itself."""


class DiskLink(Link):
    def __init__(self, folder: Path, direct: bool | None) -> None:
        store = plain_store(folder / "experts.bin", NUM_EXPERTS, 8192)
        self.reads = GatedReads(store, NUM_EXPERTS)
        arena = SlotArena(NUM_SLOTS, store.slot_bytes)
        self.transfer = DiskTransfer(store, arena, io_threads=1, piece_bytes=1 << 16, direct=direct, read=self.reads)
        self._num_seen = self._num_ended = 0

    def submit(self, *loads: Load) -> None:
        self.transfer.submit(loads)
        self.reads.await_reads(self._num_ended + 1)
        self._num_seen = max(self._num_seen, self._num_ended)

    def finish_one(self) -> None:
        (under_way,) = self.reads.experts[self._num_ended :]
        self.reads.allow(1)
        self.transfer.wait_any([under_way])
        self._num_ended += 1

    def finish(self) -> list[int]:
        first = self._num_ended
        self.reads.open()
        while True:
            waiting = [e for e in range(NUM_EXPERTS) if not self.transfer.is_ready(e)]
            try:
                self.transfer.wait_any(waiting)
            except ValueError:
                return self.reads.experts[first:]

    def release_when_cancelled(self, number: int) -> None:
        def release() -> None:
            while self.transfer.stats().num_cancelled < number:
                time.sleep(0.001)
            self.reads.open()

        threading.Thread(target=release, daemon=True).start()


class CudaLink(Link):
    def __init__(self) -> None:
        self.streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, 8192)
        self.transfer = CudaTransfer(self.streams, NUM_SLOTS, piece_bytes=8192, window_bytes=1)
        self._num_ended = 0

    def submit(self, *loads: Load) -> None:
        is_idle = not any(self.streams.queues.values())
        self.transfer.submit(loads)
        num_copied = len(self.streams.copied)
        while is_idle and len(self.streams.copied) == num_copied:
            assert self.streams.step(), "no load has started"

    def finish_one(self) -> None:
        self.streams.run()
        self._num_ended += 1
        self.transfer.submit([])

    def finish(self) -> list[int]:
        first = self._num_ended
        while any(self.streams.queues.values()):
            self.streams.run()
            self.transfer.submit([])
        return self.streams.copied[first:]

    def release_when_cancelled(self, number: int) -> None:
        """The device runs while the host waits for it."""


class TieredLink(DiskLink):
    """Its disk is what the test holds; the device runs as far as it can."""

    def __init__(self, folder: Path) -> None:
        store = replace(plain_store(folder / "experts.bin", NUM_EXPERTS, 8192), prefixes=("layer0", "layer1"))
        self.reads = GatedReads(store, NUM_EXPERTS)
        rows = HostRows(store, NUM_EXPERTS, num_pinned=NUM_EXPERTS, top_k=2, policy="lru")
        self._disk = DiskTransfer(store, rows.arena, io_threads=1, piece_bytes=1 << 16, read=self.reads)
        self._streams = RowStreams(rows, NUM_SLOTS)
        self.transfer = TieredTransfer(rows, self._disk, CudaTransfer(self._streams, NUM_SLOTS), NUM_SLOTS)
        self._num_ended = 0

    def submit(self, *loads: Load) -> None:
        self.transfer.submit(loads)
        if any(load is not None and not load.has_ended for load in map(self._disk.find, range(NUM_EXPERTS))):
            self.reads.await_reads(self._num_ended + 1)

    def finish_one(self) -> None:
        super().finish_one()
        self._run()

    def finish(self) -> list[int]:
        order = super().finish()
        self._run()
        return order

    def _run(self) -> None:
        self._streams.run()
        self.transfer.submit([])


@pytest.fixture(params=["simulated", "cuda", "direct", "buffered", "tiered"])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Link]:
    if request.param == "simulated":
        yield SimulatedLink()
        return
    if request.param == "cuda":
        yield CudaLink()
        return
    tiered = request.param == "tiered"
    link = TieredLink(tmp_path) if tiered else DiskLink(tmp_path, None if request.param == "direct" else False)
    yield link
    link.reads.open()
    link.transfer.close()


def demand(expert: int, slot: int) -> Load:
    return Load(expert, slot, LoadReason.DEMAND)


def prefetch(expert: int, slot: int) -> Load:
    return Load(expert, slot, LoadReason.PREFETCH)


def test_loads_of_one_reason_are_first_come_first_served(link: Link) -> None:
    link.submit(demand(3, 0))
    link.submit(demand(1, 1), demand(2, 2))
    assert link.finish() == [3, 1, 2]


def test_demand_overtakes_queued_prefetch_but_not_the_load_under_way(link: Link) -> None:
    link.submit(prefetch(0, 0))
    link.submit(prefetch(1, 1), prefetch(2, 2))
    link.submit(demand(3, 3))
    assert link.finish() == [0, 3, 1, 2]


def test_promoted_prefetch_is_loaded_as_demand(link: Link) -> None:
    link.submit(demand(0, 0))
    link.submit(prefetch(1, 1), prefetch(2, 2), demand(3, 3))
    link.transfer.promote(2)
    link.submit(demand(4, 4))
    assert link.finish() == [0, 3, 2, 4, 1]


def test_promoting_what_is_not_queued_changes_nothing(link: Link) -> None:
    link.submit(prefetch(0, 0))
    for expert in (0, 5):
        link.transfer.promote(expert)
    link.submit(prefetch(1, 1), demand(2, 2))
    link.transfer.promote(2)
    assert link.finish() == [0, 2, 1]
    link.transfer.promote(1)
    assert link.transfer.is_ready(1)


def test_only_a_load_that_has_not_started_is_cancelled(link: Link) -> None:
    link.submit(demand(0, 0))
    link.submit(prefetch(1, 1), prefetch(2, 2))
    assert [link.transfer.cancel(expert) for expert in (0, 1, 2, 5)] == [False, True, True, False]
    assert not link.transfer.cancel(1)
    assert link.finish() == [0]
    assert [link.transfer.is_ready(expert) for expert in (0, 1, 2)] == [True, False, False]
    assert not link.transfer.cancel(0)
    assert link.transfer.stats().num_cancelled == 2


def test_cancelled_expert_can_be_submitted_again(link: Link) -> None:
    link.submit(demand(0, 0))
    link.submit(prefetch(1, 1))
    link.transfer.cancel(1)
    link.submit(demand(1, 2))
    assert link.finish() == [0, 1]
    assert link.transfer.is_ready(1)


def test_new_load_of_a_slot_cancels_the_queued_one(link: Link) -> None:
    link.submit(demand(0, 0))
    link.submit(prefetch(1, 1))
    link.submit(prefetch(2, 1))
    assert link.finish() == [0, 2]
    assert not link.transfer.is_ready(1)
    assert link.transfer.is_ready(2)


def test_new_load_of_a_slot_starts_after_the_one_under_way(link: Link) -> None:
    link.submit(prefetch(0, 0))
    link.submit(demand(1, 0))
    assert not link.transfer.is_ready(0)
    assert link.finish() == [0, 1]
    assert link.transfer.is_ready(0)
    assert link.transfer.is_ready(1)


def test_wait_any_returns_all_that_are_ready_in_the_order_given(link: Link) -> None:
    link.submit(demand(0, 0))
    link.submit(prefetch(1, 1), prefetch(2, 2))
    link.finish_one()
    assert link.transfer.wait_any([2, 0]) == [0]
    link.finish()
    assert link.transfer.wait_any([2, 5, 0, 1]) == [2, 0, 1]


def test_waiting_for_what_never_comes_is_an_error(link: Link) -> None:
    link.submit(demand(0, 0))
    link.submit(prefetch(1, 1))
    link.transfer.cancel(1)
    for experts in ([5], [1, 5], []):
        with pytest.raises(ValueError, match="submit them first"):
            link.transfer.wait_any(experts)


def test_expert_is_ready_until_it_is_submitted_again(link: Link) -> None:
    assert not link.transfer.is_ready(0)
    link.submit(demand(0, 0))
    assert not link.transfer.is_ready(0)
    link.finish_one()
    assert link.transfer.is_ready(0)
    link.submit(demand(0, 1))
    assert not link.transfer.is_ready(0)
    link.finish()
    assert link.transfer.is_ready(0)


def test_a_slot_is_being_filled_while_a_load_of_it_is_under_way(link: Link) -> None:
    assert not link.transfer.is_filling(0)
    link.submit(demand(0, 0))
    link.submit(prefetch(1, 1), prefetch(2, 0))
    link.transfer.cancel(2)
    assert [link.transfer.is_filling(slot) for slot in (0, 1)] == [True, False]
    assert link.finish() == [0, 1]
    assert not any(map(link.transfer.is_filling, range(NUM_SLOTS)))
    assert not any(map(link.transfer.has_failed, range(NUM_EXPERTS)))


def test_drain_cancels_what_is_queued_and_awaits_the_rest(link: Link) -> None:
    link.submit(demand(0, 0))
    link.submit(prefetch(1, 1), prefetch(2, 2))
    link.release_when_cancelled(2)
    link.transfer.drain()
    assert [link.transfer.is_ready(expert) for expert in (0, 1, 2)] == [True, False, False]
    link.transfer.submit([demand(3, 1)])
    assert link.transfer.wait_any([3]) == [3]


def test_close_with_loads_queued_twice_and_submit_after_it(link: Link) -> None:
    link.submit(demand(0, 0))
    link.submit(prefetch(1, 1), prefetch(2, 2))
    link.transfer.cancel(2)
    link.release_when_cancelled(1)
    link.transfer.close()
    link.transfer.close()
    with pytest.raises(ValueError, match="closed"):
        link.transfer.submit([demand(3, 3)])
    assert link.transfer.is_ready(0)


def test_counters_and_their_reset(link: Link) -> None:
    link.submit(demand(0, 0))
    link.submit(prefetch(1, 1), prefetch(2, 2))
    link.transfer.cancel(2)
    link.finish()
    stats = link.transfer.stats()
    assert (stats.num_loads, stats.num_cancelled) == (2, 1)
    assert stats.num_bytes >= 2 * 4096
    assert stats.busy_s > 0
    link.transfer.reset_stats()
    assert link.transfer.stats() == TransferStats()
