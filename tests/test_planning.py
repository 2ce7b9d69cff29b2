"""Planning ahead: a plan is used where things come as expected, and leaves no trace where they do not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from runtime.planning import Planner, Situation
from runtime.schedulers.base import Request
from runtime.schedulers.fifo import Fifo
from runtime.schedulers.route_overlap import RouteOverlap


def _decoding(names: str) -> list[Request]:
    return [Request(name, "default", 0.0, 1, 0, 1, 100) for name in names]


def _situation(names: str, waiting: str = "") -> Situation:
    queue = [Request(name, "default", 0.0, 3, 3, 0, 100) for name in waiting]
    return Situation(queue, _decoding(names), dict.fromkeys(names, (1, 2)))


@pytest.fixture
def planner() -> Iterator[Planner]:
    ticks = itertools.count()
    planner = Planner(RouteOverlap(2, 2, quantum=1), None, lambda: float(next(ticks)))
    planner.saw_routes(
        {name: np.eye(4, dtype=np.bool_)[[kind]] for name, kind in zip("abcd", (0, 1, 0, 1), strict=True)}
    )
    yield planner
    planner.close()


def test_a_plan_is_used_where_things_come_as_expected(planner: Planner) -> None:
    assert planner.choose(_situation("abcd")) == ["a", "c"]
    planner.begin_ahead(_situation("abcd"))
    assert planner.choose(_situation("abcd")) == ["b", "d"]
    assert 0 < planner.hidden_s <= planner.busy_s


def test_a_plan_for_those_who_are_gone_is_given_up(planner: Planner) -> None:
    assert planner.choose(_situation("abcd")) == ["a", "c"]
    planner.begin_ahead(_situation("abcd"))
    planner.finished(_decoding("a")[0])
    assert planner.choose(_situation("bcd")) == ["b", "d"], "its turn went by unused"


def test_a_plan_gives_way_to_who_arrives(planner: Planner) -> None:
    assert planner.choose(_situation("abc")) == ["a", "c"]
    planner.begin_ahead(_situation("abc"))
    assert planner.choose(_situation("abc", waiting="e")) == ["e"]
    assert planner.choose(_situation("abce")) == ["b", "e"]


def test_an_end_that_was_expected_keeps_the_plan(planner: Planner) -> None:
    assert planner.choose(_situation("abcd")) == ["a", "c"]
    planner.begin_ahead(_situation("bcd"))
    planner.finished(_decoding("a")[0])
    # The second batch of the unit that has begun, then a new unit.
    assert [planner.choose(_situation("bcd")) for _ in range(3)] == [["b", "d"], ["b", "d"], ["c"]]


def test_who_takes_no_routes_is_asked_in_the_calling_thread() -> None:
    planner = Planner(Fifo(2, 2), None, lambda: 0.0)
    planner.begin_ahead(_situation("abcd"))
    assert planner.choose(_situation("abcd")) == ["a", "b"]
    assert planner.hidden_s == 0.0
