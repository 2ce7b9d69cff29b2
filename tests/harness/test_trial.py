"""Trials in processes of their own: every way in which one can end, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from harness.search import trial
from harness.search.outcome import Kind, Outcome
from harness.search.trial import TrialRunner, bare_process
from runtime.errors import BudgetError, CheckpointError

PRELOADED = {"torch", "transformers", "runtime.build", "harness.measure.runner"}


def double(value: int) -> dict[str, Any]:
    return {"value": 2 * value, "session": os.getsid(0), "pid": os.getpid(), "is_warm": set(sys.modules) >= PRELOADED}


def resident_files(_: None) -> dict[str, Any]:
    def of(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile:"))

    return {"own": of(os.getpid()), "server": of(os.getppid())}


def run_out(_: None) -> dict[str, Any]:
    raise MemoryError


def over_budget(_: None) -> dict[str, Any]:
    raise BudgetError("no slot fits")


def allocate_in_torch(_: None) -> dict[str, Any]:
    import torch

    return {"rows": len(torch.empty(1 << 60))}


def user_mistake(_: None) -> dict[str, Any]:
    raise CheckpointError("the shard is missing")


def stumble(_: None) -> dict[str, Any]:
    return {"x": [][1]}


def segfault(_: None) -> dict[str, Any]:
    print("about to fall", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def leave(_: None) -> dict[str, Any]:
    os._exit(3)


def killed(_: None) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def hang(path: str) -> dict[str, Any]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(path).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
    return {}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TrialRunner:
    return TrialRunner(tmp_path_factory.mktemp("trial") / "trials.log")


def test_the_result_comes_back_from_a_warm_process_with_a_session_of_its_own(runner: TrialRunner) -> None:
    outcome = runner.run(double, 21, 60)
    assert outcome.kind is Kind.OK and outcome.result is not None
    assert outcome.result["value"] == 42 and outcome.result["is_warm"]
    assert outcome.result["session"] == outcome.result["pid"] != os.getpid()


@pytest.mark.parametrize(
    ("work", "kind", "said"),
    [
        (run_out, Kind.OUT_OF_MEMORY, "MemoryError"),
        (over_budget, Kind.OUT_OF_MEMORY, "no slot fits"),
        (allocate_in_torch, Kind.OUT_OF_MEMORY, "RuntimeError"),
        (user_mistake, Kind.ERROR, "the shard is missing"),
        (stumble, Kind.ERROR, "IndexError"),
        (segfault, Kind.CRASH, "SIGSEGV; it last said: about to fall"),
        (killed, Kind.CRASH, "SIGKILL"),
        (leave, Kind.CRASH, "exit code 3"),
    ],
)
def test_every_way_to_fail_has_its_outcome(runner: TrialRunner, work: Any, kind: Kind, said: str) -> None:
    outcome = runner.run(work, None, 60)
    assert outcome.kind is kind and said in outcome.message
    assert runner.run(double, 1, 60).kind is Kind.OK


def test_killed_by_the_kernel_for_memory_is_told_from_killed(
    runner: TrialRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([7, 8])
    monkeypatch.setattr(trial, "_oom_kills", lambda: next(counts))
    assert runner.run(killed, None, 60).kind is Kind.OUT_OF_MEMORY


def test_garbage_instead_of_a_result_is_an_error() -> None:
    assert trial._outcome(b"\xff{", 0, False, "").kind is Kind.ERROR
    assert trial._outcome(b'{"kind": "fine"}', 0, False, "").kind is Kind.ERROR


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _wait_until_gone(pids: list[int]) -> bool:
    for _ in range(100):
        if all(_is_gone(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_a_trial_that_hangs_is_ended_with_its_children(runner: TrialRunner, tmp_path: Path) -> None:
    outcome = runner.run(hang, str(tmp_path / "pids"), 3)
    assert outcome.kind is Kind.TIMEOUT and "longer than 3 s" in outcome.message
    assert _wait_until_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


def test_ctrl_c_ends_the_trial_and_is_passed_on(runner: TrialRunner, tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def interrupt() -> None:
        while not pids.exists() or not pids.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        runner.run(hang, str(pids), 60)
    thread.join()
    assert _wait_until_gone([int(pid) for pid in pids.read_text().split()])
    assert runner.run(double, 1, 60).kind is Kind.OK


def test_a_bare_process_has_the_engine_imported(runner: TrialRunner) -> None:
    result = runner.run(bare_process, None, 60).result
    assert result is not None and result["resident_bytes"] > 100e6


def test_a_trial_is_as_large_as_a_process_that_imported_everything_itself(runner: TrialRunner) -> None:
    result = runner.run(resident_files, None, 60).result
    assert result is not None and 0.9 * result["server"] <= result["own"] <= 1.2 * result["server"]


def test_a_trial_that_is_not_ok_has_no_measurement() -> None:
    with pytest.raises(ValueError, match="timeout"):
        _ = Outcome(Kind.TIMEOUT).measurement
