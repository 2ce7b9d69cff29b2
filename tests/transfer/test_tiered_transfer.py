"""Disk, host memory and GPU together: no kernel reads a wrong expert and no row changes under a copy, whatever is
reordered, fails or hangs."""

from __future__ import annotations

import random
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import interrupted_at
from tiers import FakeDisk, RowStreams, split_store

from runtime.errors import TransferError
from runtime.transfer.cuda import CudaTransfer
from runtime.transfer.disk import DiskTransfer
from runtime.transfer.host_rows import HostRows
from runtime.transfer.store import ExpertStore
from runtime.transfer.tiered import TieredTransfer
from runtime.vocabulary import Load, LoadReason

LAYERS, PER_LAYER = 3, 6
NUM_EXPERTS = LAYERS * PER_LAYER


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return split_store(tmp_path_factory.mktemp("experts") / "experts.bin", LAYERS, PER_LAYER)


class Tiers:
    """All of it on fakes, and a cache of slots above that is served at random."""

    def __init__(
        self,
        store: ExpertStore,
        num_rows: int,
        num_slots: int,
        seed: int = 0,
        kind: type[TieredTransfer] = TieredTransfer,
        window_bytes: int = 1 << 20,
    ) -> None:
        self.random = random.Random(seed)
        self.rows = HostRows(store, num_rows, num_pinned=num_rows, top_k=2, policy="lru")
        self.streams = RowStreams(self.rows, num_slots, seed)
        self.disk = FakeDisk(self.rows, self._may_write, seed)
        self.copies = CudaTransfer(self.streams, num_slots, piece_bytes=2000, window_bytes=window_bytes)
        self.transfer = kind(self.rows, cast(DiskTransfer, self.disk), self.copies, num_slots)
        self.num_slots = num_slots
        self.resident: dict[int, int] = {}  # expert: slot
        self.num_failed = 0

    def _may_write(self, row: int) -> None:
        assert not self.streams.reading[row], f"row {row} changes under a copy"

    def serve(self) -> None:
        """One layer: some experts demanded, one prefetched, each read by a kernel as it is ready."""
        rng, transfer = self.random, self.transfer
        wanted = rng.sample(range(NUM_EXPERTS), rng.randint(1, self.num_slots))
        here = [expert for expert in wanted if expert in self.resident]
        taken = {self.resident[expert] for expert in here}
        loads = []
        for expert in wanted:
            if expert not in self.resident:
                slot = rng.choice([slot for slot in range(self.num_slots) if slot not in taken])
                taken.add(slot)
                loads.append(Load(expert, slot, LoadReason.DEMAND))
        for load in loads:
            self._place(load)
        transfer.submit(loads)
        for expert in here:
            transfer.promote(expert)
        self._prefetch(taken)
        waiting = list(wanted)
        while waiting:
            self._delay()
            for expert in transfer.wait_any(waiting):
                waiting.remove(expert)
                assert transfer.is_ready(expert) and not transfer.has_failed(expert)
                self.streams.read(self.resident[expert], expert)

    def settle(self) -> None:
        """As a coordinator does after an error."""
        self.num_failed += 1
        self.streams.refused, self.disk.failing = set(), set()
        self.transfer.drain()
        assert not any(map(self.transfer.is_filling, range(self.num_slots)))
        self.resident = {expert: slot for expert, slot in self.resident.items() if self.transfer.is_ready(expert)}

    def end(self) -> None:
        """Everything runs; no lease is left, nothing was wrong."""
        self.transfer.drain()
        self.streams.run()
        self.transfer.drain()
        assert not self.streams.wrong and not any(self.streams.reading.values())
        self.rows.residency.check_integrity()
        assert not self.rows.residency._leases.any()
        self.transfer.close()
        assert self.streams.is_closed and self.disk.is_closed

    def _place(self, load: Load) -> None:
        self.resident = {expert: slot for expert, slot in self.resident.items() if slot != load.slot}
        self.resident[load.expert] = load.slot

    def _prefetch(self, taken: set[int]) -> None:
        rng, free = self.random, [slot for slot in range(self.num_slots) if slot not in taken]
        absent = [expert for expert in range(NUM_EXPERTS) if expert not in self.resident]
        for slot in free[: rng.randint(0, 2)]:
            load = Load(absent.pop(rng.randrange(len(absent))), slot, LoadReason.PREFETCH)
            self.transfer.submit([load])
            self._place(load)
            if rng.random() < 0.2 and self.transfer.cancel(load.expert):
                del self.resident[load.expert]

    def _delay(self) -> None:
        for _ in range(self.random.randint(0, 8)):
            self.streams.step()


