"""The order that the CUDA transfer gives to copies and kernels, on a device that reorders, delays and fails."""

from __future__ import annotations

import gc
import random

import pytest
from fake_streams import FakeEvent, FakeStreams
from interrupts import interrupted_at

from runtime.errors import TransferError
from runtime.transfer.cuda import CudaTransfer, Lane
from runtime.vocabulary import Load, LoadReason

NUM_EXPERTS, NUM_SLOTS, NUM_BYTES = 12, 4, 64
PIECE_BYTES = 24


def drive(seed: int, ignored: set[Lane]) -> FakeStreams:
    """A cache of four slots served at random: demand, prefetch, eviction of what is loading, cancelling, draining."""
    rng = random.Random(seed)
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES, seed)
    streams.ignored = ignored
    window_bytes = rng.choice([1, PIECE_BYTES * 2, NUM_BYTES * 3])
    transfer = CudaTransfer(streams, NUM_SLOTS, piece_bytes=PIECE_BYTES, window_bytes=window_bytes)
    resident: dict[int, int] = {}  # slot: expert
    for _ in range(60):
        leased: set[int] = set()
        wanted = rng.sample(range(NUM_EXPERTS), rng.randint(1, NUM_SLOTS))
        loads = []
        for expert in wanted:
            slot = next((slot for slot, held in resident.items() if held == expert), None)
            if slot is None:
                free = [slot for slot in range(NUM_SLOTS) if slot not in leased and resident.get(slot) not in wanted]
                if not free:
                    continue
                slot = rng.choice(free)
                resident[slot] = expert
                loads.append(Load(expert, slot, LoadReason.DEMAND))
            else:
                transfer.promote(expert)
            leased.add(slot)
        transfer.submit(loads)
        free = [slot for slot in range(NUM_SLOTS) if slot not in leased]
        rest = [expert for expert in range(NUM_EXPERTS) if expert not in resident.values()]
        ahead = [Load(rng.choice(rest), slot, LoadReason.PREFETCH) for slot in free[:1] if rng.random() < 0.7]
        transfer.submit(ahead)
        for expert, slot, _ in ahead:
            resident[slot] = expert
            if rng.random() < 0.2 and transfer.cancel(expert):
                del resident[slot]
        waiting = [resident[slot] for slot in leased]
        while waiting:
            for _ in range(rng.randint(0, 6)):
                streams.step()
            arrived = transfer.wait_any(waiting)
            assert arrived
            for expert in arrived:
                waiting.remove(expert)
                assert transfer.is_ready(expert)
                streams.read(next(slot for slot in leased if resident[slot] == expert), expert)
        if rng.random() < 0.1:
            transfer.drain()
            resident = {slot: expert for slot, expert in resident.items() if transfer.is_ready(expert)}
    streams.run()
    transfer.close()
    return streams


@pytest.mark.parametrize("seed", range(60))
def test_no_kernel_reads_a_slot_that_is_not_its_experts(seed: int) -> None:
    streams = drive(seed, set())
    assert streams.num_read > 100 and not streams.wrong


@pytest.mark.parametrize("lane", list(Lane))
def test_the_fake_notices_every_wait_that_is_left_out(lane: Lane) -> None:
    assert any(drive(seed, {lane}).wrong for seed in range(60))


def transfer_of(streams: FakeStreams, window_bytes: int = 1 << 20) -> CudaTransfer:
    return CudaTransfer(streams, NUM_SLOTS, "expert number {}".format, PIECE_BYTES, window_bytes)


def demand(expert: int, slot: int) -> Load:
    return Load(expert, slot, LoadReason.DEMAND)


def prefetch(expert: int, slot: int) -> Load:
    return Load(expert, slot, LoadReason.PREFETCH)


def test_the_host_never_waits_for_demand() -> None:
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams)
    for turn in range(20):
        loads = [demand((2 * turn + i) % NUM_EXPERTS, (2 * turn + i) % NUM_SLOTS) for i in range(2)]
        transfer.submit(loads)
        for expert, slot, _ in loads:
            assert transfer.wait_any([expert]) == [expert]
            streams.read(slot, expert)
    assert streams.num_blocked == 0 and not streams.copied  # nothing has run at all
    streams.run()
    assert not streams.wrong and len(streams.copied) == 40


def test_experts_that_have_arrived_come_before_the_one_that_is_waited_for() -> None:
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams)
    transfer.submit([demand(0, 0)])
    streams.run()
    transfer.submit([demand(1, 1), demand(2, 2)])
    assert transfer.wait_any([2, 1, 0]) == [0]
    assert transfer.wait_any([2, 1]) == [1]  # the first on its way
    assert transfer.wait_any([2, 1]) == [1]  # and no other while that is ready
    assert transfer.wait_any([2]) == [2]
    assert transfer.stats().num_loads == 1
    streams.run()
    assert transfer.stats().num_loads == 3


def test_demand_overtakes_a_prefetch_at_its_next_piece() -> None:
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams, window_bytes=1)
    transfer.submit([prefetch(0, 0)])
    streams.run()
    transfer.submit([demand(1, 1)])
    streams.run()
    for _ in range(4):
        transfer.submit([])
        streams.run()
    assert streams.copied == [0, 1, 0]  # its pieces, in one entry where nothing is between them
    assert transfer.is_ready(0) and transfer.is_ready(1)


