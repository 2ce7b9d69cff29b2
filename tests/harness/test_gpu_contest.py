"""How the time of a GPU bench is shared: processes made up here, on a clock that their answers move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from harness.demo.widen import bundled_model
from harness.measure.blocks import PROBE_TOKENS
from harness.measure.gpu_contest import GpuContest
from harness.measure.gpu_runs import GpuWorkload
from harness.measure.gpu_visits import visits
from harness.measure.process import ContenderFailed, Spec
from harness.measure.workload import TokenRequest
from runtime.facts import describe

REQUEST = TokenRequest("r", "t", tuple(range(16)), tuple(range(64)))
WORKLOAD = GpuWorkload((REQUEST,) * 7, tuple(range(200)))
TOKEN_S = {"gpu_reference": 0.01, "gpu_engine": 0.02, "gpu_synchronous": 0.03, "gpu_plain": 0.02, "gpu_accelerate": 0.6}
START_S, OPEN_S = 8.0, 2.0


class Made:
    """Answers after as long as a real one would take; dies when its time for an answer is over."""

    peak_bytes = None

    def __init__(self, spec: Spec, house: House) -> None:
        self._kind, self._house = spec.kind, house
        self._is_dead = False
        self._is_engine = spec.kind in ("gpu_engine", "gpu_synchronous")
        self.facts: dict[str, Any] = {"gpu": {"name": "none"}}

    def ask(self, op: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        answer, seconds = getattr(self, f"_{op}", lambda **_: ({}, 0.1))(**arguments)
        self._house.now_s += min(seconds, timeout_s)
        if self._is_dead or seconds > timeout_s:
            self._is_dead = True
            raise ContenderFailed(f"no answer within {timeout_s:.0f} s", out_of_memory=False)
        found: dict[str, Any] = answer
        return found

    def _open(self, overrides: dict[str, Any]) -> tuple[dict[str, Any], float]:
        return ({"slots": 64, "slots_bytes": 1} if self._is_engine else {}), OPEN_S

    def _memory_rate(self) -> tuple[dict[str, Any], float]:
        return {"memory_bytes_per_s": 1e12}, 0.1

    def _replay_loads(self) -> tuple[dict[str, Any], float]:
        return {"replay_s": 0.3}, 0.3

    def _run(self, prompt_ids: list[int], output_ids: list[int]) -> tuple[dict[str, Any], float]:
        steps = len(output_ids) - 1
        answer: dict[str, Any] = {"decode_s": steps * TOKEN_S[self._kind], "decode_tokens": steps, "ttft_ms": 1.0}
        answer["predicted_ids"] = output_ids
        if self._is_engine:
            counts = {"num_loads": 9, "num_bytes": 90, "num_lookups": 20, "num_hits": 11}
            answer |= {"stats": {**counts, "busy_s": 0.4, "stall_s": 0.1}, "needed_loads": 9}
        return answer, (steps + 1) * TOKEN_S[self._kind]

    def _demands(self, prompt_ids: list[int], output_ids: list[int]) -> tuple[dict[str, Any], float]:
        return {"demands": [[1]] * 8 * (len(output_ids) - 1)}, len(output_ids) * TOKEN_S[self._kind]

    def _memory(self) -> tuple[dict[str, Any], float]:
        return {"peak_gpu_bytes": 5, "peak_reserved_gpu_bytes": 6, "peak_host_bytes": 7, "held_gpu_bytes": 4}, 0.1

    def _prefill(self, prompt_ids: list[int]) -> tuple[dict[str, Any], float]:
        return {"repeats": [{"prefill_s": 0.1}], "logits_sha256": "a"}, 0.5


class House:
    """Time, and the processes that run."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.running: list[str] = []
        self.most_running = 0

    @contextmanager
    def start(self, name: str, spec: Spec, timeout_s: float) -> Iterator[Made]:
        self.now_s += START_S
        self.running.append(name)
        self.most_running = max(self.most_running, len(self.running))
        try:
            yield Made(spec, self)
        finally:
            self.running.remove(name)


def run(budget_s: float, profiled: Sequence[str] = ()) -> tuple[GpuContest, House]:
    house = House()
    contest = GpuContest(
        "model",
        "cuda:0",
        describe(bundled_model()),
        WORKLOAD,
        end_s=budget_s,
        on_entry=lambda name: None,
        on_profile=lambda name, text: None,
        profiled=profiled,
        start=house.start,
        clock=lambda: house.now_s,
    )
    contest.run(list(visits(4)))
    return contest, house


def test_nine_minutes_are_enough_for_all_blocks_of_all_systems() -> None:
    contest, house = run(510.0)
    assert not contest.left_out and house.now_s < 510.0 and not house.running
    measured = {name: len(one["blocks"]) for name, one in contest.systems.items() if name != "resident"}
    assert measured == {one.name: min(6, one.most_blocks) for one in visits(4)}
    assert not any("error" in one for one in contest.systems.values())
    assert contest.systems["resident"]["tokens_per_s"]["count"] == sum(measured.values())
    shortened = [block["decode_tokens"] for block in contest.systems["accelerate"]["blocks"]]
    assert all(5 <= tokens < 20 for tokens in shortened)
    assert house.most_running == 3  # the resident one, the offloaded one between its visits, and another