def drive(tiers: Tiers, rounds: int, trouble: float = 0.0) -> None:
    """Serve at random, with reads and copies that fail, or reads that hang and come back at any time."""
    rng = tiers.random
    for _ in range(rounds):
        if rng.random() < trouble:
            kind = rng.choice([tiers.disk.failing, tiers.disk.hanging, tiers.streams.refused])
            kind.add(rng.randrange(NUM_EXPERTS))
        if rng.random() < 0.3:
            tiers.disk.hanging.clear()
            tiers.disk.come_back()
        try:
            tiers.serve()
        except TransferError:
            tiers.settle()
    tiers.disk.hanging.clear()
    tiers.disk.come_back()
    tiers.end()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    num_rows=st.integers(2, NUM_EXPERTS),
    num_slots=st.integers(1, 6),
    trouble=st.sampled_from([0.0, 0.3]),
    window_bytes=st.sampled_from([1, 4000, 1 << 20]),
)
def test_kernels_find_their_experts_and_no_row_changes_under_a_copy(
    store: ExpertStore, seed: int, num_rows: int, num_slots: int, trouble: float, window_bytes: int
) -> None:
    tiers = Tiers(store, num_rows, num_slots, seed, window_bytes=window_bytes)
    drive(tiers, 25, trouble)
    assert tiers.streams.num_read > 0 and (trouble > 0 or not tiers.num_failed)


class Hasty(TieredTransfer):
    """Gives a row back when its copy was waited for, not when it has ended."""

    def _end_copies(self) -> None:
        for climb in self._climbs.values():
            if climb.copy is not None and climb.is_new is False and self._copies.is_ready(climb.expert):
                climb.is_new = True
                self._residency.release([climb.expert])


def test_a_row_that_is_given_back_too_early_is_noticed(store: ExpertStore) -> None:
    def is_noticed(seed: int) -> bool:
        try:
            drive(Tiers(store, 3, 3, seed, Hasty), 25)
        except AssertionError as error:
            return "changes under a copy" in str(error)
        return False

    assert any(is_noticed(seed) for seed in range(10))


@pytest.mark.parametrize("num_rows", [1, 2])
def test_fewer_rows_than_experts_of_a_layer_are_taken_in_turn(store: ExpertStore, num_rows: int) -> None:
    tiers = Tiers(store, num_rows, 6)
    tiers.transfer.submit([Load(expert, expert, LoadReason.DEMAND) for expert in range(6)])
    waiting = list(range(6))
    while waiting:
        (expert,) = tiers.transfer.wait_any(waiting)[:1]
        waiting.remove(expert)
        tiers.streams.read(expert, expert)
    tiers.end()
    assert len(tiers.disk.read) == 6


def demand(expert: int, slot: int) -> Load:
    return Load(expert, slot, LoadReason.DEMAND)


def prefetch(expert: int, slot: int) -> Load:
    return Load(expert, slot, LoadReason.PREFETCH)


class Still(FakeDisk):
    """Reads only where it is waited for."""

    def _go_on(self) -> None:
        pass


def still(store: ExpertStore, num_rows: int, num_slots: int = 6, **options: Any) -> Tiers:
    tiers = Tiers(store, num_rows, num_slots, **options)
    tiers.disk.__class__ = Still
    return tiers


