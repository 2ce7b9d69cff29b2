"""Virtual time: what the contract suite does not say about `SimulatedTransfer`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from runtime.transfer.simulated import SimulatedTransfer
from runtime.vocabulary import Load, LoadReason

THREE = [Load(expert, expert, LoadReason.DEMAND) for expert in range(3)]


def test_stall_is_what_is_left_of_the_load_after_compute() -> None:
    transfer = SimulatedTransfer(load_s=2.0, load_bytes=10)
    transfer.submit(THREE)
    transfer.advance(1.5)
    assert transfer.wait_any([0]) == [0]
    assert transfer.now_s == 2.0
    transfer.advance(3.0)
    assert transfer.wait_any([0, 1, 2]) == [0, 1]
    assert transfer.wait_any([2]) == [2]
    assert transfer.now_s == 6.0
    stats = transfer.stats()
    assert (stats.stall_s, stats.busy_s, stats.num_bytes, stats.num_loads) == (1.5, 6.0, 30, 3)


def test_idle_link_starts_when_it_is_asked_and_is_not_busy_before() -> None:
    transfer = SimulatedTransfer(load_s=1.0)
    transfer.advance(5.0)
    transfer.submit(THREE[:1])
    transfer.advance(0.25)
    assert transfer.stats().busy_s == 0.25
    transfer.wait_any([0])
    transfer.advance(4.0)
    assert (transfer.now_s, transfer.stats().busy_s) == (10.0, 1.0)


def test_reset_in_the_middle_of_a_load_counts_the_rest_only() -> None:
    transfer = SimulatedTransfer(load_s=2.0)
    transfer.submit(THREE[:1])
    transfer.advance(0.5)
    transfer.reset_stats()
    transfer.wait_any([0])
    assert (transfer.stats().busy_s, transfer.stats().stall_s) == (1.5, 1.5)


def test_loads_of_no_time_are_ready_when_waited_for() -> None:
    transfer = SimulatedTransfer(load_s=0.0)
    transfer.submit(THREE)
    assert transfer.wait_any([2]) == [2]
    assert transfer.now_s == 0.0


def test_computing_is_slower_while_the_link_is_busy() -> None:
    transfer = SimulatedTransfer(load_s=2.0, slowdown=0.5)
    transfer.advance(1.0)
    transfer.submit(THREE[:2])  # busy from 1 to 5
    transfer.advance(1.0)
    assert transfer.now_s == 2.5
    transfer.advance(3.0)  # 2.5 s at the slower pace do 2.5 / 1.5, the rest at the usual one
    assert transfer.now_s == pytest.approx(5.0 + 3.0 - 2.5 / 1.5)
    assert transfer.stats().busy_s == 4.0 and transfer.stats().stall_s == 0.0


@pytest.mark.parametrize("arguments", [(-1.0, 0), (1.0, -1), (1.0, 0, -0.1)])
def test_negative_cost_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        SimulatedTransfer(*arguments)


def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="cannot go back"):
        SimulatedTransfer(1.0).advance(-0.5)


def test_no_torch_is_needed() -> None:
    code = "import sys, runtime.transfer.simulated; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
