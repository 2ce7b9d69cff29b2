"""Confirming: who runs when on which text, who is chosen, and what is claimed."""

from __future__ import annotations

import json
from functools import partial

import pytest
from confirm_fakes import PEAK_BYTES, Scripted, measurement, ok

from harness.measure.stats import Ratio
from harness.measure.workload import Passage, Workload, WorkloadError, segments
from harness.search.confirm import Confirmation, screening_rounds
from harness.search.objective import Objective
from harness.search.outcome import Kind, Limits, Outcome


def _latencies(**known: float) -> Scripted:
    """Everyone always takes the same, times what the segment takes."""
    return Scripted(lambda name, segment: ok(known[name] * (1 + segment)))


def test_one_finalist_and_the_default_take_turns_on_all_the_text() -> None:
    contenders = _latencies(D=10.0, A=8.0)
    found = contenders.confirm("A")
    assert contenders.events[:2] == ["+D", "+A"] and contenders.events[-2:] == ["-A", "-D"]
    assert contenders.events[2:8] == ["D0", "A0", "A1", "D1", "D2", "A2"] and len(contenders.events) == 16
    assert found.is_proven and found.ratio is not None and found.ratio.high == pytest.approx(0.8)
    assert (found.params, found.num_segments, found.screening) == ({"name": "A"}, 6, ())
    assert found.confidence == pytest.approx(1 - 2 / 2**6)


def test_the_best_of_the_screening_is_confirmed_on_text_that_the_screening_has_not_seen() -> None:
    contenders = _latencies(D=10.0, A=9.0, B=7.0, C=8.0)
    found = contenders.confirm("ABC", num_pairs=12)
    assert found.params == {"name": "B"} and found.is_proven
    assert [row.ratio for row in found.screening] == pytest.approx([0.9, 0.7, 0.8])
    runs = [event for event in contenders.events if event[0] not in "+-"]
    rounds = screening_rounds(12)
    assert runs[:8] == ["D0", "A0", "B0", "C0", "C1", "B1", "A1", "D1"]
    first, second = runs[: 4 * rounds], runs[4 * rounds :]
    assert {int(run[1:]) for run in first} == set(range(rounds))
    assert {int(run[1:]) for run in second} == set(range(rounds, rounds + 12)) and {run[0] for run in second} == {*"DB"}
    assert contenders.heard[:4] == ["default", "finalist 1", "finalist 2", "finalist 3"]
    assert contenders.heard[-2:] == ["finalist", "default"]


def test_hardly_any_gain_is_none() -> None:
    found = _latencies(D=10.0, A=9.95).confirm("A")
    assert found.ratio is not None and found.ratio.high < 1 and not found.is_proven


def test_luck_in_the_screening_proves_nothing() -> None:
    lucky = Scripted(lambda name, segment: ok(5.0 if name == "B" and segment < 3 else 10.0))
    found = lucky.confirm("AB")
    assert found.params == {"name": "B"} and found.screening[1].ratio == pytest.approx(0.5)
    assert not found.is_proven and not found.failure and found.ratio is not None and found.ratio.estimate == 1.0


def test_little_text_is_shared_between_the_stages_and_used_again() -> None:
    contenders = _latencies(D=10.0, A=8.0, B=9.0)
    found = contenders.confirm("AB", num_segments=4)
    runs = [event for event in contenders.events if event[0] not in "+-"]
    assert {run[1:] for run in runs[:9]} == {"0"} and {run[1:] for run in runs[9:]} == {"1", "2", "3"}
    assert found.num_segments == 3 and len(found.default) == 6 and found.is_proven


def test_a_single_segment_leaves_no_text_to_choose_by() -> None:
    found = _latencies(D=10.0, A=9.5, B=7.0).confirm("AB", num_segments=1)
    assert (found.params, found.num_segments, found.screening) == ({"name": "A"}, 1, ()) and found.is_proven


def test_what_does_not_fit_into_memory_together_is_loaded_for_each_turn() -> None:
    contenders = _latencies(D=10.0, A=8.0)
    assert contenders.confirm("A", num_open=1).is_proven
    assert contenders.events[:9] == ["+D", "D0", "-D", "+A", "A0", "-A", "+A", "A1", "-A"]
    together = _latencies(D=10.0, A=8.0, B=9.0)
    together.confirm("AB", num_open=2)
    assert together.events[:3] == ["+D", "D0", "-D"] and together.events[-3:] != ["+D", "D0", "-D"]
    assert together.events.count("+A") == 3 + 1  # each of three rounds, and once for the test


def test_a_finalist_that_fails_drops_out_with_the_reason() -> None:
    crash = Outcome(Kind.CRASH, "ended by SIGSEGV")
    contenders = Scripted(lambda name, segment: crash if (name, segment) == ("B", 1) else ok(7 if name == "B" else 9))
    found = contenders.confirm("AB")
    assert found.params == {"name": "A"} and "finalist 2 ended with crash" in found.screening[1].failure
    assert found.screening[1].ratio is None and "B2" not in contenders.events and found.failed == ({"name": "B"},)


def test_nobody_left_is_no_proof() -> None:
    found = Scripted(lambda name, segment: ok(1.0) if name == "D" else Outcome(Kind.TIMEOUT, "60 s")).confirm("AB")
    assert not found.is_proven and found.ratio is None and "finalist 2 ended with timeout" in found.failure
    assert found.failed == ({"name": "A"}, {"name": "B"})


