"""Experts in host memory for a GPU, and the slots that they are copied into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expert_files import file_bytes_of, plain_store

from runtime.errors import BudgetError
from runtime.transfer.device_slots import DeviceSlots
from runtime.transfer.host_slab import HostSlab
from runtime.transfer.slots import TensorPlace


def test_a_slab_holds_every_expert_as_its_file_does(tmp_path: Path) -> None:
    store = plain_store(tmp_path / "experts.bin", 12, 5000)
    slab = HostSlab(store)
    for expert in store.experts:
        start = slab.start(expert)
        assert bytes(slab.arena.memory[start : start + slab.num_bytes]) == file_bytes_of(store, expert)
    assert slab.arena.num_slots == 12 and slab.arena.slot_bytes == slab.slot_bytes == 8192


def test_what_is_pinned_of_a_slab_is_whole_experts_from_the_first(tmp_path: Path) -> None:
    slab = HostSlab(plain_store(tmp_path / "experts.bin", 12, 5000), num_pinned=5)
    assert slab.pinned_bytes == 5 * slab.slot_bytes == slab.start(5)
    assert slab.spans(6, 100, 50) == ((slab.start(6) + 100, 100, 50),)


def test_slots_of_a_device_are_views_of_one_allocation() -> None:
    slots = DeviceSlots(3, 4096, torch.device("cpu"))
    place = TensorPlace("w", 256, (2, 4), torch.float32)
    slots.view(1, place).fill_(7.0)
    assert torch.equal(slots.memory.view(torch.float32)[1088:1096], torch.full((8,), 7.0))
    for slot, wrong in ((3, place), (-1, place)):
        with pytest.raises(IndexError):
            slots.view(slot, wrong)
    with pytest.raises(ValueError, match="does not fit"):
        slots.view(0, place._replace(slot_offset=4096 - 16))
    slots.move(1, 0)
    assert torch.equal(slots.view(0, place), torch.full((2, 4), 7.0))
    assert slots.release_tail(1) == 0
    for num_slots in (0, 4):
        with pytest.raises(BudgetError, match=f"3 slots: {num_slots} of them cannot be kept"):
            slots.release_tail(num_slots)
    with pytest.raises(BudgetError):
        DeviceSlots(0, 4096, torch.device("cpu"))
