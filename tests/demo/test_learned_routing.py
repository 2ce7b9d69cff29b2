"""Routing is learned: the trained model beats the same architecture untrained, on what an untrained model cannot have.

Never a hit rate: an untrained model's routing is so uniform in time that it flatters every cache.
"""

from __future__ import annotations

import numpy as np
import pytest

from harness.demo.statistics import (
    Routing,
    domain_information,
    gini,
    hit_rate,
    information_on_unseen_text,
    linear_recall,
    lookahead_recall,
    recall,
)

EXPERTS = 32


def test_held_out_loss_beats_the_control(trained_routing: list[Routing], untrained_routing: list[Routing]) -> None:
    trained, control = (np.mean([routing.loss for routing in side]) for side in (trained_routing, untrained_routing))
    assert control > 8 and trained < control / 2


@pytest.mark.parametrize("multiple", [1, 2])
def test_gate_lookahead_beats_the_control(
    trained_routing: list[Routing], untrained_routing: list[Routing], multiple: int
) -> None:
    assert lookahead_recall(trained_routing, multiple) > lookahead_recall(untrained_routing, multiple) + 0.1


def test_next_layer_is_more_predictable_from_ids(
    trained_routing: list[Routing], untrained_routing: list[Routing]
) -> None:
    assert linear_recall(trained_routing, EXPERTS) > linear_recall(untrained_routing, EXPERTS) + 0.1


def test_experts_know_the_kind_of_text(trained_routing: list[Routing], untrained_routing: list[Routing]) -> None:
    trained, control = (information_on_unseen_text(side, EXPERTS) for side in (trained_routing, untrained_routing))
    assert trained > control + 0.1


def _routing(task: str, experts: list[list[int]]) -> Routing:
    return Routing(task, np.array([experts]), np.zeros((0, len(experts), 2), int), 0.0)


def test_statistics_by_hand() -> None:
    apart = [_routing(task, [[expert]] * 4) for task, expert in (("a", 0), ("b", 1)) for _ in range(4)]
    assert domain_information(apart, 2) == pytest.approx(1.0)
    assert information_on_unseen_text(apart, 2) == pytest.approx(1.0, abs=0.05)
    same = [_routing(task, [[0], [1]]) for task in "ab" for _ in range(2)]
    assert domain_information(same, 2) == information_on_unseen_text(same, 2) == pytest.approx(0.0)
    by_passage = [_routing(task, [[4 * kind + number]] * 4) for kind, task in enumerate("ab") for number in range(4)]
    assert domain_information(by_passage, 8) == pytest.approx(1.0)
    assert information_on_unseen_text(by_passage, 8) == pytest.approx(0.0)
    assert gini(np.array([1.0, 1, 1, 1])) == 0 and gini(np.array([0.0, 0, 0, 1])) == pytest.approx(0.75)
    assert recall(np.array([[0, 1]]), np.array([[1, 2]])) == 0.5


def test_hit_rates_by_hand() -> None:
    steps = [[expert] for expert in (0, 1, 2, 0, 1, 2)]
    assert hit_rate(steps, 2, "lru") == 0
    assert hit_rate(steps, 2, "belady") == pytest.approx(2 / 6)
    assert hit_rate([[0], [0], [1], [2], [0]], 2, "lfu") == pytest.approx(2 / 5)