def test_a_prefetch_that_is_demanded_is_copied_whole() -> None:
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams, window_bytes=1)
    transfer.submit([prefetch(0, 0), prefetch(1, 1)])
    transfer.promote(0)
    assert transfer.wait_any([0]) == [0]
    streams.read(0, 0)
    streams.run()
    assert not streams.wrong
    assert transfer.stats().num_bytes == NUM_BYTES and not transfer.is_ready(1)


@pytest.mark.parametrize("window_bytes", [1, 1 << 20])
def test_a_refused_copy_fails_its_load_only_and_can_be_repeated(window_bytes: int) -> None:
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams, window_bytes)
    streams.refused = {1}
    transfer.submit([demand(0, 0), demand(1, 1)])
    with pytest.raises(TransferError, match=r"expert number 1 \(number 1\): CUDA error: no copy of 1$"):
        transfer.wait_any([1])
    assert transfer.wait_any([0]) == [0]
    streams.refused = set()
    transfer.submit([demand(1, 1)])
    assert transfer.wait_any([1]) == [1]
    streams.read(1, 1)
    streams.run()
    assert not streams.wrong and transfer.stats().num_loads == 2


def test_a_prefetch_refused_half_way_fails() -> None:
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams, window_bytes=1)
    transfer.submit([prefetch(0, 0)])
    streams.refused = {0}
    with pytest.raises(TransferError, match="no copy of 0"):
        transfer.wait_any([0])
    assert not transfer.is_ready(0)
    transfer.submit([demand(1, 0)])
    assert transfer.wait_any([1]) == [1]


def test_a_lost_device_is_an_error_and_never_a_hang() -> None:
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams)
    transfer.submit([demand(0, 0)])
    streams.is_lost = True
    with pytest.raises(TransferError, match="device lost"):
        transfer.wait_any([0])
    transfer.submit([demand(1, 1)])
    with pytest.raises(TransferError, match="no copy of 1"):
        transfer.wait_any([1])
    transfer.drain()
    transfer.close()


class LostStreams(FakeStreams):
    """A device that is lost, but says nothing of that when it is asked whether an event has happened."""

    def record(self, event: FakeEvent, lane: Lane) -> None:
        if self.is_lost:
            raise RuntimeError("CUDA error: device lost\nand a second line")
        super().record(event, lane)

    def is_done(self, event: FakeEvent) -> bool:
        return event.is_done

    def elapsed_s(self, begin: FakeEvent, end: FakeEvent) -> float:
        if self.is_lost:
            raise RuntimeError("CUDA error: device lost\nand a second line")
        return super().elapsed_s(begin, end)


@pytest.mark.parametrize("num_steps", range(12))
def test_a_device_that_is_lost_at_any_time_ends_all_loads(num_steps: int) -> None:
    streams = LostStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams)
    transfer.submit([demand(0, 0), prefetch(1, 1)])
    for _ in range(num_steps):
        streams.step()
    streams.is_lost = True
    transfer.submit([demand(2, 2), prefetch(3, 3)])  # the gate cannot be recorded: both have failed
    with pytest.raises(TransferError, match=r"expert number 2 \(number 2\): CUDA error: device lost$"):
        transfer.wait_any([2])
    with pytest.raises(TransferError, match=r"device lost$"):
        transfer.wait_any([0])
    transfer.drain()
    assert not any(map(transfer.is_filling, range(NUM_SLOTS))) and transfer.stats().num_failed_loads >= 3
    transfer.close()
    assert streams.is_closed


@pytest.mark.parametrize("method", ["is_done", "record"])
def test_a_load_that_fails_has_ended_first(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only been given up: what it was copied from, and to, is another's next."""
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams)
    call = getattr(streams, method)

    def refuse(event: FakeEvent, *lane: Lane) -> object:
        if len(streams.queues[Lane.DEMAND]) >= 3:  # the copy is under way
            raise RuntimeError("CUDA error: out of memory")
        return call(event, *lane)

    monkeypatch.setattr(streams, method, refuse)
    transfer.submit([demand(0, 0)])
    assert transfer.has_failed(0) and not transfer.is_filling(0)
    assert streams.copied == [0] and not streams.queues[Lane.DEMAND]


def test_an_interrupt_leaves_no_event_free_that_is_in_use() -> None:
    """Recorded anew it would say of another copy that this one has ended."""
    line, has_come = 0, True
    while has_come:
        line += 1
        streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
        transfer = transfer_of(streams)
        transfer.submit([demand(0, 0), demand(1, 1)])
        streams.run()
        with interrupted_at(line, ["transfer/cuda.py"]) as interrupt:
            transfer.stats()
        has_come = interrupt.has_come
        transfer.recover()
        transfer.submit([demand(2, 2), demand(3, 3), prefetch(4, 0)])
        used = [event for flights in transfer._flights for one in flights for event in (one.begin, one.end)]
        free = [*transfer._events, *filter(None, used), transfer._last_end]
        assert len(set(map(id, free))) == len(free), f"interrupted at line {line}"
    assert line > 20