def test_a_finalist_that_fails_in_the_test_proves_nothing() -> None:
    contenders = Scripted(lambda name, segment: Outcome(Kind.WRONG_TOKENS, "no") if segment == 2 else ok(1.0))
    found = contenders.confirm("A")
    assert found.ratio is None and not found.is_proven and found.failure.startswith("the default ended with wrong_tok")
    assert contenders.events[-1] == "-D" and "D3" not in contenders.events


@pytest.mark.parametrize("finalists", ["A", "AB"])
def test_a_default_that_fails_ends_it(finalists: str) -> None:
    contenders = Scripted(lambda name, segment: Outcome(Kind.CRASH, "gone") if name == "D" else ok(1.0))
    found = contenders.confirm(finalists)
    assert "the default ended with crash" in found.failure and not found.is_proven and not found.failed
    assert [event for event in contenders.events if event[0] not in "+-"] == ["D0"]


def test_an_interruption_ends_every_process() -> None:
    def interrupted(name: str, segment: int) -> Outcome:
        raise KeyboardInterrupt

    contenders = Scripted(interrupted)
    with pytest.raises(KeyboardInterrupt):
        contenders.confirm("AB")
    assert contenders.events == ["+D", "+A", "+B", "D0", "-B", "-A", "-D"]


def _slow_first_token(name: str, segment: int) -> Outcome:
    return ok({"A": 8.0, "B": 9.0, "D": 10.0}[name], ttft_ms=50.0 if name == "A" else 1.0)


def test_limits_are_checked_on_this_text_as_well() -> None:
    limits = Limits(slo_ttft_ms=40.0)
    alone = Scripted(_slow_first_token).confirm("A", limits=limits)
    assert not alone.is_proven and alone.ratio is not None and "slo_ttft by 25.0%" in alone.failure
    found = Scripted(_slow_first_token).confirm("AB", limits=limits)
    assert found.params == {"name": "B"} and found.is_proven and "slo_ttft" in found.screening[0].failure


def _sized(**known: tuple[float, float]) -> Scripted:
    """By name: latency, and peak memory as a share."""
    return Scripted(lambda name, segment: ok(known[name][0], round(known[name][1] * PEAK_BYTES)))


def test_balanced_weighs_latency_with_peak_memory() -> None:
    contenders = _sized(D=(10, 1.0), A=(7, 1.0), B=(10.5, 0.5))
    assert contenders.confirm("AB", objective=Objective.BALANCED).params == {"name": "B"}
    found = contenders.confirm("B", objective=Objective.BALANCED)
    assert found.is_proven and found.peak_ratio == 0.5 and not contenders.confirm("B").is_proven
    assert not _sized(D=(10, 1.0), A=(9, 1.2)).confirm("A", objective=Objective.BALANCED).is_proven


def test_memory_wants_a_smaller_peak_and_hardly_any_slowdown() -> None:
    def proven(latency: float, peak: float) -> bool:
        return _sized(D=(10, 1.0), A=(latency, peak)).confirm("A", objective=Objective.MEMORY).is_proven

    assert proven(10.4, 0.9) and not proven(10.6, 0.9) and not proven(8.0, 1.0) and not proven(8.0, 0.99)
    contenders = _sized(D=(10, 1.0), A=(9, 0.9), B=(10.4, 0.5), C=(10.1, 0.8))
    assert contenders.confirm("ABC", objective=Objective.MEMORY).params == {"name": "C"}


@pytest.mark.parametrize("objective", list(Objective))
def test_an_interval_that_holds_no_gain_proves_none(objective: Objective) -> None:
    runs = (measurement(10.0),) * 6
    found = Confirmation(runs, runs, Ratio(0.9, 0.8, 1.1, 6), objective=objective)
    assert not found.is_proven


def test_it_is_json() -> None:
    found = json.loads(json.dumps(_latencies(D=10.0, A=8.0, B=9.0).confirm("AB").as_dict()))
    assert found["is_proven"] and found["params"] == {"name": "A"} and found["objective"] == "latency"
    assert [row["params"]["name"] for row in found["screening"]] == ["A", "B"] and found["peak_ratio"] == 1.0


@pytest.mark.parametrize(("finalists", "num_pairs", "num_segments"), [("A", 5, 9), ("", 6, 9), ("A", 6, 0)])
def test_too_little_to_confirm_anything_is_refused(finalists: str, num_pairs: int, num_segments: int) -> None:
    with pytest.raises(ValueError, match="confirm nothing"):
        _latencies(D=1.0, A=1.0).confirm(finalists, num_pairs=num_pairs, num_segments=num_segments)


def _words(text: str, **options: object) -> dict[str, list[int]]:
    return {"input_ids": [int(word) for word in text.split()]}


def test_segments_are_cut_from_the_text_kept_for_confirming() -> None:
    texts = [" ".join(str(100 * n + i) for i in range(40)) for n in range(4)]
    workload = Workload("w", "", tuple(Passage(str(n), "task", text) for n, text in enumerate(texts)))
    cut = partial(segments, workload, _words, prompt_tokens=3, output_tokens=2)
    found = cut(num_requests=3, num_segments=3)
    assert [len(segment) for segment in found] == [3, 3, 3]
    starts = [request.prompt_ids[0] for segment in found for request in segment]
    assert len(set(starts)) == 9 and all(start // 100 in (1, 3) for start in starts)
    assert len(cut(num_requests=3, num_segments=100)) == 5  # of 16 requests
    with pytest.raises(WorkloadError, match="text for 16 of 17"):
        cut(num_requests=17, num_segments=1)
