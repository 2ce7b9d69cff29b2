"""The layer step, on a virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest

from runtime.cache.coordinator import Coordinator
from runtime.cache.governor import Governor
from runtime.cache.residency import Count, Residency
from runtime.errors import TransferError
from runtime.predictors.base import Forecast, NoPredictor, Observation, Predictor
from runtime.transfer.simulated import SimulatedTransfer
from runtime.vocabulary import Load, LoadReason, Pass, Phase

LAYERS, EXPERTS = 4, 8


class Fixed(Predictor):
    """Forecasts what it was told, and counts how often it was asked to observe."""

    def __init__(self, experts: Sequence[Sequence[int]]) -> None:
        self.rows = np.zeros((LAYERS, EXPERTS), np.float32)
        for layer, chosen in enumerate(experts):
            for rank, expert in enumerate(chosen):
                self.rows[layer, expert] = 1.0 - rank / 10
        self.observed = 0

    def observe(self, layer: int, observation: Observation) -> None:
        self.observed += 1

    def forecast(self, layer: int) -> Forecast:
        return self.rows


class Broken(SimulatedTransfer):
    """Fails on one expert; into one slot something may still be written."""

    bad = filling = -1
    heals = False  # when it is asked for the bad one again

    def submit(self, loads: Sequence[Load]) -> None:
        if self.heals and any(load.expert == self.bad for load in loads):
            self.bad = -1
        super().submit(loads)

    def is_ready(self, expert: int) -> bool:
        return expert != self.bad and super().is_ready(expert)

    def has_failed(self, expert: int) -> bool:
        return expert == self.bad and super().is_ready(expert)

    def is_filling(self, slot: int) -> bool:
        return slot == self.filling or super().is_filling(slot)

    def wait_any(self, experts):  # type: ignore[no-untyped-def]
        if self.bad in experts:
            raise TransferError(f"expert {self.bad} cannot be read")
        return super().wait_any(experts)


def _coordinator(slots: int, predictor: Predictor | None = None, depth: int = 0, **more: object) -> Coordinator:
    return Coordinator(
        Residency(LAYERS, EXPERTS, slots, 2, "lru"),
        Broken(load_s=1.0),
        predictor or NoPredictor(),
        governor=Governor(depth),
        prefetch_count=2,
        **more,  # type: ignore[arg-type]
    )


def _observation(step: int = 0, tokens: int = 1) -> Observation:
    phase = Phase.DECODE if tokens == 1 else Phase.PREFILL
    return Observation(Pass(phase, tokens, step), np.zeros((tokens, 2), np.int64))


def _serve(coordinator: Coordinator, layer: int, experts: Sequence[int], step: int = 0) -> list[list[int]]:
    demand = [layer * EXPERTS + expert for expert in experts]
    groups = coordinator.serve(layer, demand, [1] * len(demand), _observation(step))
    return [[expert % EXPERTS for expert in group] for group in groups]


def test_resident_experts_come_first_and_missed_ones_as_they_arrive() -> None:
    coordinator = _coordinator(4)
    assert _serve(coordinator, 0, [1, 2]) == [[1], [2]]
    assert _serve(coordinator, 0, [0, 2, 3]) == [[2], [0], [3]]
    coordinator.residency.check_integrity()


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_every_demanded_expert_is_served_once_at_any_budget(slots: int) -> None:
    coordinator = _coordinator(slots)
    for layer in (0, 1, 0):
        assert sorted(chain.from_iterable(_serve(coordinator, layer, range(EXPERTS)))) == list(range(EXPERTS))
    coordinator.residency.check_integrity()


def test_a_right_forecast_turns_misses_into_hits() -> None:
    coordinator = _coordinator(8, Fixed([[], [3, 4], [], []]), depth=1)
    _serve(coordinator, 0, [0])
    coordinator.transfer.advance(5.0)  # type: ignore[attr-defined]
    assert _serve(coordinator, 1, [3, 4]) == [[3, 4]]
    counts = coordinator.residency.counts()
    assert (counts[Count.HITS], counts[Count.PREFETCH_USED], counts[Count.PREFETCH_WASTED]) == (2, 2, 0)


def test_a_slot_that_a_layer_frees_goes_to_what_is_still_wanted() -> None:
    """ExpertFlow's example: 4 slots, 3 experts in one layer, 2 forecast in the next; the fifth takes a freed slot."""
    coordinator = _coordinator(4, Fixed([[], [3, 4], [], []]), depth=1)
    groups = coordinator.serve(0, [0, 1, 2], [1] * 3, _observation())
    assert list(next(iter(groups))) == [0]
    assert sorted(coordinator.residency.resident()) == [0, 1, 2, EXPERTS + 3]  # no slot for the other one yet
    assert list(next(iter(groups))) == [1]  # the consumer is done with 0
    assert sorted(coordinator.residency.resident()) == [1, 2, EXPERTS + 3, EXPERTS + 4]
    assert [list(group) for group in groups] == [[2]]
    assert _serve(coordinator, 1, [3, 4]) == [[3], [4]]
    counts = coordinator.residency.counts()
    assert (counts[Count.PREFETCH_USED], counts[Count.MISSES]) == (2, 3)
    coordinator.residency.check_integrity()


