"""Judging trials: tokens, hopeless ones, surroundings that change; once on real processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.hardware.readings import GpuState, Reading, Status
from harness.measure.environment import Conditions, Surroundings
from harness.measure.workload import TokenRequest
from harness.search.measurer import MAX_REPEATS, ON_DEMAND, Measurer
from harness.search.outcome import Kind, Measurement, Outcome, Record, Tried
from harness.search.racing import OPTIMISM, hopeless
from harness.search.space import Params, Setting, Space
from harness.search.trial import TrialRunner, TrialSpec
from runtime.profile import Profile

NUM_REQUESTS, NUM_TOKENS, PEAK = 12, 20, 400 << 20
SPACE = Space(Setting(64, 64, 8, num_cores=2), Profile.default())
DEFAULT = SPACE.default
SLOTS = next(knob for knob in SPACE.knobs if knob.name == "slots").choices
REQUESTS = tuple(TokenRequest(f"r{number}", "t", (1, 2), tuple(range(NUM_TOKENS))) for number in range(NUM_REQUESTS))

Tokens = list[list[int]]


def _params(**changed: Any) -> Params:
    wanted = {**DEFAULT, **changed}
    return SPACE.choose(lambda knob: wanted.get(knob.name, knob.default))


def truth(overrides: Mapping[str, Any]) -> Tokens:
    """What a sound engine predicts: groups and kernels round differently in one token of a hundred."""
    tokens = [[(31 * number + position) % 97 for position in range(NUM_TOKENS)] for number in range(NUM_REQUESTS)]
    if overrides["scheduler.group"] > 1:
        tokens[3][7], tokens[9][1] = 500, 501
    return tokens


def _measurement(tokens: Tokens, latency_ms: float, peak: int = PEAK) -> Measurement:
    digest = hashlib.sha256(repr(tokens).encode()).hexdigest()
    return Measurement(latency_ms, 5.0, 4.0, 100.0, digest, peak, 32, 1.0, 2.0, NUM_REQUESTS * NUM_TOKENS)


class Machine:
    """Stands in for TrialRunner: predicts by `tokens`, takes `latency_ms`, has `peak`; keeps what it ran."""

    def __init__(
        self,
        tokens: Callable[[Mapping[str, Any]], Tokens] = truth,
        latency_ms: Callable[[Mapping[str, Any]], float] = lambda overrides: 10.0,
        peak: Callable[[Mapping[str, Any]], int] = lambda overrides: PEAK,
    ) -> None:
        self.tokens, self.latency_ms, self.peak = tokens, latency_ms, peak
        self.ran: list[dict[str, Any]] = []
        self.fails: dict[int, Outcome] = {}

    def run(self, work: Any, spec: TrialSpec, timeout_s: float, watch: Callable[[dict[str, Any]], str]) -> Outcome:
        self.ran.append(spec.overrides)
        if (failure := self.fails.get(len(self.ran))) is not None:
            return failure
        tokens, latency, peak = (one(spec.overrides) for one in (self.tokens, self.latency_ms, self.peak))
        for request, predicted in zip(spec.requests, tokens, strict=True):
            progress = {
                "request": request.id,
                "latency_ms": latency,
                "predicted_ids": list(predicted),
                "peak_memory_bytes": peak,
            }
            if reason := watch(progress):
                return Outcome(Kind.HOPELESS, reason, progress)
        return Outcome(Kind.OK, result=_measurement(tokens, latency, peak).as_dict())


class Scripted(Surroundings):
    """Surroundings whose verdicts are given."""

    def __init__(self, *verdicts: str) -> None:
        super().__init__()
        self._verdicts = list(verdicts)

    def changed(self, now: Conditions) -> str:
        return self._verdicts.pop(0) if self._verdicts else ""


def measurer(machine: Any, surroundings: Surroundings | None = None, **changed: Any) -> Measurer:
    arguments = {"fixed": {}, "excess": lambda params: "", **changed}
    return Measurer(
        machine,
        "model",
        SPACE,
        requests={"search": REQUESTS, "confirm": REQUESTS},
        concurrency=8,
        timeout_s=60.0,
        surroundings=surroundings or Scripted(),
        **arguments,
    )


def test_what_will_not_fit_is_not_launched() -> None:
    machine = Machine()
    outcome = measurer(machine, excess=lambda params: "2 GB too much")(DEFAULT)
    assert (outcome.kind, outcome.message, machine.ran) == (Kind.TOO_LARGE, "2 GB too much", [])


def test_a_sound_engine_passes_with_every_group_and_kernel_and_keeps_no_tokens() -> None:
    measure = measurer(Machine())
    for params in (DEFAULT, _params(group=4), _params(decode="eager", threads=2), DEFAULT, _params(group=4)):
        outcome = measure(params)
        assert outcome.kind is Kind.OK and "predicted_ids" not in str(outcome)
        assert outcome.environment["foreign_share"] >= 0


def _garbage(overrides: Mapping[str, Any]) -> Tokens:
    return truth(overrides) if overrides["compute.decode"] == "gemv" else [[7] * NUM_TOKENS] * NUM_REQUESTS


def _drift(overrides: Mapping[str, Any]) -> Tokens:
    """Right at first, wrong in the last fifth: what a slot that is overwritten too early does."""
    tokens = truth(overrides)
    if overrides["scheduler.group"] == 4:
        tokens = [*tokens[: NUM_REQUESTS * 4 // 5], *([9] * NUM_TOKENS for _ in tokens[NUM_REQUESTS * 4 // 5 :])]
    return tokens


@pytest.mark.parametrize(
    ("tokens", "params", "said"),
    [
        (_garbage, _params(decode="eager"), "236 of 240 tokens are not those of the default"),
        (_drift, _params(group=4), "of 240 tokens are not those of the default"),
    ],
)
def test_garbage_and_drift_are_wrong_in_the_first_run_of_their_kernels(
    tokens: Callable[[Mapping[str, Any]], Tokens], params: Params, said: str
) -> None:
    measure = measurer(Machine(tokens))
    assert measure(DEFAULT).kind is Kind.OK
    outcome = measure(params)
    assert outcome.kind is Kind.WRONG_TOKENS and said in outcome.message
    assert measure(params).kind is Kind.WRONG_TOKENS  # it is no reference for itself


def test_one_token_that_differs_is_wrong_where_kernels_are_the_same() -> None:
    def unsound(overrides: Mapping[str, Any]) -> Tokens:
        tokens = truth(overrides)
        tokens[5][5] += overrides["prefetch.depth"] == 3
        return tokens

    measure = measurer(Machine(unsound))
    assert measure(DEFAULT).kind is Kind.OK
    outcome = measure(_params(depth=3))
    assert outcome.kind is Kind.WRONG_TOKENS and "as in the first run with the same kernels" in outcome.message
    assert measure(_params(depth=2)).kind is Kind.OK


def test_other_threads_need_not_give_the_same_bits() -> None:
    def rounding(overrides: Mapping[str, Any]) -> Tokens:
        tokens = truth(overrides)
        tokens[0][0] += overrides["compute.threads"] == 2
        return tokens

    measure = measurer(Machine(rounding))
    assert measure(DEFAULT).kind is measure(_params(threads=2)).kind is Kind.OK


def _records(*runs: tuple[Params, Outcome]) -> list[Record]:
    return [Record(number, params, outcome, reused=False) for number, (params, outcome) in enumerate(runs)]


def test_after_a_resume_the_default_is_run_again_for_its_tokens() -> None:
    first = measurer(Machine())
    records = _records(*((params, first(params)) for params in (DEFAULT, _params(group=4))))
    machine = Machine(_garbage)
    measure = measurer(machine)
    measure.remember(records)
    assert measure(_params(group=4, slots=SLOTS[0])).kind is Kind.OK and len(machine.ran) == 1
    assert measure(_params(decode="eager")).kind is Kind.WRONG_TOKENS
    assert [one["compute.decode"] for one in machine.ran] == ["gemv", "eager", "gemv"]
    measure(_params(decode="eager"))
    assert len(machine.ran) == 4


def test_remembered_tokens_are_to_be_met() -> None:
    measure = measurer(Machine())
    other = truth({"scheduler.group": 1})
    other[0][0] = 900
    measure.remember(_records((DEFAULT, Outcome(Kind.OK, result=_measurement(other, 10.0).as_dict()))))
    assert measure(DEFAULT).kind is Kind.WRONG_TOKENS


def test_a_default_that_does_not_run_is_replaced_by_what_runs_first() -> None:
    machine = Machine()
    measure = measurer(machine, excess=lambda params: "too large" if params == DEFAULT else "")
    assert measure(DEFAULT).kind is Kind.TOO_LARGE
    assert measure(_params(group=4)).kind is measure(_params(group=2)).kind is Kind.OK and len(machine.ran) == 2
    crashing = Machine()
    crashing.fails = {1: Outcome(Kind.CRASH), 3: Outcome(Kind.CRASH)}
    measure = measurer(crashing)
    assert measure(DEFAULT).kind is Kind.CRASH
    assert measure(_params(group=4)).kind is measure(_params(group=2)).kind is Kind.OK
    assert len(crashing.ran) == 4  # the default is tried once more, and then no longer


def test_a_scheduler_that_goes_by_the_clock_is_held_to_agreement_alone() -> None:
    calls: list[int] = []

    def grouped_by_chance(overrides: Mapping[str, Any]) -> Tokens:
        calls.append(1)
        tokens = truth(overrides)
        tokens[len(calls) % NUM_REQUESTS][0] = 777
        return tokens

    measure = measurer(Machine(grouped_by_chance), fixed={"scheduler.kind": "deadline"})
    space = Space(SPACE.setting, Profile.default().with_overrides({"scheduler.kind": "deadline"}), {"scheduler.kind"})
    measure._space = space
    assert [measure(space.default).kind for _ in range(3)] == [Kind.OK] * 3


def test_a_finalist_is_checked_against_the_same_kernels_on_demand() -> None:
    machine = Machine()
    measure = measurer(machine)
    finalist = _params(group=4, depth=2, policy="lfru")
    measure(DEFAULT), measure(finalist)
    assert measure.verify(finalist).kind is Kind.OK
    assert machine.ran[-1] == {**machine.ran[1], **ON_DEMAND} != machine.ran[1]
    assert measure.verify(_params(group=4, depth=3)).kind is Kind.OK and len(machine.ran) == 3  # the same reference


def test_an_error_that_all_configurations_share_is_found_on_demand() -> None:
    def unsound(overrides: Mapping[str, Any]) -> Tokens:
        tokens = truth(overrides)
        tokens[5][5] += overrides["prefetch.depth"] > 0
        return tokens

    measure = measurer(Machine(unsound))
    assert measure(_params(depth=2)).kind is Kind.OK
    outcome = measure.verify(_params(depth=2))
    assert outcome.kind is Kind.WRONG_TOKENS and "on demand give other tokens" in outcome.message


def test_verifying_what_has_not_run_runs_it_first() -> None:
    machine = Machine()
    measure = measurer(machine)
    measure(DEFAULT)
    assert measure.verify(_params(group=2)).kind is Kind.OK and len(machine.ran) == 3
    failing = Machine()
    failing.fails = {1: Outcome(Kind.CRASH, "fell"), 3: Outcome(Kind.TIMEOUT)}
    measure = measurer(failing)
    assert measure.verify(DEFAULT).message == "fell"
    assert [measure.verify(DEFAULT).kind for _ in range(2)] == [
        Kind.TIMEOUT,
        Kind.OK,
    ]  # it is asked again


def _tried(latency_ms: float, peak: int = PEAK) -> Tried:
    return Tried(DEFAULT, (_measurement([], latency_ms, peak),))


@pytest.mark.parametrize(
    ("latencies", "num_requests", "peak", "rivals", "is_hopeless"),
    [
        ([20.0] * 3, 12, PEAK, [_tried(10.0)], True),
        ([20.0] * 2, 8, PEAK, [_tried(10.0)], False),  # too few requests
        ([20.0] * 3, 13, PEAK, [_tried(10.0)], False),  # not a quarter of them
        ([20.0] * 4, 13, PEAK, [_tried(10.0)], True),
        ([10.0 / OPTIMISM] * 3, 12, PEAK, [_tried(10.0)], False),  # may still be as fast
        ([60.0, 9.0, 9.0], 12, PEAK, [_tried(10.0)], False),  # the first finds the cache cold
        ([20.0] * 3, 12, PEAK // 2, [_tried(10.0)], False),  # slower, but smaller
        ([20.0] * 3, 12, int(PEAK * 0.995), [_tried(10.0)], True),  # as large, within what a peak varies by
        ([20.0] * 3, 12, PEAK // 2, [_tried(10.0), _tried(12.0, PEAK // 2)], True),
        ([20.0] * 12, 12, PEAK, [], False),
    ],
)
def test_when_a_trial_is_hopeless(
    latencies: Sequence[float], num_requests: int, peak: int, rivals: Sequence[Tried], is_hopeless: bool
) -> None:
    assert bool(hopeless(latencies, num_requests, peak, rivals)) == is_hopeless


def _slow_when_deep(overrides: Mapping[str, Any]) -> float:
    return 30.0 if overrides["prefetch.depth"] == 3 else 10.0


def test_a_hopeless_trial_is_stopped_and_says_how_far_it_came() -> None:
    measure = measurer(Machine(latency_ms=_slow_when_deep))
    measure(DEFAULT)
    outcome = measure(_params(depth=3))
    assert outcome.kind is Kind.HOPELESS and "3 of 12 requests: a median of 30.0 ms" in outcome.message
    assert outcome.result == {"latencies_ms": [30.0] * 3, "num_requests": 12}


def test_what_is_measured_to_its_end() -> None:
    slow = _params(depth=3)
    alone = measurer(Machine(latency_ms=_slow_when_deep))
    assert alone(slow).kind is alone(slow).kind is Kind.OK  # nothing is better but itself
    measure = measurer(Machine(latency_ms=lambda overrides: 40.0 - _slow_when_deep(overrides)))
    assert measure(slow).measurement.latency_ms_p50 == 10.0
    assert measure(DEFAULT).measurement.latency_ms_p50 == 30.0  # the default, always
    other = measurer(Machine(latency_ms=_slow_when_deep))
    other(DEFAULT)
    assert other(slow, "confirm").kind is Kind.OK


def test_remembered_runs_are_rivals_however_often_they_are_told() -> None:
    measure = measurer(Machine(latency_ms=lambda overrides: 30.0))
    good = Outcome(Kind.OK, result=_measurement(truth({"scheduler.group": 1}), 10.0).as_dict())
    for _ in range(2):
        measure.remember(_records((DEFAULT, good), (_params(depth=2), Outcome(Kind.CRASH))))
    assert measure(_params(depth=3)).kind is Kind.HOPELESS


def test_a_trial_in_changed_surroundings_is_repeated() -> None:
    machine = Machine()
    outcome = measurer(machine, Scripted("others took 60% of the cores", ""))(DEFAULT)
    assert outcome.kind is Kind.OK and len(machine.ran) == 2 and outcome.environment["num_repeats"] == 1


def test_surroundings_that_stay_changed_say_nothing_about_the_configuration() -> None:
    machine = Machine()
    measure = measurer(machine, Scripted(*["the GPU was throttled: power brake"] * (1 + MAX_REPEATS)))
    outcome = measure(DEFAULT)
    assert outcome.kind is Kind.ENVIRONMENT and "power brake" in outcome.message and outcome.result is None
    assert len(machine.ran) == 1 + MAX_REPEATS
    assert measure(_params(depth=3)).kind is Kind.OK  # what was seen in them is no reference


def test_a_slow_neighbour_makes_no_trial_hopeless_or_late() -> None:
    slow = iter([10.0, 30.0, 10.0])
    machine = Machine(latency_ms=lambda overrides: next(slow))
    measure = measurer(machine, Scripted("", "others took 60% of the cores", "", "others took 60% of the cores"))
    measure(DEFAULT)
    assert measure(_params(depth=3)).measurement.latency_ms_p50 == 10.0
    machine.fails, machine.latency_ms = {4: Outcome(Kind.TIMEOUT)}, lambda overrides: 10.0
    assert measure(_params(depth=2)).kind is Kind.OK and len(machine.ran) == 5


def test_a_crash_is_the_configuration_s_own() -> None:
    machine = Machine()
    machine.fails = {1: Outcome(Kind.CRASH, "ended by SIGSEGV")}
    assert measurer(machine, Scripted("others took 60% of the cores"))(DEFAULT).kind is Kind.CRASH


def _gpu(status: Status) -> GpuState:
    missing: Reading[Any] = Reading(None, status)
    return GpuState("GPU-1", status, missing, missing, missing, missing, missing, missing, missing)


@pytest.mark.parametrize("num_reads", [1, 4])
def test_a_gpu_that_is_lost_ends_the_trial_and_is_not_tried_again(num_reads: int) -> None:
    reads: list[int] = []

    def state() -> GpuState:
        reads.append(1)
        return _gpu(Status.OK if len(reads) <= num_reads else Status.GPU_LOST)

    machine = Machine()
    if num_reads == 1:
        machine.fails = {1: Outcome(Kind.ERROR, "CUDA error: unspecified launch failure")}
    outcome = measurer(machine, Surroundings(state))(DEFAULT)
    assert outcome.kind is Kind.ENVIRONMENT and outcome.message == "GPU lost: NVML says GPU lost"
    assert len(machine.ran) == 1 and outcome.result is None


def test_trials_for_real(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A group in few slots, in its process, agrees with the default and to the bit with itself on demand."""
    text = [[(7 * number + 3 * position) % 4000 for position in range(14)] for number in range(4)]
    requests = tuple(TokenRequest(str(number), "t", tuple(ids[:8]), tuple(ids[8:])) for number, ids in enumerate(text))
    space = Space(Setting(16, 16, 2), Profile.default())
    measure = Measurer(
        TrialRunner(tmp_path / "log"),
        str(tiny_checkpoint),
        space,
        {},
        {"search": requests, "confirm": requests},
        2,
        60.0,
        lambda params: "",
        Scripted(),
    )
    grouped = space.choose(lambda knob: {"slots": 8, "group": 2}.get(knob.name, knob.default))
    outcome, verified = measure(grouped, "confirm"), measure.verify(grouped, "confirm")
    assert (outcome.kind, verified.kind) == (Kind.OK, Kind.OK), (outcome, verified)
    assert outcome.measurement.tokens_sha256 == verified.measurement.tokens_sha256
    assert outcome.measurement.num_tokens == 24 and outcome.measurement.slots == 8
    assert outcome.cpu_s > 0 and 0 <= outcome.environment["foreign_share"] <= 1
