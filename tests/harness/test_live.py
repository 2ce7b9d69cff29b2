"""Contenders that stay loaded: segments, and every way in which one can fail."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.measure.workload import TokenRequest
from harness.search import live as live_module
from harness.search.live import LiveTrial
from harness.search.outcome import Kind
from harness.search.trial import TrialRunner, TrialSpec

OVERRIDES = {"cache.slots": 6, "cache.policy": "lru", "prefetch.depth": 0}


def _requests(number: int, first: int = 0) -> tuple[TokenRequest, ...]:
    text = [[(first + 7 * one + 3 * position) % 4000 for position in range(12)] for one in range(number)]
    return tuple(TokenRequest(f"{first}-{one}", "t", tuple(ids[:8]), tuple(ids[8:])) for one, ids in enumerate(text))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TrialRunner:
    return TrialRunner(tmp_path_factory.mktemp("live") / "trials.log")


@pytest.fixture
def spec(tiny_checkpoint: Path) -> TrialSpec:
    return TrialSpec(str(tiny_checkpoint), OVERRIDES, _requests(1), concurrency=2)


def _pid(live: LiveTrial) -> int:
    assert live._child is not None and live._child._process.pid is not None
    return live._child._process.pid


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
def test_two_contenders_in_turn_measure_segment_after_segment(runner: TrialRunner, spec: TrialSpec) -> None:
    other = TrialSpec(spec.model, {**OVERRIDES, "cache.slots": 16}, (), spec.concurrency)
    with LiveTrial(runner, spec, 60.0) as one, LiveTrial(runner, other, 60.0) as two:
        pids = [_pid(one), _pid(two)]
        outcomes = [live.run(_requests(3, first)) for first in (100, 200) for live in (one, two)] + [
            one.run(_requests(3, 100))
        ]
        assert [outcome.kind for outcome in outcomes] == [Kind.OK] * 5
        assert all(outcome.wall_s > 0 and outcome.cpu_s > 0 for outcome in outcomes)
        measured = [outcome.measurement for outcome in outcomes]
        assert not any(_is_gone(pid) for pid in pids)
    assert all(_is_gone(pid) for pid in pids)
    digests = [each.tokens_sha256 for each in measured]
    assert digests[0] == digests[1] == digests[4] != digests[2] == digests[3]
    assert [each.slots for each in measured] == [6, 16, 6, 16, 6]
    # Counters are of the segment, the cache and the peak of the process.
    assert measured[0].stats["num_tokens"] == measured[2].stats["num_tokens"] == 3 * 11
    assert measured[1].stats["num_misses"] > measured[3].stats["num_misses"]
    assert measured[4].peak_memory_bytes >= measured[0].peak_memory_bytes > 100e6


def test_what_cannot_be_loaded_is_an_outcome_of_every_segment(runner: TrialRunner, spec: TrialSpec) -> None:
    missing = TrialSpec(spec.model + "-gone", {}, (), 1)
    with LiveTrial(runner, missing, 60.0) as live:
        first, second = live.run(_requests(1)), live.run(_requests(1))
    assert first.kind is Kind.ERROR and "-gone" in first.message and second is first


def test_a_user_s_mistake_in_a_segment_is_one_outcome(runner: TrialRunner, spec: TrialSpec) -> None:
    with LiveTrial(runner, spec, 60.0) as live:
        outcome = live.run([TokenRequest("empty", "t", (), (1, 2))])
    assert outcome.kind is Kind.ERROR and "empty" in outcome.message


def test_a_killed_contender_is_a_crash_and_stays_one(runner: TrialRunner, spec: TrialSpec) -> None:
    with LiveTrial(runner, spec, 60.0) as live:
        assert live.run(_requests(1)).kind is Kind.OK
        os.kill(_pid(live), signal.SIGKILL)
        outcome = live.run(_requests(1))
        assert outcome.kind is Kind.CRASH and "SIGKILL" in outcome.message and live.run(_requests(1)) is outcome


def test_a_contender_that_hangs_is_ended(runner: TrialRunner, spec: TrialSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    with LiveTrial(runner, spec, 60.0) as live:
        pid = _pid(live)
        os.kill(pid, signal.SIGSTOP)
        live._timeout_s = 0.5
        assert live.run(_requests(1)).kind is Kind.TIMEOUT and _is_gone(pid)
        assert live.run(_requests(1)).kind is Kind.TIMEOUT


def test_a_question_that_is_not_taken_is_a_timeout(runner: TrialRunner, spec: TrialSpec) -> None:
    with LiveTrial(runner, spec, 60.0) as live:
        os.kill(_pid(live), signal.SIGSTOP)
        live._timeout_s = 0.5
        outcome = live.run([TokenRequest("long", "t", tuple(range(1 << 20)), (1,))])
    assert outcome.kind is Kind.TIMEOUT and "took no question" in outcome.message


def _hang(spec: TrialSpec) -> dict[str, Any]:
    time.sleep(600)
    return {}


def _run_out(spec: TrialSpec) -> dict[str, Any]:
    raise MemoryError


def test_loading_may_run_out_of_memory_or_time(
    runner: TrialRunner, spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for work, timeout_s, kind in ((_run_out, 60.0, Kind.OUT_OF_MEMORY), (_hang, 0.5, Kind.TIMEOUT)):
        monkeypatch.setattr(live_module, "serve_segments", work)
        with LiveTrial(runner, spec, timeout_s) as live:
            assert live.run(_requests(1)).kind is kind


def test_ctrl_c_ends_every_contender(runner: TrialRunner, spec: TrialSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    def interrupt(lives: Sequence[LiveTrial]) -> None:
        pids.extend(map(_pid, lives))
        os.kill(pids[-1], signal.SIGSTOP)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        lives[-1].run(_requests(1))

    with pytest.raises(KeyboardInterrupt), LiveTrial(runner, spec, 60.0) as one, LiveTrial(runner, spec, 60.0) as two:
        interrupt((one, two))
    assert all(_is_gone(pid) for pid in pids)


def test_ctrl_c_while_loading_ends_the_contender(
    runner: TrialRunner, spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "serve_segments", _hang)
    live = LiveTrial(runner, spec, 60.0)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), live:
        pass
    assert live._child is not None and live._child._process.exitcode is not None


def test_outside_of_its_block_nothing_runs(runner: TrialRunner, spec: TrialSpec) -> None:
    with pytest.raises(ValueError, match="with block"):
        LiveTrial(runner, spec, 60.0).run(_requests(1))
