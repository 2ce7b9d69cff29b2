"""Splitting requests by their routes: planted groups are found, nothing gets worse, units run in turn."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.schedulers.base import Request, Route
from runtime.schedulers.partition import distinct_experts, partition
from runtime.schedulers.recent_routes import RecentRoutes
from runtime.schedulers.route_overlap import RouteOverlap

Routes = npt.NDArray[np.bool_]


def _random(seed: int, requests: int, layers: int, experts: int, unknown: float = 0.0) -> Routes:
    """Two experts a layer, with favourites by kind of request; some routes are not known."""
    generator = np.random.default_rng(seed)
    taste = generator.random((3, layers, experts)) * generator.choice([0, 2, 5])
    noise = generator.gumbel(size=(requests, layers, experts))
    score = taste[generator.integers(0, 3, requests)] + noise
    routes = np.argsort(np.argsort(-score, axis=2), axis=2) < 2
    routes[generator.random(requests) < unknown] = False
    return routes


def _planted(num_clusters: int, size: int, layers: int, experts: int) -> tuple[Routes, npt.NDArray[np.int64]]:
    """Requests in random order whose kind has six experts a layer to itself, of which each uses four."""
    generator = np.random.default_rng(1)
    kinds = generator.permutation(np.repeat(np.arange(num_clusters), size))
    own = np.stack([generator.permutation(experts) for _ in range(layers)])  # [layers, experts]
    routes = np.zeros((len(kinds), layers, experts), np.bool_)
    for row, kind in enumerate(kinds):
        for layer in range(layers):
            routes[row, layer, generator.choice(own[layer, 6 * kind : 6 * kind + 6], 4, replace=False)] = True
    return routes, kinds


def _fewest(routes: Routes, group: int) -> int:
    """By trying everything; the first request is in the first of two batches."""
    rows = range(1, len(routes))
    splits = [(0, *rest) for rest in combinations(rows, group - 1)]
    return min(distinct_experts(routes, [one, [row for row in rows if row not in one]]) for one in splits)


@pytest.mark.parametrize(("num_clusters", "size"), [(2, 4), (4, 4), (8, 8), (3, 5)])
def test_planted_clusters_are_found(num_clusters: int, size: int) -> None:
    routes, kinds = _planted(num_clusters, size, layers=6, experts=64)
    batches = partition(routes, size)
    assert [len(set(kinds[batch])) for batch in batches] == [1] * num_clusters


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**6), st.integers(1, 21), st.integers(1, 8), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_partition_is_never_worse_than_the_order_of_arrival(
    seed: int, requests: int, group: int, unknown: float
) -> None:
    routes = _random(seed, requests, layers=3, experts=9, unknown=unknown)
    before = routes.copy()
    batches = partition(routes, group)
    assert sorted(chain.from_iterable(batches)) == list(range(requests))
    assert len(batches) == -(-requests // group) and max(map(len, batches)) <= group
    arrival = [range(start, min(start + group, requests)) for start in range(0, requests, group)]
    assert distinct_experts(routes, batches) <= distinct_experts(routes, arrival)
    assert batches == partition(routes, group) and (routes == before).all()


def test_two_batches_are_close_to_the_best_split() -> None:
    found = [partition(_random(seed, 8, layers=4, experts=16), 4) for seed in range(20)]
    needed = sum(distinct_experts(_random(seed, 8, 4, 16), batches) for seed, batches in enumerate(found))
    fewest = sum(_fewest(_random(seed, 8, 4, 16), 4) for seed in range(20))
    assert fewest <= needed <= 1.005 * fewest


def test_the_objective_counts_each_expert_once_a_batch_and_layer() -> None:
    routes = np.zeros((3, 2, 4), np.bool_)
    routes[0, :, 0] = routes[1, :, 0] = routes[2, 0, 1] = True
    assert distinct_experts(routes, [[0, 1], [2]]) == 3
    assert distinct_experts(routes, [[0], [1, 2]]) == 5


class _Counted(dict[str, Route]):
    """Routes that count how often they are asked for."""

    num_asked = 0

    def get(self, name: str, default: Route | None = None) -> Route | None:  # type: ignore[override]
        self.num_asked += 1
        return super().get(name, default)


def _decoding(names: str) -> list[Request]:
    return [Request(name, "default", 0.0, 1, 0, 1, 100) for name in names]


def _routes(kinds: dict[str, int]) -> _Counted:
    return _Counted({name: np.eye(4, dtype=np.bool_)[[kind, kind]] for name, kind in kinds.items()})


@pytest.mark.parametrize("quantum", [1, 3])
def test_a_unit_is_planned_once_and_its_batches_take_turns(quantum: int) -> None:
    scheduler = RouteOverlap(group=2, window=2, quantum=quantum)
    first = scheduler.choose([], _decoding("abcd"), _routes({"a": 0, "b": 1, "c": 0, "d": 1}), 0.0)
    changed = _routes({"a": 0, "b": 0, "c": 1, "d": 1})
    turns = [first, *(list(scheduler.choose([], _decoding("abcd"), changed, 1.0)) for _ in range(2 * quantum - 1))]
    assert turns == [["a", "c"]] * quantum + [["b", "d"]] * quantum
    assert changed.num_asked == 0
    assert scheduler.choose([], _decoding("abcd"), changed, 2.0) == ["a", "b"]


def test_new_requests_take_the_places_of_finished_ones_and_else_join_the_next_unit() -> None:
    scheduler = RouteOverlap(group=2, window=2, quantum=2)
    routes = _routes({"a": 0, "b": 1, "c": 0, "d": 1})
    assert scheduler.choose([], _decoding("abcd"), routes, 0.0) == ["a", "c"]
    new = Request("e", "default", 1.0, 3, 3, 0, 100)
    assert scheduler.choose([new], _decoding("acd"), routes, 1.0) == ["e"]
    assert scheduler.choose([], _decoding("acde"), routes, 2.0) == ["a", "c"]
    assert [scheduler.choose([], _decoding("acdef"), routes, 3.0) for _ in range(2)] == [["d", "e"]] * 2
    assert sorted(scheduler.choose([], _decoding("acdef"), routes, 4.0)) == ["a", "c"]
    assert scheduler.choose([], _decoding("def"), routes, 5.0) == ["d", "e"]


def test_free_places_are_taken_by_those_whose_turn_would_come_last() -> None:
    scheduler = RouteOverlap(group=2, window=3, quantum=2)
    kinds = {"a": 0, "b": 1, "c": 2, "d": 0, "e": 1, "f": 2}
    assert scheduler.choose([], _decoding("abcdef"), _routes(kinds), 0.0) == ["a", "d"]
    assert scheduler.choose([], _decoding("abcef"), {}, 1.0) == ["a", "c"]
    assert [scheduler.choose([], _decoding("abef"), {}, 2.0) for _ in range(2)] == [["b", "e"]] * 2
    assert [scheduler.choose([], _decoding("abef"), {}, 3.0) for _ in range(2)] == [["f"]] * 2
    assert scheduler.choose([], _decoding("abef"), {}, 4.0) == ["a", "b"]


def test_requests_without_a_route_fill_up_the_others() -> None:
    scheduler = RouteOverlap(group=3, window=2, quantum=1)
    first = scheduler.choose([], _decoding("abcdef"), _routes({"a": 0, "b": 1, "e": 0, "f": 1}), 0.0)
    second = scheduler.choose([], _decoding("abcdef"), {}, 1.0)
    assert {"a", "e"} <= set(first) and {"b", "f"} <= set(second) and len(first) == len(second) == 3


def test_without_any_route_the_order_is_that_of_admission() -> None:
    scheduler = RouteOverlap(group=2, window=2, quantum=1)
    assert [scheduler.choose([], _decoding("abc"), {}, float(time)) for time in range(2)] == [["a", "b"], ["c"]]


def test_what_was_used_often_of_late_is_expected() -> None:
    recent = RecentRoutes()
    of = {name: np.array([[name in experts for name in "abcdefgh"]]) for name, experts in
          {"ab": "ab", "cd": "cd", "ah": "ah"}.items()}  # fmt: skip
    recent.saw({"one": of["ab"], "other": of["cd"]})
    assert all((recent.routes(["one", "other", "new"])[name] == of[kind]).all() for name, kind in
               (("one", "ab"), ("other", "cd")))  # fmt: skip
    for kind in ["ab"] * 5 + ["cd"]:
        recent.saw({"one": of[kind]})
    assert (recent.routes(["one"])["one"] == of["ab"]).all()
    for kind in ["cd"] * 20:
        recent.saw({"one": of[kind]})
    assert (recent.routes(["one"])["one"] == of["cd"]).all()
    recent.forget("one")
    assert recent.routes(["one", "other"]).keys() == {"other"}