def test_depth_and_count_bound_the_prefetches() -> None:
    forecast = [[], [0, 1, 2], [3, 4, 5], [6, 7]]
    for depth, expected in ((1, 2), (2, 4), (3, 6)):
        coordinator = _coordinator(16, Fixed(forecast), depth=depth)
        _serve(coordinator, 0, [0])
        assert coordinator.residency.counts()[Count.PREFETCH_ISSUED] == expected


def test_the_predictor_frequency_skips_observations_of_decode_steps() -> None:
    predictor = Fixed([[], [], [], []])
    coordinator = _coordinator(8, predictor, depth=1, predict_every=3)
    for step in range(6):
        _serve(coordinator, 0, [0], step)
    assert predictor.observed == 2


def test_needed_loads_are_demand_loads_and_prefetches_at_first_use() -> None:
    needed: list[Load] = []
    coordinator = _coordinator(8, Fixed([[], [3, 4], [], []]), depth=1, needed_loads=needed)
    _serve(coordinator, 0, [0])
    _serve(coordinator, 1, [3])
    _serve(coordinator, 1, [3])
    assert [(load.expert, load.reason) for load in needed] == [
        (0, LoadReason.DEMAND),
        (EXPERTS + 3, LoadReason.PREFETCH),
    ]


def test_a_failed_read_gives_everything_back_and_the_engine_goes_on() -> None:
    coordinator = _coordinator(4, Fixed([[], [5, 6], [], []]), depth=1)
    coordinator.transfer.bad = 2  # type: ignore[attr-defined]
    with pytest.raises(TransferError, match="cannot be read"):
        _serve(coordinator, 0, [1, 2])
    coordinator.residency.check_integrity()
    coordinator.transfer.bad = -1  # type: ignore[attr-defined]
    assert sorted(chain.from_iterable(_serve(coordinator, 0, [1, 2, 3, 4]))) == [1, 2, 3, 4]


class Late(SimulatedTransfer):
    """Says once, instead of queueing, that an expert was not ready after all."""

    submissions_left = -1

    def submit(self, loads: Sequence[Load]) -> None:
        self.submissions_left -= bool(loads)
        if self.submissions_left == 0:
            raise TransferError("what was computed may be wrong")
        super().submit(loads)


@pytest.mark.parametrize("submission", [1, 2, 3])  # of the layer's loads, of prefetches, and of one that waited
def test_what_was_never_submitted_has_not_arrived(submission: int) -> None:
    transfer = Late(load_s=1.0)
    predictor = Fixed([[], [3, 4], [], []])
    residency = Residency(LAYERS, EXPERTS, 4, 2, "lru")
    coordinator = Coordinator(residency, transfer, predictor, governor=Governor(1), prefetch_count=2)
    for layer, experts in ((1, [3, 4]), (2, [0, 1, 2, 3])):  # 3 and 4 of layer 1 were loaded once, and have gone
        _serve(coordinator, layer, experts)
    transfer.submissions_left = submission
    with pytest.raises(TransferError, match="may be wrong"):
        _serve(coordinator, 0, [0, 1, 2])
    residency.check_integrity()
    for expert in residency.resident():
        load = transfer._queue.find(expert)
        assert load is not None and load.slot == residency.slot_of(expert)
    assert not residency._leases.any()
    assert sorted(chain.from_iterable(_serve(coordinator, 0, [0, 1, 2]))) == [0, 1, 2]


