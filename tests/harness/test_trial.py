"""Trials in processes of their own: every way in which one can end, and that nothing is left behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from harness.search import child
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


def exceed_address_space(_: None) -> dict[str, Any]:
    import numpy as np

    used_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = used_pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return {"sum": float(np.ones(1 << 28).sum())}


def interrupted_but_goes_on(_: None) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGINT)
    os.killpg(os.getpid(), signal.SIGINT)
    return {"goes on": True}


def no_json(_: None) -> dict[str, Any]:
    return {"value": object()}


def garbage_for_an_answer(ending: bytes) -> dict[str, Any]:
    assert child._pipe is not None
    child._pipe.sendall(b"\xff{" * 4000 + ending)
    time.sleep(600 if ending else 0)
    os._exit(0)


def half_an_answer(_: None) -> dict[str, Any]:
    assert child._pipe is not None
    child._pipe.sendall(b'{"kind": "ok", "message')
    time.sleep(600)
    return {}


def count_up(numbers: int) -> dict[str, Any]:
    for number in range(numbers):
        child.report({"number": number})
    return {"numbers": numbers}


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
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(path).write_text(f"{os.getpid()} {grandchild.pid}")
    time.sleep(600)
    return {}


def report_and_hang(path: str) -> dict[str, Any]:
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(path).write_text(f"{os.getpid()} {grandchild.pid}")
    count_up(3)
    time.sleep(600)
    return {}


SPUN_S = 0.05  # more than a tick of the kernel's clock


def spin(_: None) -> dict[str, Any]:
    while time.process_time() < 2 * SPUN_S:
        pass
    child.report({"spun": True})
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
        (exceed_address_space, Kind.OUT_OF_MEMORY, "allocate"),
        (no_json, Kind.ERROR, "not JSON serializable"),
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
    monkeypatch.setattr(child, "_oom_kills", lambda: next(counts))
    assert runner.run(killed, None, 60).kind is Kind.OUT_OF_MEMORY


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_garbage_instead_of_an_answer_is_an_error(
    runner: TrialRunner, monkeypatch: pytest.MonkeyPatch, ending: bytes
) -> None:
    monkeypatch.setattr(child, "_EXIT_GRACE_S", 0.2)
    outcome = runner.run(garbage_for_an_answer, ending, 60)
    assert outcome.kind is Kind.ERROR and "something else than a result" in outcome.message


@pytest.mark.parametrize("line", [b"3", b"null", b'"ok"', b'{"kind": "fine"}', b'{"kind": "ok"}', b'{"progress": 1}'])
def test_what_is_no_answer_is_an_error(line: bytes) -> None:
    found = child._read(line)
    assert isinstance(found, Outcome) and found.kind is Kind.ERROR


def test_garbage_without_end_is_not_collected_for_ever(runner: TrialRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_MOST_LINE_BYTES", 1000)
    assert runner.run(garbage_for_an_answer, b"", 60).kind is Kind.ERROR


def test_an_answer_that_never_ends_is_a_timeout(runner: TrialRunner) -> None:
    assert runner.run(half_an_answer, None, 1).kind is Kind.TIMEOUT


def test_reports_come_in_order_and_before_the_answer(runner: TrialRunner) -> None:
    seen: list[dict[str, Any]] = []

    def watch(progress: dict[str, Any]) -> str:
        seen.append(progress)
        return ""

    assert runner.run(count_up, 500, 60, watch).result == {"numbers": 500}
    assert [one["number"] for one in seen] == list(range(500))
    assert runner.run(count_up, 500, 60).result == {"numbers": 500}  # nobody need listen


def test_a_trial_that_is_not_worth_finishing_is_ended(runner: TrialRunner, tmp_path: Path) -> None:
    outcome = runner.run(
        report_and_hang, str(tmp_path / "pids"), 60, lambda progress: "too slow" if progress["number"] == 2 else ""
    )
    assert (outcome.kind, outcome.message, outcome.result) == (Kind.HOPELESS, "too slow", {"number": 2})
    assert _wait_until_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


def test_reports_outside_of_a_trial_go_nowhere() -> None:
    assert count_up(3) == {"numbers": 3}


def test_the_cpu_time_of_a_trial_is_known_however_it_ends(runner: TrialRunner, tmp_path: Path) -> None:
    done, stopped = runner.run(spin, None, 60), runner.run(spin, None, 60, lambda progress: "enough")
    assert (done.kind, stopped.kind) == (Kind.OK, Kind.HOPELESS)
    for outcome in (done, stopped):
        assert outcome.cpu_s >= SPUN_S
        assert outcome.cpu_wait_share is None or 0 <= outcome.cpu_wait_share < 1


def test_ctrl_c_does_not_reach_a_trial(runner: TrialRunner) -> None:
    assert runner.run(interrupted_but_goes_on, None, 60).result == {"goes on": True}


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