def test_what_is_in_host_memory_is_copied_at_once_and_not_read_again(store: ExpertStore) -> None:
    tiers = still(store, 4)
    tiers.transfer.fill(range(NUM_EXPERTS))
    assert tiers.disk.read == [0, 1, 2, 3] and tiers.transfer.stats().num_disk_loads == 0
    tiers.transfer.submit([demand(2, 0), demand(9, 1)])
    assert tiers.transfer.wait_any([9, 2]) == [2], "the nearer one first"
    assert tiers.disk.read == [0, 1, 2, 3]
    assert tiers.transfer.wait_any([9]) == [9] and tiers.transfer.stats().stall_s > 0.0
    tiers.end()
    stats = tiers.transfer.stats()
    assert (stats.num_loads, stats.num_disk_loads) == (2, 1)


def test_demand_takes_the_row_of_a_prefetch_that_has_not_begun(store: ExpertStore) -> None:
    tiers = still(store, 2)
    tiers.transfer.submit([prefetch(6, 0), prefetch(7, 1)])
    tiers.transfer.submit([demand(0, 2)])
    assert tiers.transfer.wait_any([0]) == [0] and tiers.disk.read == [0]
    assert tiers.transfer.wait_any([7]) == [7], "it was not forgotten"
    assert tiers.transfer.wait_any([6]) == [6]
    assert tiers.transfer.stats().num_cancelled == 0
    tiers.end()


def test_demand_overtakes_what_is_to_be_read_and_what_is_to_be_copied(store: ExpertStore) -> None:
    tiers = still(store, 6, window_bytes=1)
    tiers.transfer.fill([0, 1])
    tiers.transfer.submit([prefetch(0, 0), prefetch(1, 1), prefetch(12, 2), prefetch(13, 3)])
    tiers.transfer.promote(13)
    tiers.transfer.promote(1)
    tiers.transfer.wait_any([13])
    assert tiers.disk.read == [0, 1, 13]
    for _ in range(20):  # a piece at a time
        tiers.streams.run()
        tiers.transfer.submit([])
    copied = tiers.streams.copied
    assert max(copied.index(13), copied.index(1)) < len(copied) - 1 - copied[::-1].index(0)
    tiers.end()


def test_a_read_that_fails_is_said_and_can_be_repeated(store: ExpertStore) -> None:
    tiers = still(store, 3)
    tiers.disk.failing = {5}
    tiers.transfer.submit([demand(5, 0), demand(4, 1)])
    with pytest.raises(TransferError, match=r"expert 5 \(number 5\): I/O error"):
        tiers.transfer.wait_any([5])
    assert tiers.transfer.has_failed(5) and tiers.rows.weights(5) is None
    assert tiers.transfer.wait_any([4]) == [4]
    tiers.disk.failing = set()
    tiers.transfer.submit([demand(5, 0)])
    assert tiers.transfer.wait_any([5]) == [5]
    tiers.streams.read(0, 5)
    tiers.end()
    assert tiers.transfer.stats().num_failed_loads == 1


def test_the_row_of_a_read_that_hangs_is_left_alone_until_it_returns(store: ExpertStore) -> None:
    tiers = still(store, 2)
    tiers.disk.hanging = {5}
    tiers.transfer.submit([demand(5, 0)])
    with pytest.raises(TransferError, match=r"expert 5 \(number 5\): no read has ended"):
        tiers.transfer.wait_any([5])
    assert not tiers.transfer.is_filling(0), "it writes into a row, not into the slot"
    assert len(tiers.rows.residency.withheld) == 1
    for expert in range(4):
        tiers.transfer.submit([demand(expert, 0)])
        assert tiers.transfer.wait_any([expert]) == [expert]
        tiers.streams.read(0, expert)
    tiers.disk.come_back()
    tiers.transfer.submit([demand(4, 0)])
    assert not tiers.rows.residency.withheld
    tiers.transfer.wait_any([4])
    tiers.streams.read(0, 4)
    tiers.end()


