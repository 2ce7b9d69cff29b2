"""Measuring what a miss takes either way, on a clock that the test turns."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest

from runtime.miss_rates import MANY_TOKENS, measure
from runtime.transfer.simulated import SimulatedTransfer
from runtime.vocabulary import Load


class Watched(SimulatedTransfer):
    """Waits for nothing, as a GPU's does; notes how many copies are under way."""

    most = 0
    submitted: list[int]

    def submit(self, loads: Sequence[Load]) -> None:
        self.submitted = [*getattr(self, "submitted", []), *(load.expert for load in loads)]
        super().submit(loads)

    def wait_any(self, experts: Collection[int]) -> list[int]:
        return list(experts)


@pytest.mark.parametrize("num_experts", [1, 5, 40])
@pytest.mark.parametrize("num_slots", [1, 4, 100])
def test_rates_are_those_of_both_at_once(num_experts: int, num_slots: int) -> None:
    transfer, computed = Watched(load_s=0.25), []

    def compute(expert: int, num_tokens: int) -> None:
        computed.append((expert, num_tokens))
        transfer.advance(0.5 + 0.125 * num_tokens)

    experts = list(range(100, 100 + num_experts))
    rates = measure(transfer, experts, num_slots, compute, budget_s=20.0, clock=lambda: transfer.now_s)
    assert rates.copy_s == pytest.approx(0.25)
    assert (rates.expert_s, rates.token_s) == (pytest.approx(0.5), pytest.approx(0.125))
    assert {tokens for _, tokens in computed} == {1, MANY_TOKENS}
    assert {expert for expert, _ in computed} | set(transfer.submitted) == set(experts)
    assert transfer.stats().num_loads == 0, "what was measured is no part of the run"
    assert not any(map(transfer.is_filling, range(num_slots)))


def test_few_samples_of_what_takes_longer_than_there_is_time() -> None:
    transfer, calls = Watched(load_s=1.0), []

    def compute(expert: int, num_tokens: int) -> None:
        calls.append(num_tokens)
        transfer.advance(10.0)

    rates = measure(transfer, [0, 1], 2, compute, budget_s=0.1, clock=lambda: transfer.now_s)
    assert calls == [1, MANY_TOKENS, 1, 1, 1, MANY_TOKENS, MANY_TOKENS, MANY_TOKENS]
    assert (rates.copy_s, rates.expert_s, rates.token_s) == (1.0, 10.0, 0.0)