@pytest.mark.parametrize("asks", ["submit", "wait_any"])
def test_a_copy_that_fails_after_it_was_said_to_be_ready_is_said_once(asks: str) -> None:
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams)
    transfer.submit([demand(0, 0), demand(1, 1)])
    assert transfer.wait_any([0]) == [0] and transfer.is_filling(0) and not transfer.has_failed(0)
    streams.is_lost = True
    with pytest.raises(TransferError, match=r"expert number 0 .*device lost; what was computed with it may be wrong"):
        transfer.submit(()) if asks == "submit" else transfer.wait_any([1])
    streams.is_lost = False
    transfer.submit(())
    assert [transfer.has_failed(expert) for expert in (0, 1, 2)] == [True, True, False]
    assert not transfer.is_filling(0) and transfer.stats().num_failed_loads == 2
    transfer.submit([demand(0, 0)])
    assert transfer.wait_any([0]) == [0] and not transfer.has_failed(0)


class Clockless(FakeStreams):
    """Lost since it said that a copy is done."""

    def elapsed_s(self, begin: FakeEvent, end: FakeEvent) -> float:
        raise RuntimeError("CUDA error: device lost")


def test_a_device_that_is_lost_after_a_copy_has_ended_is_an_error_of_that_copy() -> None:
    streams = Clockless(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = CudaTransfer(streams, NUM_SLOTS)
    transfer.submit([Load(3, 0, LoadReason.DEMAND)])
    streams.run()
    with pytest.raises(TransferError, match="device lost"):
        transfer.wait_any([3])
    assert transfer.has_failed(3) and not transfer.is_filling(0)
    transfer.close()


def test_an_interrupt_anywhere_leaves_every_slot_usable() -> None:
    line, num_interrupted = 0, 0
    while line == num_interrupted:
        line += 1
        streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES, line)
        transfer = CudaTransfer(streams, NUM_SLOTS, piece_bytes=PIECE_BYTES)
        with interrupted_at(line, ["transfer/cuda.py"]) as interrupt:
            transfer.submit([Load(1, 0, LoadReason.DEMAND), Load(2, 1, LoadReason.DEMAND)])
            transfer.submit([Load(3, 2, LoadReason.PREFETCH)])
            transfer.wait_any([1])
            streams.step()
            transfer.submit([Load(4, 0, LoadReason.DEMAND)])
            transfer.drain()
        transfer.recover()
        assert not any(map(transfer.is_filling, range(NUM_SLOTS)))
        loads = [Load(expert, slot, LoadReason.DEMAND) for slot, expert in enumerate((5, 1, 4, 3))]
        transfer.submit(loads)
        for expert, slot, _ in loads:
            assert transfer.wait_any([expert]) == [expert]
            streams.read(slot, expert)
        streams.run()
        transfer.close()
        assert not streams.wrong
        num_interrupted += interrupt.has_come
    assert num_interrupted > 100


def test_events_are_used_again() -> None:
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams)
    for turn in range(50):
        transfer.submit([demand(turn % NUM_EXPERTS, turn % NUM_SLOTS)])
        transfer.wait_any([turn % NUM_EXPERTS])
        streams.run()
    assert streams.num_events < 12


def test_times_are_those_of_the_device() -> None:
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams)
    transfer.submit([demand(0, 0), demand(1, 1)])
    transfer.wait_any([0])
    transfer.wait_any([1])
    assert transfer.stats().busy_s == transfer.stats().stall_s == 0.0
    streams.run()
    stats = transfer.stats()
    steps_s = 0.001 * 20  # at most so many steps have run
    assert 0.003 < stats.busy_s <= steps_s and 0.0 < stats.stall_s <= steps_s


def test_a_transfer_that_is_forgotten_closes_its_device() -> None:
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer_of(streams)
    gc.collect()
    assert streams.is_closed


def test_where_nothing_is_under_way_the_device_is_asked_nothing() -> None:
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams)
    transfer.submit([demand(0, 0), prefetch(1, 1)])
    assert transfer.wait_any([0]) == [0]
    streams.run()
    transfer.submit(())  # takes note of both
    before = streams.num_calls
    for _ in range(3):
        transfer.submit(())
        assert transfer.is_ready(0) and transfer.is_ready(1) and not transfer.is_ready(2)
        assert not transfer.has_failed(0) and not transfer.is_filling(0)
        transfer.promote(0)
        assert transfer.stats().num_loads == 2
    assert streams.num_calls == before


def test_a_load_takes_few_calls() -> None:
    """One gate for all of a call, two events for each load, and those of the statistics."""
    streams = FakeStreams(NUM_EXPERTS, NUM_SLOTS, NUM_BYTES)
    transfer = transfer_of(streams)
    for number in (1, 2):
        before = streams.num_calls
        transfer.submit([demand(number * 3 + i, i) for i in range(number)])
        for i in range(number):
            transfer.wait_any([number * 3 + i])
        streams.run()
        transfer.submit(())
        assert streams.num_calls - before <= 2 + 10 * number