def test_no_row_left_is_an_error_and_not_a_wait_for_ever(store: ExpertStore) -> None:
    tiers = still(store, 1)
    tiers.disk.hanging = {5}
    tiers.transfer.submit([demand(5, 0)])
    with pytest.raises(TransferError, match="no read has ended"):
        tiers.transfer.wait_any([5])
    tiers.transfer.submit([demand(4, 1)])
    with pytest.raises(TransferError, match="no row of host memory is left"):
        tiers.transfer.wait_any([4])
    tiers.transfer.drain()
    assert tiers.transfer.stats().num_cancelled == 1
    tiers.disk.come_back()
    tiers.transfer.submit([demand(4, 1)])
    assert tiers.transfer.wait_any([4]) == [4]
    tiers.end()


def test_a_copy_that_fails_after_it_was_said_to_be_ready_is_said_once(store: ExpertStore) -> None:
    tiers = still(store, 4)
    tiers.transfer.fill([0, 1])
    tiers.transfer.submit([demand(0, 0)])
    assert tiers.transfer.wait_any([0]) == [0]
    tiers.streams.is_lost = True
    assert not tiers.transfer.is_ready(1)
    tiers.streams.is_lost = False
    with pytest.raises(TransferError, match="device lost; what was computed with it may be wrong"):
        tiers.transfer.submit([demand(1, 1)])
    assert tiers.transfer.has_failed(0) and not tiers.rows.residency._leases.any()
    tiers.transfer.submit([demand(0, 0), demand(1, 1)])
    assert sorted(tiers.transfer.wait_any([0, 1]) + tiers.transfer.wait_any([1])) == [0, 1]
    tiers.end()


def test_an_expert_that_is_wanted_in_another_slot_while_it_comes(store: ExpertStore) -> None:
    """Its prefetch lost its slot on the way: what was read for that is used."""
    tiers = still(store, 3)
    tiers.transfer.submit([prefetch(6, 0)])
    tiers.disk.step()
    tiers.transfer.submit([demand(0, 0)])
    tiers.transfer.submit([demand(6, 1)])
    for expert, slot in ((6, 1), (0, 0)):
        assert tiers.transfer.wait_any([expert]) == [expert]
        tiers.streams.read(slot, expert)
    tiers.end()
    stats = tiers.transfer.stats()
    assert tiers.disk.read.count(6) == 1 and (stats.num_loads, stats.num_cancelled) == (2, 1)


def test_an_interrupt_anywhere_leaves_every_slot_and_row_usable(store: ExpertStore) -> None:
    line, num_interrupted = 0, 0
    while line == num_interrupted:
        line += 1
        tiers = Tiers(store, 3, 3, seed=line)
        with interrupted_at(line, ["transfer/tiered.py", "transfer/host_rows.py"]) as interrupt:
            for _ in range(2):
                tiers.serve()
        tiers.transfer.recover()
        tiers.resident = {}
        assert not any(map(tiers.transfer.is_filling, range(3)))
        for _ in range(3):
            tiers.serve()
        tiers.end()
        num_interrupted += interrupt.has_come
    assert num_interrupted > 100


def test_weights_are_views_of_the_row(store: ExpertStore) -> None:
    tiers = still(store, 2)
    tiers.transfer.fill([3])
    found = tiers.rows.weights(3)
    assert found is not None and tiers.rows.weights(4) is None
    for place in tiers.rows.tensors(3):
        expected = tiers.streams.experts[3, place.slot_offset :][: found[place.name].numel()]
        assert torch.equal(found[place.name], torch.from_numpy(expected.copy()))
    tiers.transfer.submit([demand(4, 0)])
    assert tiers.rows.weights(4) is None, "on its way"


def test_a_lost_device_is_an_error_and_never_a_hang(store: ExpertStore) -> None:
    tiers = Tiers(store, 3, 3)
    tiers.transfer.submit([demand(0, 0)])
    tiers.transfer.wait_any([0])
    tiers.streams.is_lost = True
    with pytest.raises(TransferError, match="device lost"):
        tiers.transfer.submit([demand(1, 1)])
    tiers.transfer.submit([demand(1, 1)])
    with pytest.raises(TransferError, match="no copy of 1"):
        tiers.transfer.wait_any([1])
    tiers.transfer.drain()
    tiers.transfer.close()
