"""`deadline`: more SLOs are met than by `fifo`, and what it learns changes what it decides."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import Engine, Job

from runtime.schedulers.base import Request
from runtime.schedulers.deadline import MAX_LEFT_OUT, MAX_OVERTAKEN, Deadline
from runtime.schedulers.estimates import OutputLengths, Pace
from runtime.schedulers.fifo import Fifo

PROMPT_S, TOKEN_S = 0.5, 0.1


def _pass_s(prompt_tokens: int, num_decoded: int) -> float:
    """A prompt takes a constant, decoding a time per token: whoever shares a pass pays for the others."""
    return PROMPT_S if prompt_tokens else TOKEN_S * num_decoded


def _warm(scheduler: Deadline, **lengths: int) -> Deadline:
    """After one request of each task alone, and all of them together, so that all durations are known."""
    jobs = [
        Job(f"{task} {time}", time, 4, length, task)
        for number, (task, length) in enumerate(lengths.items())
        for time in (number * 50.0, 500.0)
    ]
    Engine(scheduler, jobs, _pass_s).run()
    return scheduler


def _request(
    name: str, task: str = "chat", slo_s: float | None = None, output: int = 0, arrival_s: float = 1e3
) -> Request:
    return Request(name, task, arrival_s, 4, 0 if output else 4, output, 100, slo_s)


def _first_choice(scheduler: Deadline, waiting: list[Request], running: list[Request], now_s: float = 1e3) -> str:
    return scheduler.choose(waiting, running, {}, now_s)[0]


def test_more_slos_are_met_than_by_fifo() -> None:
    long = [Job(f"long {number}", number * 8.0, 20, 60, "batch") for number in range(8)]
    short = [Job(f"short {number}", 3.0 + number // 2 * 8.0, 5, 5, "chat", slo_s=2.2) for number in range(16)]
    for group, window in ((1, 2), (1, 4), (2, 2)):
        in_time = [
            Engine(kind(group, window), [*long, *short], _pass_s).run().num_in_time(short) for kind in (Fifo, Deadline)
        ]
        assert in_time[0] < len(short) and in_time[1] > in_time[0], (group, window)


def test_the_strictest_of_those_that_wait_comes_first() -> None:
    waiting = [_request("none"), _request("loose", slo_s=60.0), _request("strict", slo_s=20.0)]
    assert _first_choice(_warm(Deadline(2), chat=10), waiting, []) == "strict"


def test_a_request_joins_only_if_no_slo_breaks() -> None:
    """Alone, 10 tokens take 1 s; with another request of 10 they take 2.5 s, its prompt included."""
    for slo_s, chosen in ((2.0, "running"), (3.0, "new")):
        scheduler = _warm(Deadline(2), chat=11, other=11)
        assert _first_choice(scheduler, [_request("new")], [_request("running", slo_s=slo_s, output=1)]) == chosen


def test_its_own_slo_counts_too() -> None:
    """With the other it would take 2.7 s, alone 1.6 s."""
    for slo_s, chosen in ((2.0, "running"), (4.0, "new")):
        scheduler = _warm(Deadline(2), chat=11, other=11)
        assert _first_choice(scheduler, [_request("new", slo_s=slo_s)], [_request("running", output=1)]) == chosen


def test_slos_that_are_missed_anyhow_hold_up_nobody() -> None:
    scheduler = _warm(Deadline(2), chat=11, other=11)
    hopeless = _request("hopeless", slo_s=0.5, output=1)
    assert _first_choice(scheduler, [_request("new")], [hopeless]) == "new"
    waiting = [_request("late", slo_s=0.5), _request("in time", slo_s=9.0)]
    assert _first_choice(scheduler, waiting, []) == "in time"


def test_learned_output_lengths_change_decisions() -> None:
    """A running chat with 3 s left can take a neighbour whose answers are short, not one whose are long."""
    for length, chosen in ((3, "new"), (60, "running")):
        scheduler = _warm(Deadline(2), chat=16, other=length)
        running = _request("running", slo_s=3.0, output=1)
        assert _first_choice(scheduler, [_request("new", "other")], [running]) == chosen


def test_the_token_budget_holds_but_lets_every_request_run() -> None:
    scheduler = _warm(Deadline(4, max_tokens=30), chat=10)
    assert _first_choice(scheduler, [_request("new")], [_request("running", output=1)]) == "new"
    running = [_request("one", output=1), _request("two", output=1)]
    assert _first_choice(scheduler, [_request("new")], running) == "one"
    assert _first_choice(Deadline(4, max_tokens=5), [_request("new")], []) == "new"


def test_the_most_urgent_decode_first() -> None:
    scheduler = _warm(Deadline(1, 4), chat=11)
    running = [
        _request("none", output=1), _request("hopeless", slo_s=0.1, output=1),
        _request("loose", slo_s=30.0, output=1), _request("strict", slo_s=5.0, output=1),
    ]  # fmt: skip
    order = []
    while running:
        order.append(_first_choice(scheduler, [], running))
        running = [request for request in running if request.id != order[-1]]
    assert order == ["strict", "loose", "none", "hopeless"]


def test_patience_ends() -> None:
    """Requests with an SLO that never stop coming delay one without, but not for ever."""
    window = 2
    jobs = [Job("patient", 0.1, 4, 30), *(Job(f"{i}", i * 1.0, 4, 8, "chat", slo_s=999.0) for i in range(200))]
    log = Engine(Deadline(1, window), jobs, _pass_s).run()
    place = log.admitted.index("patient")
    assert 1 < place <= MAX_OVERTAKEN * window + 1
    turns = [place for place, chosen in enumerate(log.passes) if log.decoding[place] and "patient" in chosen]
    decodes = [place for place, decoding in enumerate(log.decoding) if decoding]
    gaps = [decodes.index(later) - decodes.index(turn) for turn, later in pairwise(turns)]
    assert 1 < max(gaps) <= (MAX_LEFT_OUT + 1) * window


@given(st.integers(0, 300), st.integers(1, 400))
def test_expected_length_is_decremented_and_refilled(generated: int, most: int) -> None:
    lengths = OutputLengths()
    lengths.finished(_request("done", "chat", output=100))
    left = lengths.left(Request("a", "chat", 0.0, 4, 0, generated, max(most, generated + 1)))
    expected = 100 - generated if generated < 100 else 5 - (generated - 100) % 5
    assert left == min(expected, max(most, generated + 1) - generated) >= 1


def test_lengths_follow_the_answers_of_a_task() -> None:
    lengths = OutputLengths()
    assert lengths.left(_request("a")) == 100  # as long as it may get
    for task, length in (("chat", 10), ("chat", 20), ("code", 60)):
        lengths.finished(_request("done", task, output=length))
    assert [lengths.left(_request("a", task)) for task in ("chat", "code", "unseen")] == [15, 60, 30]


def _observed(pace: Pace, prompts: list[tuple[int, float]], slow: float = 1.0) -> None:
    """Requests one after the other, each prompt followed by two decode passes of 0.2 s; an idle hour between them."""
    for number, (tokens, seconds) in enumerate(prompts):
        now_s = number * 3600.0
        for left, output, took_s in ((tokens, 0, seconds), (0, 1, 0.2 * slow), (0, 2, 0.2)):
            pace.observe([Request(f"{number}", "chat", now_s, tokens, left, output, 9)], now_s)
            now_s += took_s
        pace.finished(Request(f"{number}", "chat", now_s, tokens, 0, 3, 9), now_s)


def test_durations_are_learned_and_idle_time_is_not_counted() -> None:
    pace = Pace()
    assert pace.decode_s(1) is None and pace.prompt_s(10) is None
    lengths = (10, 50, 200, 120, 30, 10, 80)
    _observed(pace, [(tokens, 1.0 + 0.01 * tokens) for tokens in lengths] + [(70, 90.0)])  # the last one: an outlier
    assert pace.decode_s(1) == pytest.approx(0.2)
    assert pace.prompt_s(1000) == pytest.approx(11.0, rel=1e-6)


def test_what_a_prompt_costs_the_decode_pass_after_it_belongs_to_it() -> None:
    pace = Pace()
    _observed(pace, [(10, 1.0)] * 9, slow=3.0)
    assert pace.decode_s(1) == pytest.approx(0.2)
    assert pace.prompt_s(10) == pytest.approx(1.0 + 0.4)


def test_unknown_durations_admit_everybody() -> None:
    scheduler = Deadline(3)
    waiting = [_request("a", slo_s=0.01), _request("b", slo_s=math.inf)]
    assert _first_choice(scheduler, waiting, [_request("running", slo_s=0.01, output=1)]) == "a"
