"""The arena: addresses, views that outlive it, memory that is given back."""

from __future__ import annotations

import gc
import mmap
import subprocess
import sys

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
    assert arena.release_tail(2) == 2 * 4096
    assert [bool(arena.view(slot, PLACE).all()) for slot in range(4)] == [True, True, False, False]
    assert arena.release_tail(4) == 0
    for num_slots in (0, 5):
        with pytest.raises(BudgetError, match="4 slots"):
            arena.release_tail(num_slots)


def test_release_tail_gives_back_whole_pages_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = SlotArena(40, 4096)
    for slot in range(40):
        arena.view(slot, PLACE).fill_(1.0)
    monkeypatch.setattr(mmap, "PAGESIZE", 1 << 16)
    assert arena.release_tail(3) == 24 * 4096
    assert [slot for slot in range(40) if arena.view(slot, PLACE).all()] == list(range(16))
    assert arena.release_tail(33) == 0


def test_move_copies_a_whole_slot_and_nothing_else() -> None:
    arena = SlotArena(4, 8192)
    for slot in range(4):
        arena.buffer(slot)[:] = bytes([slot + 1]) * 8192
    arena.move(3, 1)
    assert [bytes(arena.buffer(slot)) for slot in range(4)] == [bytes([n]) * 8192 for n in (1, 4, 3, 4)]
    with pytest.raises(IndexError, match="slot 4 of 4"):
        arena.move(4, 0)


def test_released_memory_is_charged_again_only_when_it_is_written() -> None:
    code = """
from runtime import machine
from runtime.transfer.slots import SlotArena
arena = SlotArena(16, 4 << 20)
for slot in range(16):
    arena.buffer(slot)[:] = bytes([1]) * (4 << 20)
full = machine.resident_bytes()
arena.release_tail(4)
shrunk = machine.resident_bytes()
arena.buffer(10)[:] = bytes([7]) * (4 << 20)
print(full - shrunk, machine.resident_bytes() - shrunk, arena.buffer(3)[-1], arena.buffer(11)[-1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    given, taken, kept, lost = map(int, done.stdout.split())
    assert 46 << 20 <= given <= 49 << 20 and 3 << 20 <= taken <= 6 << 20
    assert (kept, lost) == (1, 0)


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