@pytest.mark.parametrize("budget_s", [60.0, 120.0, 200.0])
def test_with_less_time_the_most_telling_come_first(budget_s: float) -> None:
    contest, house = run(budget_s)
    names = [one.name for one in visits(4)]
    made = [name for name in contest.systems if name != "resident"]
    assert made == names[: len(made)] and contest.left_out == names[len(made) :] and contest.left_out
    assert house.now_s <= budget_s + START_S and not house.running
    assert "error" not in contest.systems["25 %"] and len(contest.systems["25 %"]["blocks"]) >= 2


def test_what_is_cut_off_keeps_what_was_measured_and_nobody_has_failed() -> None:
    cut = set[str]()
    for budget_s in range(20, 120, 2):
        contest, house = run(float(budget_s))
        assert house.now_s <= budget_s + START_S and not house.running
        assert not any("error" in one for name, one in contest.systems.items() if name != "resident")
        for name, one in contest.systems.items():
            if "cut_off" in one:
                cut.add(name)
                assert one["tokens_per_s"]["count"] == len(one["blocks"]) >= 1
    assert cut & {"25 %", "accelerate"}


def test_decode_figures_outlive_a_prefill_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = Made._prefill

    def _prefill(self: Made, prompt_ids: list[int]) -> tuple[dict[str, Any], float]:
        if self._kind == "gpu_engine":
            raise ContenderFailed("CUDA out of memory", out_of_memory=True)
        return prefill(self, prompt_ids)

    monkeypatch.setattr(Made, "_prefill", _prefill)
    contest, _ = run(510.0)
    quarter = contest.systems["25 %"]
    assert quarter["error"] == "CUDA out of memory" and len(quarter["blocks"]) == 6 and "memory" in quarter
    assert "error" not in contest.systems["accelerate"] and not contest.left_out


@pytest.mark.parametrize("hangs", [False, True])
def test_a_profiler_that_does_not_run_costs_nothing_else(monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    def _profile(self: Made, **_: Any) -> tuple[dict[str, Any], float]:
        if hangs:
            return {"text": ""}, 1e9
        raise ContenderFailed("CUPTI is not there", out_of_memory=False)

    monkeypatch.setattr(Made, "_profile", _profile, raising=False)
    contest, house = run(510.0, profiled=("resident", "100 %"))
    told = {contest.systems[name]["profile_error"] for name in ("resident", "100 %")}
    assert told == {"no answer within 40 s" if hangs else "CUPTI is not there"} and house.now_s < 510.0
    assert all("ladder" in contest.systems[name] for name in ("25 %", "100 %")) and not contest.left_out
    assert not any("error" in one for one in contest.systems.values())


def test_a_resident_model_that_dies_between_visits_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Made._run

    def _run(self: Made, **what: Any) -> tuple[dict[str, Any], float]:
        is_warming = len(what["output_ids"]) == PROBE_TOKENS
        if self._kind == "gpu_reference" and is_warming and self._house.now_s > 100:
            raise ContenderFailed("ended with code -11", out_of_memory=False)
        return plain(self, **what)

    monkeypatch.setattr(Made, "_run", _run)
    contest, _ = run(510.0)
    assert "ended with code -11" in contest.systems["resident"]["error"] and not contest.left_out
    others = [one for name, one in contest.systems.items() if name != "resident"]
    assert all(len(one["blocks"]) >= 3 and "error" not in one for one in others)
    assert "ladder" in contest.systems["25 %"] and "ladder" not in contest.systems["50 %"]


def test_a_prefill_is_held_against_the_resident_models_of_the_same_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    def _prefill(self: Made, prompt_ids: list[int]) -> tuple[dict[str, Any], float]:
        repeat = {"prefill_s": 0.1 + self._house.now_s, "num_loads": 2, "num_bytes": 8, "needed_loads": 2}
        return {"repeats": [{**repeat, "replay_s": 0.1}], "logits_sha256": "a"}, 0.5

    monkeypatch.setattr(Made, "_prefill", _prefill)
    found = run(510.0)[0].systems["50 %"]["prefill"]
    assert found["resident_seconds"] == pytest.approx(found["seconds"] + 0.5) and found["equals_resident"]


def test_a_process_that_hangs_costs_its_own_visit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Made._open

    def _open(self: Made, overrides: dict[str, Any]) -> tuple[dict[str, Any], float]:
        answer, seconds = opened(self, overrides)
        return answer, 1e9 if self._kind == "gpu_accelerate" else seconds

    monkeypatch.setattr(Made, "_open", _open)
    contest, house = run(510.0)
    assert contest.systems["accelerate"]["error"] == "no answer within 120 s"
    assert not contest.left_out and house.now_s < 510.0 and len(contest.systems["50 %"]["blocks"]) == 6
