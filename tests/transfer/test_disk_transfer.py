"""Reads that fail, come short, are slow or overlap: what only a transfer with a real file can show."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from expert_files import GatedReads, file_bytes_of, plain_store, slot_bytes_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.errors import CheckpointError, TransferError
from runtime.transfer.disk import DiskTransfer
from runtime.transfer.slots import SlotArena
from runtime.vocabulary import Load, LoadReason

DEMAND, PREFETCH = LoadReason.DEMAND, LoadReason.PREFETCH
MODES = pytest.mark.parametrize("direct", [None, False], ids=["direct", "buffered"])
Fault = Callable[[int, list[memoryview], int], int]


def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def come_short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
    return os.preadv(descriptor, buffers, offset) // 2


def crash(descriptor: int, buffers: list[memoryview], offset: int) -> int:
    raise SystemExit("not even this ends a thread")


@MODES
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (fail, r"in 3 attempts \(Input/output error\); check the disk"),
        (come_short, r"in 3 attempts \(got \d+\); check the disk"),
        (crash, "SystemExit"),
    ],
)
def test_failed_load_is_told_to_its_waiter_only(
    tmp_path: Path, direct: bool | None, fault: Fault, message: str
) -> None:
    store = plain_store(tmp_path / "experts.bin", 6, 20000)
    arena = SlotArena(6, store.slot_bytes)
    reads = GatedReads(store, 6)
    reads.open()
    reads.faults[5] = fault
    transfer = DiskTransfer(store, arena, piece_bytes=8192, direct=direct, read=reads)
    transfer.submit([Load(expert, expert, DEMAND) for expert in (0, 5, 1, 2)])
    with pytest.raises(TransferError, match=r"expert 1 of MoE layer 1 \(number 5\): .*" + message):
        transfer.wait_any([5])
    for expert in (0, 1, 2):
        assert transfer.wait_any([expert]) == [expert]
        assert slot_bytes_of(store, arena, expert, expert) == file_bytes_of(store, expert)
    assert not transfer.is_ready(5)
    reads.faults.clear()
    transfer.submit([Load(5, 5, DEMAND)])
    assert transfer.wait_any([5]) == [5]
    assert slot_bytes_of(store, arena, 5, 5) == file_bytes_of(store, 5)
    transfer.close()


def test_read_error_names_file_offset_and_bytes(tmp_path: Path) -> None:
    store = plain_store(tmp_path / "experts.bin", 2, 4096, first_byte=4096)
    reads = GatedReads(store, 2)
    reads.open()
    reads.faults[1] = fail
    transfer = DiskTransfer(store, SlotArena(1, store.slot_bytes), read=reads)
    transfer.submit([Load(1, 0, DEMAND)])
    with pytest.raises(TransferError, match=r"experts\.bin: 4096 bytes from byte 8192 could not be read"):
        transfer.wait_any([1])
    transfer.close()


@MODES
def test_file_that_is_cut_while_it_is_open(tmp_path: Path, direct: bool | None) -> None:
    store = plain_store(tmp_path / "experts.bin", 3, 10000)
    arena = SlotArena(3, store.slot_bytes)
    transfer = DiskTransfer(store, arena, direct=direct)
    os.truncate(store.files[0], 8 + 2 * 10000 + 3000)
    transfer.submit([Load(expert, expert, DEMAND) for expert in range(3)])
    with pytest.raises(TransferError, match="10000 bytes from byte 20008 wanted, got 3000: the file is shorter"):
        transfer.wait_any([2])
    assert transfer.wait_any([1]) == [1]
    assert slot_bytes_of(store, arena, 1, 1) == file_bytes_of(store, 1)
    transfer.close()


def failing(times: int, fault: Fault) -> Fault:
    """Fails so often, then reads."""
    left = [fault] * times
    return lambda *read: (left.pop() if left else os.preadv)(*read)


@MODES
@pytest.mark.parametrize("fault", [fail, come_short])
def test_read_that_fails_twice_is_tried_again_and_counted(tmp_path: Path, direct: bool | None, fault: Fault) -> None:
    store = plain_store(tmp_path / "experts.bin", 2, 20000)
    arena, slept = SlotArena(2, store.slot_bytes), list[float]()
    reads = GatedReads(store, 2)
    reads.open()
    reads.faults[1] = failing(2, fault)
    transfer = DiskTransfer(store, arena, direct=direct, read=reads, sleep=slept.append)
    transfer.submit([Load(expert, expert, DEMAND) for expert in (0, 1)])
    for expert in (0, 1):
        assert transfer.wait_any([expert]) == [expert]
        assert slot_bytes_of(store, arena, expert, expert) == file_bytes_of(store, expert)
    stats = transfer.stats()
    assert (stats.num_loads, stats.num_retries, stats.num_failed_loads, slept) == (2, 2, 0, [0.01, 0.05])
    transfer.reset_stats()
    assert transfer.stats().num_retries == 0
    transfer.close()


def test_what_keeps_failing_is_tried_so_often_and_no_more(tmp_path: Path) -> None:
    store = plain_store(tmp_path / "experts.bin", 2, 8192)
    reads = GatedReads(store, 2)
    reads.open()
    reads.faults[1] = fail
    transfer = DiskTransfer(store, SlotArena(2, store.slot_bytes), read=reads, sleep=lambda seconds: None)
    transfer.submit([Load(1, 1, DEMAND)])
    with pytest.raises(TransferError, match="in 3 attempts"):
        transfer.wait_any([1])
    stats = transfer.stats()
    assert (reads.experts, stats.num_retries, stats.num_failed_loads, stats.num_loads) == ([1, 1, 1], 2, 1, 0)
    assert transfer.has_failed(1) and not transfer.has_failed(0) and not transfer.is_filling(1)
    os.truncate(store.files[0], 8192)
    reads.faults.clear()
    transfer.submit([Load(1, 1, DEMAND)])
    with pytest.raises(TransferError, match="the file is shorter than it was"):
        transfer.wait_any([1])
    assert (reads.experts, transfer.stats().num_failed_loads) == ([1] * 4, 2), "a file that was cut stays cut"
    transfer.close()


def test_slow_reads_are_waited_for_and_counted_as_stall(tmp_path: Path) -> None:
    """Every read takes longer than half of what counts as hanging; all of them together much longer."""
    store = plain_store(tmp_path / "experts.bin", 1, 8 * 4096, first_byte=4096)

    def slowly(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(0.15)
        return os.preadv(descriptor, buffers, offset)

    arena = SlotArena(1, store.slot_bytes)
    transfer = DiskTransfer(store, arena, io_threads=1, piece_bytes=4096, read=slowly, hang_s=0.5)
    transfer.submit([Load(0, 0, DEMAND)])
    assert transfer.wait_any([0]) == [0]
    assert slot_bytes_of(store, arena, 0, 0) == file_bytes_of(store, 0)
    stats = transfer.stats()
    assert stats.stall_s > 1.0 and (stats.num_retries, stats.num_failed_loads) == (0, 0)
    transfer.close()


class HangingRead:
    """The first read of an expert does not return before it is told to; all others do."""

    def __init__(self) -> None:
        self._lock, self._num_reads, self._returns = threading.Lock(), 0, threading.Event()

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        with self._lock:
            self._num_reads += 1
            hangs = self._num_reads == 1
        assert not hangs or self._returns.wait(30)
        return os.preadv(descriptor, buffers, offset)

    def return_now(self) -> None:
        self._returns.set()


@MODES
def test_slot_of_a_read_that_hangs_is_written_by_nobody_else_until_it_returns(
    tmp_path: Path, direct: bool | None
) -> None:
    store = plain_store(tmp_path / "experts.bin", 4, 3 * 4096, first_byte=4096)
    reads, hanging = GatedReads(store, 4), HangingRead()
    reads.open()
    reads.faults[1] = hanging
    arena = SlotArena(3, store.slot_bytes)
    transfer = DiskTransfer(store, arena, piece_bytes=4096, direct=direct, read=reads, hang_s=0.2)
    transfer.submit([Load(0, 0, DEMAND), Load(1, 1, DEMAND), Load(2, 2, DEMAND)])
    assert transfer.wait_any([0]) == [0]
    with pytest.raises(TransferError, match=r"expert 1 of MoE layer 0 \(number 1\): no read has ended for 0.2 s"):
        transfer.wait_any([1])
    transfer.drain()  # at once: what hangs is not waited for again
    assert transfer.has_failed(1) and [transfer.is_filling(slot) for slot in range(3)] == [False, True, False]
    transfer.submit([Load(3, 1, DEMAND), Load(1, 0, DEMAND)])
    assert transfer.wait_any([1]) == [1], "the same expert into another slot, by the other thread"
    assert slot_bytes_of(store, arena, 0, 1) == file_bytes_of(store, 1)
    assert reads.experts.count(3) == 0, "it waits for its slot"
    hanging.return_now()
    assert transfer.wait_any([3]) == [3] and not transfer.is_filling(1)
    assert slot_bytes_of(store, arena, 1, 3) == file_bytes_of(store, 3)
    assert transfer.stats().num_failed_loads == 1
    transfer.close()


def test_waiting_behind_a_read_that_hangs_is_an_error_too(tmp_path: Path) -> None:
    store = plain_store(tmp_path / "experts.bin", 2, 8192)
    hanging = HangingRead()
    transfer = DiskTransfer(store, SlotArena(2, store.slot_bytes), io_threads=1, read=hanging, hang_s=0.1)
    transfer.submit([Load(0, 0, PREFETCH)])
    while not transfer.is_filling(0):
        time.sleep(0.001)
    transfer.submit([Load(1, 1, DEMAND)])
    with pytest.raises(TransferError, match=r"\(number 1\): reads before it have not returned for 0.1 s"):
        transfer.wait_any([1])
    assert transfer.has_failed(0) and not transfer.has_failed(1)
    hanging.return_now()
    assert transfer.wait_any([1]) == [1]
    transfer.close()


def test_close_does_not_wait_for_a_read_that_hangs_for_good(tmp_path: Path) -> None:
    store = plain_store(tmp_path / "experts.bin", 2, 8192)
    reads, hanging = GatedReads(store, 2), HangingRead()
    reads.open()
    reads.faults[1] = hanging
    transfer = DiskTransfer(store, SlotArena(2, store.slot_bytes), read=reads, hang_s=0.1)
    transfer.submit([Load(1, 1, DEMAND)])
    reads.await_reads(1)
    threads = transfer._crew._threads
    transfer.close()
    assert any(thread.is_alive() for thread in threads)
    hanging.return_now()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)


def test_demand_overtakes_a_prefetch_that_is_half_read(tmp_path: Path) -> None:
    store = plain_store(tmp_path / "experts.bin", 3, 3 * 4096, first_byte=4096)
    reads = GatedReads(store, 3)
    transfer = DiskTransfer(store, SlotArena(3, store.slot_bytes), io_threads=1, piece_bytes=4096, read=reads)
    transfer.submit([Load(0, 0, PREFETCH), Load(1, 1, PREFETCH)])
    reads.await_reads(1)
    transfer.submit([Load(2, 2, DEMAND)])
    assert not transfer.cancel(0)
    reads.allow(2)
    reads.await_reads(3)
    transfer.promote(0)
    reads.open()
    while not transfer.is_ready(1):
        transfer.wait_any([1])
    assert reads.experts == [0, 2, 2, 2, 0, 0, 1, 1, 1]
    transfer.close()


def test_two_threads_share_one_expert(tmp_path: Path) -> None:
    store = plain_store(tmp_path / "experts.bin", 1, 2 * 4096, first_byte=4096)
    both_read = threading.Barrier(2, timeout=30)

    def meet(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        both_read.wait()
        return os.preadv(descriptor, buffers, offset)

    arena = SlotArena(1, store.slot_bytes)
    transfer = DiskTransfer(store, arena, io_threads=2, piece_bytes=4096, read=meet)
    transfer.submit([Load(0, 0, DEMAND)])
    assert transfer.wait_any([0]) == [0]
    assert slot_bytes_of(store, arena, 0, 0) == file_bytes_of(store, 0)
    transfer.close()


def test_slot_is_not_written_by_two_loads_at_once(tmp_path: Path) -> None:
    store = plain_store(tmp_path / "experts.bin", 3, 4096, first_byte=4096)
    reads = GatedReads(store, 3)
    arena = SlotArena(2, store.slot_bytes)
    transfer = DiskTransfer(store, arena, io_threads=2, read=reads)
    transfer.submit([Load(0, 0, PREFETCH)])
    reads.await_reads(1)
    for _ in range(2):
        transfer.submit([Load(1, 0, DEMAND)])
        transfer.cancel(1)
    transfer.submit([Load(1, 0, DEMAND)])
    transfer.submit([Load(2, 1, DEMAND)])
    reads.await_reads(2)
    assert reads.experts == [0, 2], "the second thread passes over the load whose slot is being written"
    reads.open()
    transfer.wait_any([1])
    assert reads.experts == [0, 2, 1]
    assert slot_bytes_of(store, arena, 0, 1) == file_bytes_of(store, 1)
    transfer.close()


@given(
    first_byte=st.sampled_from([8, 64, 4096, 4160, 5000]),
    num_bytes=st.integers(4096, 60000),
    direct=st.sampled_from([None, False]),
    steps=st.lists(st.tuples(st.sampled_from("dpxaw"), st.integers(0, 7), st.integers(0, 4)), max_size=40),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_schedule_fills_slots_with_the_files_bytes(
    tmp_path: Path, first_byte: int, num_bytes: int, direct: bool | None, steps: list[tuple[str, int, int]]
) -> None:
    store = plain_store(tmp_path / "experts.bin", 8, num_bytes, first_byte)
    arena = SlotArena(5, store.slot_bytes)
    transfer = DiskTransfer(store, arena, io_threads=2, piece_bytes=8192, direct=direct)
    owner: dict[int, int] = {}  # slot → the expert that was submitted for it last
    for step, expert, slot in steps:
        coming = [e for e in owner.values() if not transfer.is_ready(e)]
        if step in "dp" and expert not in owner.values():
            owner[slot] = expert
            transfer.submit([Load(expert, slot, DEMAND if step == "d" else PREFETCH)])
        elif step == "x" and transfer.cancel(expert):
            owner = {s: e for s, e in owner.items() if e != expert}
        elif step == "a":
            transfer.promote(expert)
        elif step == "w" and coming:
            for arrived in transfer.wait_any(coming):
                place = next(s for s, e in owner.items() if e == arrived)
                assert slot_bytes_of(store, arena, place, arrived) == file_bytes_of(store, arrived)
    for slot, expert in owner.items():
        assert transfer.wait_any([expert]) == [expert]
        assert slot_bytes_of(store, arena, slot, expert) == file_bytes_of(store, expert)
    transfer.close()


def test_direct_reads_are_counted_with_their_alignment(tmp_path: Path) -> None:
    store = plain_store(tmp_path / "experts.bin", 2, 8192, first_byte=64)
    transfer = DiskTransfer(store, SlotArena(1, store.slot_bytes))
    if not transfer.is_direct:
        pytest.skip("the file system of the temporary folder does not take O_DIRECT")
    transfer.submit([Load(0, 0, DEMAND)])
    transfer.wait_any([0])
    assert transfer.stats().num_bytes == 3 * 4096
    transfer.close()


def test_unusable_arguments_are_refused(tmp_path: Path) -> None:
    store = plain_store(tmp_path / "experts.bin", 2, 8192)
    arena = SlotArena(1, store.slot_bytes)
    with pytest.raises(ValueError, match="0 threads"):
        DiskTransfer(store, arena, io_threads=0)
    with pytest.raises(ValueError, match="pieces of 5000 bytes"):
        DiskTransfer(store, arena, piece_bytes=5000)
    with pytest.raises(ValueError, match="do not hold experts"):
        DiskTransfer(store, SlotArena(1, 4096))
    transfer = DiskTransfer(store, arena)
    with pytest.raises(IndexError, match="slot 1 of 1"):
        transfer.submit([Load(0, 1, DEMAND)])
    with pytest.raises(KeyError):
        transfer.submit([Load(2, 0, DEMAND)])
    transfer.close()
    store.files[0].unlink()
    with pytest.raises(CheckpointError, match=r"experts\.bin: cannot be opened"):
        DiskTransfer(store, arena)


def test_forgotten_transfer_ends_its_threads(tmp_path: Path) -> None:
    store = plain_store(tmp_path / "experts.bin", 2, 8192)
    transfer = DiskTransfer(store, SlotArena(1, store.slot_bytes))
    transfer.submit([Load(0, 0, DEMAND)])
    crew = weakref.ref(transfer._crew)
    threads = transfer._crew._threads
    del transfer
    gc.collect()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    gc.collect()
    assert crew() is None, "its files are closed with it"


def test_interpreter_ends_well_with_loads_queued_and_close_in_del(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from expert_files import plain_store
from runtime.transfer.disk import DiskTransfer
from runtime.transfer.slots import SlotArena
from runtime.vocabulary import Load, LoadReason

class Owner:
    def __init__(self):
        store = plain_store(Path({str(tmp_path / "experts.bin")!r}), 64, 65536)
        self.transfer = DiskTransfer(store, SlotArena(64, store.slot_bytes), piece_bytes=4096)
        self.transfer.submit([Load(e, e, LoadReason.PREFETCH) for e in range(64)])
    def __del__(self):
        self.transfer.close()

owner = Owner()
owner.itself = owner
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
