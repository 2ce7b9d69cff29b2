"""The contract of `runtime.schedulers.base.Scheduler`, over every scheduler that there is."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Engine, Job, Log

from runtime.schedulers.base import Route, Scheduler
from runtime.schedulers.deadline import MAX_LEFT_OUT, MAX_OVERTAKEN, Deadline
from runtime.schedulers.fifo import Fifo
from runtime.schedulers.route_overlap import QUANTUM, RouteOverlap

SCHEDULERS: dict[str, Callable[[int, int], Scheduler]] = {
    "fifo": Fifo,
    "route_overlap": RouteOverlap,
    "route_overlap_by_token": lambda group, window: RouteOverlap(group, window, quantum=1),
    "deadline": Deadline,
    "deadline_with_budget": lambda group, window: Deadline(group, window, max_tokens=40),
}
JOBS = st.lists(
    st.builds(
        lambda arrival_s, prompt, output, task, slo_s: (arrival_s, prompt, output, task, slo_s),
        st.sampled_from([0.0, 0.5, 3.0, 3.0, 20.0, 50.0]),
        st.integers(1, 12),
        st.integers(1, 12),
        st.sampled_from(["chat", "code"]),
        st.sampled_from([None, None, 1.0, 5.0, 15.0, 60.0]),
    ),
    min_size=1,
    max_size=25,
).map(
    lambda rows: [
        Job(f"r{number}", arrival_s, prompt, output, task, slo_s, max_output_tokens=16)
        for number, (arrival_s, prompt, output, task, slo_s) in enumerate(rows)
    ]
)


def _pass_s(prompt_tokens: int, num_decoded: int) -> float:
    return 0.3 + 0.05 * prompt_tokens if prompt_tokens else 0.1 + 0.1 * num_decoded


def _route(name: str, place: int) -> Route | None:
    """Two of eight experts in each of three layers; unknown for every fifth token."""
    seed = zlib.crc32(f"{name} {place}".encode())
    if seed % 5 == 0:
        return None
    route = np.argsort(np.random.default_rng(seed).random((3, 8)), axis=1) < 2
    route.flags.writeable = False
    return route


def _serve(kind: str, group: int, window: int, jobs: list[Job], kv_tokens: float = math.inf, chunk: int = 64) -> Log:
    """The engine itself refuses empty, unknown, repeated, mixed and too large choices, and it must come to an end."""
    return Engine(SCHEDULERS[kind](group, window), jobs, _pass_s, kv_tokens, chunk, _route).run()


@pytest.mark.parametrize("kind", SCHEDULERS)
@settings(deadline=None, max_examples=30)
@given(
    JOBS, st.integers(1, 4), st.sampled_from([1, 2, 4]), st.sampled_from([24, 40, math.inf]), st.sampled_from([3, 64])
)
def test_every_request_is_served_within_bounds(
    kind: str, jobs: list[Job], group: int, window: int, kv_tokens: float, chunk: int
) -> None:
    log = _serve(kind, group, window, jobs, kv_tokens, chunk)
    assert log.finished_s.keys() == {job.id for job in jobs}
    assert max(log.under_way) <= group * window


@pytest.mark.parametrize("kind", SCHEDULERS)
@settings(deadline=None, max_examples=15)
@given(JOBS, st.integers(1, 4), st.sampled_from([1, 2, 4]), st.sampled_from([24, math.inf]))
def test_decisions_are_deterministic(kind: str, jobs: list[Job], group: int, window: int, kv_tokens: float) -> None:
    assert _serve(kind, group, window, jobs, kv_tokens) == _serve(kind, group, window, jobs, kv_tokens)


@pytest.mark.parametrize("kind", SCHEDULERS)
@settings(deadline=None, max_examples=30)
@given(JOBS, st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_no_decoding_request_starves(kind: str, jobs: list[Job], group: int, window: int) -> None:
    quantum = QUANTUM if kind == "route_overlap" else 1
    bound = (MAX_LEFT_OUT + 1) * window if kind.startswith("deadline") else (2 * window - 1) * quantum
    log = _serve(kind, group, window, jobs)
    left_out: dict[str, int] = {}
    for chosen, decoding in zip(log.passes, log.decoding, strict=True):
        left_out |= {name: 0 if name in chosen else left_out.get(name, 0) + 1 for name in decoding}
        assert max(left_out.values(), default=0) < bound


@pytest.mark.parametrize("kind", SCHEDULERS)
@settings(deadline=None, max_examples=30)
@given(JOBS, st.integers(1, 2), st.sampled_from([1, 2]))
def test_no_waiting_request_is_overtaken_for_ever(kind: str, jobs: list[Job], group: int, window: int) -> None:
    log = _serve(kind, group, window, jobs)
    most = MAX_OVERTAKEN * group * window if kind.startswith("deadline") else 0
    for job in jobs:
        assert sum(job.id in waited for waited in log.waited) <= most


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_full_kv_cache_does_not_stop_decoding(kind: str) -> None:
    jobs = [Job("first", prompt_tokens=8, output_tokens=8), Job("second", prompt_tokens=8, output_tokens=8)]
    log = _serve(kind, 2, 1, jobs, kv_tokens=15)
    assert log.admitted == ["first", "second"] and log.num_preempted == 0


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_preempted_request_is_taken_up_again(kind: str) -> None:
    jobs = [Job("first", prompt_tokens=8, output_tokens=8), Job("second", prompt_tokens=6, output_tokens=8)]
    log = _serve(kind, 2, 1, jobs, kv_tokens=18)
    assert (log.num_preempted > 0) == (kind != "deadline_with_budget")  # which leaves room for both answers
    assert log.finished_s.keys() == {"first", "second"}
