"""When memory is short and when it is free again, on a fake machine and a fake clock."""

from __future__ import annotations

import pytest

from runtime.pressure import CALM_LOOKS, LOOK_EVERY_S, RESERVE_BYTES, PressureWatch

MIB = 1 << 20


class Machine:
    """Memory and time as a test says."""

    def __init__(self, available_bytes: int) -> None:
        self.available_bytes, self.resident_bytes, self.now_s, self.num_looks = available_bytes, 500 * MIB, 0.0, 0
        self.watch = PressureWatch(self._available, lambda: self.resident_bytes, lambda: self.now_s)

    def _available(self) -> int:
        self.num_looks += 1
        return self.available_bytes

    def look(self, uncharged_bytes: int = 0) -> int:
        self.now_s += LOOK_EVERY_S
        return self.watch.look(uncharged_bytes)


def test_it_looks_once_a_second() -> None:
    machine = Machine(0)
    assert machine.watch.look(0) < 0
    for _ in range(5):
        machine.now_s += LOOK_EVERY_S / 5 - 1e-9
        assert machine.watch.look(0) == 0
    assert machine.num_looks == 1
    assert machine.look() < 0 and machine.num_looks == 2


@pytest.mark.parametrize("uncharged_bytes", [0, 40 * MIB])
def test_what_lacks_of_the_reserve_is_to_be_given_back(uncharged_bytes: int) -> None:
    machine = Machine(RESERVE_BYTES + uncharged_bytes)
    assert machine.look(uncharged_bytes) == 0
    machine.available_bytes -= 5 * MIB
    assert machine.look(uncharged_bytes) == -5 * MIB


def test_memory_must_stay_free_for_a_while_before_it_is_taken_again() -> None:
    machine = Machine(2 * RESERVE_BYTES + MIB)
    assert [machine.look() for _ in range(CALM_LOOKS)] == [0] * (CALM_LOOKS - 1) + [MIB]
    machine.available_bytes -= MIB
    assert machine.look() == 0
    machine.available_bytes += MIB
    assert [machine.look() for _ in range(CALM_LOOKS)] == [0] * (CALM_LOOKS - 1) + [MIB]


def test_what_may_be_taken_does_not_make_memory_short() -> None:
    machine = Machine(3 * RESERVE_BYTES)
    taken = max(machine.look() for _ in range(CALM_LOOKS))
    assert taken == RESERVE_BYTES and machine.look(taken) == 0


def test_a_limit_counts_beside_what_the_machine_has() -> None:
    machine = Machine(10_000 * MIB)
    machine.watch.limit_bytes = machine.resident_bytes + RESERVE_BYTES - MIB
    assert machine.look() == -MIB
    machine.resident_bytes -= MIB
    assert machine.look() == 0
    machine.available_bytes = 0
    assert machine.look() == -RESERVE_BYTES
