"""NVIDIA's own driver, called beside torch: threads without a context, refusals that leave no trace, what is sent."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from runtime.cuda_driver import CudaDriver
from runtime.machine import format_bytes
from runtime.readback import CudaReader, CudaUploader
from runtime.transfer.cuda import CudaTransfer
from runtime.transfer.cuda_streams import CudaStreams
from runtime.transfer.device_slots import DeviceSlots
from runtime.transfer.host_slab import HostSlab
from runtime.transfer.slots import SlotArena
from runtime.vocabulary import Load, LoadReason

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
DELAY_CYCLES = 20_000_000  # some milliseconds


def in_thread(call: Callable[[], Any]) -> Any:
    """What it returns in a thread that has not used CUDA."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(timeout=60)


def test_a_thread_without_a_context_may_call_the_driver() -> None:
    driver, there = CudaDriver(DEVICE), torch.arange(1000, device=DEVICE)
    torch.cuda.synchronize()
    back = driver.pinned(there.nbytes)

    def read() -> list[int]:
        driver.download(back.data_ptr(), there.data_ptr(), there.nbytes)
        driver.wait()
        return back.view(torch.int64).tolist()

    in_thread(driver.wait)
    assert in_thread(read) == list(range(1000))


def test_a_refusal_is_an_error_with_its_meaning_and_no_kernel_hears_of_it() -> None:
    driver, arena = CudaDriver(DEVICE), SlotArena(4, mmap.PAGESIZE)
    address = arena.address(0)
    driver.pin(address, 2 * mmap.PAGESIZE)
    with pytest.raises(RuntimeError, match=r"CUDA error \d+ \([a-z ]+.*\) in pinning memory"):
        driver.pin(address, 2 * mmap.PAGESIZE)
    driver.unpin(address)
    with pytest.raises(RuntimeError, match=r"CUDA error \d+ \([a-z ]+.*\) in unpinning memory"):
        driver.unpin(address)
    assert torch.ones(3, device=DEVICE).sum().item() == 3
    in_thread(lambda: driver.pin(address, mmap.PAGESIZE))
    in_thread(lambda: driver.unpin(address))


def test_memory_that_is_refused_is_copied_from_all_the_same() -> None:
    slab = HostSlab.blank(8, 100_000)
    for expert in range(8):
        slab.arena.buffer(expert)[:100_000] = bytes([expert + 1]) * 100_000
    driver = CudaDriver(DEVICE)
    driver.pin(slab.arena.address(5), mmap.PAGESIZE)  # no range that holds it can be pinned again
    slots = DeviceSlots(8, slab.slot_bytes, DEVICE)
    streams = CudaStreams(slab, slots)
    assert streams.notes[0].startswith(
        f"only {format_bytes(4 * slab.slot_bytes)} of {format_bytes(8 * slab.slot_bytes)}"
    )
    driver.unpin(slab.arena.address(5))
    transfer = CudaTransfer(streams, 8, piece_bytes=30_000)
    try:
        transfer.submit([Load(expert, expert, LoadReason(expert % 2)) for expert in range(8)])
        for expert in range(8):
            transfer.wait_any([expert])
            start = expert * slab.slot_bytes
            assert bool((slots.memory[start : start + 100_000] == expert + 1).all())
    finally:
        transfer.close()


def test_what_is_sent_arrives_while_the_device_is_late() -> None:
    send, read = CudaUploader(DEVICE, half_bytes=1 << 14), CudaReader(CudaDriver(DEVICE))
    streams = [torch.cuda.default_stream(DEVICE), torch.cuda.Stream(DEVICE)]
    found = []
    for number in range(400):
        with torch.cuda.stream(streams[number // 7 % 2]):
            if number % 50 == 0:
                torch.cuda._sleep(DELAY_CYCLES)
            values = torch.full((1 + number * 7 % 900,), number)
            there = send(values)
            values.fill_(-1)
            found.append(read([there])[0] if number % 3 == 0 else there.clone())
    torch.cuda.synchronize()
    assert all(bool((one == number).all()) for number, one in enumerate(found))
