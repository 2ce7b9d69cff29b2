"""Copies and kernels on a real GPU: what kernels find in slots is what the host holds, whatever is under way."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch

from harness.demo.widen import widened
from runtime.model import checkpoint_files, meta_model
from runtime.transfer.cuda import CudaTransfer, Event, Lane
from runtime.transfer.cuda_streams import CudaStreams
from runtime.transfer.device_slots import DeviceSlots
from runtime.transfer.host_slab import HostSlab
from runtime.transfer.store import ExpertStore
from runtime.vocabulary import Load, LoadReason

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
NUM_SLOTS = 12
DELAY_CYCLES = 400_000  # a fraction of a millisecond: longer than many copies


class Unordered(CudaStreams):
    """Without the waits of one lane."""

    left_out: Lane

    def wait(self, event: Event, lane: Lane) -> None:
        if lane is not self.left_out:
            super().wait(event, lane)


@pytest.fixture(scope="module")
def slab() -> HostSlab:
    model = str(widened(1 << 20))
    loaded = meta_model(model)
    return HostSlab(ExpertStore.open(loaded.model, checkpoint_files(model), loaded.layers))


@pytest.fixture(scope="module")
def expected(slab: HostSlab) -> torch.Tensor:
    """Every expert on the device, uint8 [experts, num_bytes]."""
    whole = torch.frombuffer(slab.arena.memory, dtype=torch.uint8).view(-1, slab.slot_bytes)
    return whole[:, : slab.num_bytes].to(DEVICE)


@pytest.fixture
def make(slab: HostSlab) -> Iterator[Callable[..., tuple[CudaTransfer, DeviceSlots]]]:
    made: list[CudaTransfer] = []

    def build(kind: type[CudaStreams], num_streams: int = 2) -> tuple[CudaTransfer, DeviceSlots]:
        slots = DeviceSlots(NUM_SLOTS, slab.slot_bytes, DEVICE)
        slots.memory.fill_(0xA5)
        torch.cuda.synchronize()
        made.append(CudaTransfer(kind(slab, slots, num_streams), NUM_SLOTS, piece_bytes=300_000, window_bytes=2 << 20))
        return made[-1], slots

    yield build
    for transfer in made:
        transfer.close()


def stress(transfer: CudaTransfer, slots: DeviceSlots, expected: torch.Tensor, rounds: int, seed: int) -> int:
    """Wrong bytes that kernels found while experts came and went at random; kernels start late now and then."""
    rng = random.Random(seed)
    num_experts, num_bytes = expected.shape
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    held = slots.memory.view(NUM_SLOTS, -1)[:, :num_bytes]
    resident: dict[int, int] = {}  # slot: expert
    for _ in range(rounds):
        leased: dict[int, int] = {}  # expert: slot
        loads = []
        for expert in rng.sample(range(num_experts), rng.randint(1, NUM_SLOTS // 2)):
            known = {held_by: slot for slot, held_by in resident.items()}
            slot = known.get(expert)
            if slot is None:
                slot = rng.choice([slot for slot in range(NUM_SLOTS) if slot not in leased.values()])
                resident[slot] = expert
                loads.append(Load(expert, slot, LoadReason.DEMAND))
            elif slot in leased.values():
                continue
            else:
                transfer.promote(expert)
            leased[expert] = slot
        transfer.submit(loads)
        free = [slot for slot in range(NUM_SLOTS) if slot not in leased.values()]
        for slot in free[: rng.randint(0, 3)]:
            expert = rng.choice([e for e in range(num_experts) if e not in resident.values()])
            resident[slot] = expert
            transfer.submit([Load(expert, slot, LoadReason.PREFETCH)])
        waiting = list(leased)
        while waiting:
            for expert in transfer.wait_any(waiting):
                waiting.remove(expert)
                if rng.random() < 0.3:
                    torch.cuda._sleep(DELAY_CYCLES)
                wrong += torch.ne(held[leased[expert]], expected[expert]).sum()
        if rng.random() < 0.05:
            transfer.drain()
            resident = {slot: expert for slot, expert in resident.items() if transfer.is_ready(expert)}
    return int(wrong)


@pytest.mark.parametrize("num_streams", [1, 2])
def test_kernels_find_their_experts(
    make: Callable[..., tuple[CudaTransfer, DeviceSlots]], expected: torch.Tensor, num_streams: int
) -> None:
    transfer, slots = make(CudaStreams, num_streams)
    assert stress(transfer, slots, expected, rounds=1500, seed=num_streams) == 0
    stats = transfer.stats()
    assert stats.num_loads > 2000 and stats.num_bytes > 2000 * expected.shape[1] * 0.9
    assert stats.stall_s > 0.0 and 0.0 < stats.busy_s < 60.0
    print(f"{stats} = {stats.num_bytes / stats.busy_s / 1e9:.2f} GB/s while copying")


@pytest.mark.parametrize("lane", list(Lane))
def test_the_stress_notices_a_wait_that_is_left_out(
    make: Callable[..., tuple[CudaTransfer, DeviceSlots]], expected: torch.Tensor, lane: Lane
) -> None:
    kind = type("LeftOut", (Unordered,), {"left_out": lane})
    assert any(stress(*make(kind), expected, rounds=300, seed=seed) for seed in range(4))


def test_nothing_here_makes_the_host_wait(
    make: Callable[..., tuple[CudaTransfer, DeviceSlots]], expected: torch.Tensor
) -> None:
    transfer, slots = make(CudaStreams)
    before = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # about a second
    before.record()
    for turn in range(4 * NUM_SLOTS):
        transfer.submit([Load(turn, turn % NUM_SLOTS, LoadReason.DEMAND)])
        assert transfer.wait_any([turn]) == [turn]
    assert not before.query(), "the host has waited for the device"
    transfer.drain()
    held = slots.memory.view(NUM_SLOTS, -1)[:, : expected.shape[1]]
    assert torch.equal(held, expected[3 * NUM_SLOTS : 4 * NUM_SLOTS])
