"""The arena: addresses, views that outlive it, memory that is given back."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from runtime.errors import BudgetError
from runtime.transfer.slots import SlotArena, TensorPlace

PLACE = TensorPlace("w", 64, (2, 3), torch.bfloat16)


def test_view_and_buffer_are_the_same_memory() -> None:
    arena = SlotArena(3, 8192)
    view = arena.view(1, PLACE)
    arena.buffer(1)[64:76] = torch.arange(6, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert torch.equal(view, torch.arange(6, dtype=torch.bfloat16).view(2, 3))
    assert view.data_ptr() == arena.address(1) + 64
    assert arena.address(2) - arena.address(1) == len(arena.buffer(0)) == 8192
    assert arena.address(0) % mmap.PAGESIZE == 0
    assert not arena.view(0, PLACE).any()


def test_view_outlives_the_arena() -> None:
    arena = SlotArena(1, 4096)
    view = arena.view(0, PLACE)
    view.fill_(3.0)
    del arena
    gc.collect()
    assert torch.equal(view, torch.full((2, 3), 3.0, dtype=torch.bfloat16))


def test_release_tail_forgets_the_tail_and_keeps_the_rest() -> None:
    arena = SlotArena(4, 4096)
    for slot in range(4):
        arena.view(slot, PLACE).fill_(1.0)
    arena.release_tail(2)
    assert [bool(arena.view(slot, PLACE).all()) for slot in range(4)] == [True, True, False, False]
    arena.release_tail(4)
    for num_slots in (0, 5):
        with pytest.raises(BudgetError, match="4 slots"):
            arena.release_tail(num_slots)


@pytest.mark.parametrize("num_slots", [0, -1])
def test_no_slots_are_refused(num_slots: int) -> None:
    with pytest.raises(BudgetError, match=f"{num_slots} slots of 4096 bytes"):
        SlotArena(num_slots, 4096)


@pytest.mark.parametrize("num_slots", [1 << 36, 1 << 60])
def test_mapping_that_the_system_refuses_names_its_bytes(num_slots: int) -> None:
    with pytest.raises(BudgetError, match=f"{num_slots << 20} bytes in all, cannot be mapped"):
        SlotArena(num_slots, 1 << 20)


def test_what_lies_outside_is_refused() -> None:
    arena = SlotArena(2, 4096)
    with pytest.raises(IndexError, match="slot 2 of 2"):
        arena.buffer(2)
    with pytest.raises(ValueError, match="does not fit"):
        arena.view(0, TensorPlace("w", 4090, (4,), torch.float32))
    with pytest.raises(ValueError, match="multiple of"):
        SlotArena(1, 100)