def test_a_prefetch_that_failed_is_loaded_on_demand_and_hurts_nobody_before() -> None:
    coordinator = _coordinator(8, Fixed([[], [3, 4], [], []]), depth=1)
    transfer: Broken = coordinator.transfer  # type: ignore[assignment]
    transfer.bad = EXPERTS + 3
    _serve(coordinator, 0, [0])
    transfer.advance(5.0)
    assert _serve(coordinator, 1, [4, 5]) == [[4], [5]], "whoever does not need it does not hear of it"
    transfer.heals = True
    assert _serve(coordinator, 1, [3]) == [[3]]
    assert coordinator.residency.counts()[Count.MISSES] == 3, "0, 5, and the prefetch that failed"
    coordinator.residency.check_integrity()


def test_a_slot_that_may_still_be_written_is_left_alone_until_it_may_not() -> None:
    coordinator = _coordinator(2)
    transfer: Broken = coordinator.transfer  # type: ignore[assignment]
    transfer.bad, transfer.filling = 0, 0
    with pytest.raises(TransferError, match="cannot be read"):
        _serve(coordinator, 0, [0])
    transfer.bad = -1
    for layer in range(LAYERS):
        assert _serve(coordinator, layer, [1, 2]) == [[1], [2]]
        assert 0 not in map(coordinator.residency.slot_of, coordinator.residency.resident())
    coordinator.residency.check_integrity()
    coordinator.begin(_observation().passing)
    assert coordinator.residency.withheld == {0}
    transfer.filling = -1
    coordinator.begin(_observation().passing)
    assert coordinator.residency.withheld == set() and coordinator.residency.num_free == 1


def test_without_a_slot_that_can_be_used_a_layer_is_refused() -> None:
    coordinator = _coordinator(1)
    transfer: Broken = coordinator.transfer  # type: ignore[assignment]
    transfer.bad, transfer.filling = 0, 0
    for match in ("cannot be read", "no expert slot is left"):
        with pytest.raises(TransferError, match=match):
            _serve(coordinator, 0, [0])
    coordinator.grow(2)
    transfer.bad = -1
    transfer.filling = 3
    coordinator.grow(4)
    assert coordinator.residency.withheld == {0, 3}, "a slot that was given up, and is taken again"
    transfer.filling = 0
    assert _serve(coordinator, 0, [0]) == [[0]]
    transfer.filling = -1
    coordinator.residency.check_integrity()


def test_a_pass_that_was_broken_off_anywhere_leaves_nothing_behind() -> None:
    coordinator = _coordinator(4, Fixed([[], [5, 6], [], []]), depth=1)
    groups = coordinator.serve(0, [0, 1], [1, 1], _observation())
    assert list(next(groups)) == [0]
    coordinator.residency.plan(0, [2], [1], 1)  # decided, leased, and never submitted
    groups.close()
    coordinator.recover()
    coordinator.residency.check_integrity()
    assert not any(map(coordinator.residency.is_loading, coordinator.residency.resident()))
    assert sorted(chain.from_iterable(_serve(coordinator, 0, [1, 2, 3, 4]))) == [1, 2, 3, 4]


def test_leases_end_when_the_consumer_stops_in_the_middle() -> None:
    coordinator = _coordinator(2)
    groups = coordinator.serve(0, [0, 1], [1, 1], _observation())
    next(groups)
    groups.close()
    assert sorted(chain.from_iterable(_serve(coordinator, 1, [0, 1]))) == [0, 1]
    coordinator.residency.check_integrity()
