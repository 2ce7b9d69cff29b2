"""SIGTERM and Ctrl-C: once to finish what is under way, twice to stop at once; and what `runtime.generate` makes of
them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import EXPERTS, LAYERS, TOP_K, save_tiny

import runtime
from runtime import interrupt
from runtime.generate import main
from runtime.interrupt import StopRequest
from runtime.predictors.artifact import RoutingShape, read_artifact
from runtime.prompts import PromptRequest, RequestResult
from runtime.serving import run_batch
from runtime.trace import read_trace
from runtime.vocabulary import Pass

ROOT = Path(__file__).parents[1]
ENDLESS = 20_000
"""New tokens that no test waits for."""
TWO_AT_A_TIME = ["--set", "scheduler.kind=fifo", "--set", "scheduler.group=2", "--set", "cache.kv_bytes=32MiB"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2 * ENDLESS}))
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two at a time: the first is soon complete, the next two never, the last has no turn."""
    rows = [{"id": f"p{i}", "prompt": "a cat", "max_new_tokens": 4 if i == 0 else ENDLESS} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "prompts.jsonl"


# ---- the request itself


def test_once_asks_to_stop_and_twice_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "ECHO_S", 0.0)
    stop, said = StopRequest(), []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop.listening("that is done", say=said.append):
        assert not stop() and stop.exit_code == 0
        signal.raise_signal(signal.SIGINT)
        assert stop() and stop.exit_code == 130
        assert said == ["stopping when that is done; Ctrl-C again to stop now"]
        with pytest.raises(KeyboardInterrupt):
            stop.raise_if_set()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and len(said) == 1


def test_a_signal_that_comes_twice_at_once_counts_once() -> None:
    with StopRequest().listening("that is done", say=lambda text: None) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal is signal.SIGINT


@pytest.mark.parametrize(
    ("then", "code", "said"), [("raise KeyboardInterrupt", 130, "interrupted\n"), ("return 1", 1, "")]
)
def test_ctrl_c_while_a_command_is_torn_down_changes_nothing(then: str, code: int, said: str) -> None:
    """What is registered before the command runs, as libraries do, is torn down after it."""
    program = f"""
import atexit, os, signal, sys
from runtime.errors import cli_main

def tear_down():
    os.kill(os.getpid(), signal.SIGINT)
    print("torn down")

def run():
    {then}

atexit.register(tear_down)
sys.exit(cli_main(run))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "torn down\n", said)


def test_ctrl_c_within_what_a_string_runs_has_the_same_exit_code(tmp_path: Path) -> None:
    """As while a dataclass is imported."""
    lines = (
        "import sys",
        "from runtime.errors import cli_main",
        "sys.exit(cli_main(lambda: exec('raise KeyboardInterrupt')))",
    )
    (tmp_path / "interrupted_command.py").write_text("\n".join(lines))
    words = [sys.executable, "-m", "interrupted_command"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_another_thread_cannot_listen_and_goes_on() -> None:
    entered: list[bool] = []

    def work() -> None:
        with StopRequest().listening("that is done") as stop:
            entered.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [False]


def test_what_heeds_it_is_not_begun_any_more() -> None:
    stop = StopRequest()
    double = stop.heeded(lambda number: 2 * number)
    with stop.listening("that is done", say=lambda text: None):
        assert double(21) == 42
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            double(21)


def test_a_second_sigterm_ends_a_process_that_hangs() -> None:
    code = (
        "import signal, threading; from runtime.interrupt import StopRequest\n"
        "with StopRequest().listening('it is done', [signal.SIGTERM]):\n"
        "    print('ready', flush=True); threading.Event().wait()"
    )
    with _started([sys.executable, "-c", code]) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert "SIGTERM again to stop now" in process.stderr.readline()
        assert process.poll() is None
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            threading.Event().wait(0.05)
        assert process.returncode == -signal.SIGTERM and process.stderr.read() == ""


# ---- the command


def test_sigterm_in_the_middle_of_a_text(checkpoint: Path, tmp_path: Path) -> None:
    trace, learned = tmp_path / "trace.npz", tmp_path / "learned.json"
    options = ["--set", "predictor.kind=activation_matrix", "--trace", str(trace), "--save-predictor", str(learned)]
    with _generating(checkpoint, "--prompt", "a cat", "--max-new-tokens", str(ENDLESS), *options) as process:
        _read_tokens(process, 24)  # the prompt is told first
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert out.strip() and "Traceback" not in error and "stopping when the running pass ends" in error
    assert "TTFT" in error.splitlines()[-1] and "peak" in error.splitlines()[-1]
    assert 5 < len(read_trace(trace).experts) < ENDLESS
    assert read_artifact(learned, shape=RoutingShape(LAYERS, EXPERTS, TOP_K)).kind == "activation_matrix"


@pytest.mark.slow
def test_sigterm_in_the_middle_of_a_batch(checkpoint: Path, prompts: Path) -> None:
    with _generating(checkpoint, "--prompts", str(prompts), *TWO_AT_A_TIME, "--json") as process:
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "Traceback" not in error
    *rest, last = [json.loads(line) for line in out.splitlines()]
    _check_batch([first, *rest])
    assert last["summary"]["num_passes"] >= 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_json_says_that_a_text_was_interrupted(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], interrupted_by: Any, number: signal.Signals, code: int
) -> None:
    interrupted_by(number, in_pass=6)
    arguments = ["--model", str(checkpoint), "--prompt", "a cat", "--json", "--max-new-tokens"]
    assert main([*arguments, str(ENDLESS)]) == code
    cut = json.loads(capsys.readouterr().out)
    assert cut["interrupted"] is True and len(cut["token_ids"]) == 6 == cut["num_passes"]
    assert main([*arguments, "6"]) == 0  # its last pass was running anyway: nothing is missing
    whole = json.loads(capsys.readouterr().out)
    assert whole["interrupted"] is False and whole["token_ids"] == cut["token_ids"]


def test_ctrl_c_in_a_batch(
    checkpoint: Path, prompts: Path, capsys: pytest.CaptureFixture[str], interrupted_by: Any
) -> None:
    interrupted_by(signal.SIGINT, in_pass=9)
    batch = ["--prompts", str(prompts), *TWO_AT_A_TIME]
    assert main(["--model", str(checkpoint), *batch, "--json"]) == 130
    *rows, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    _check_batch(rows)
    assert last["summary"]["num_passes"] == 9
    assert main(["--model", str(checkpoint), *batch]) == 130
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("== ")]
    assert [("interrupted" in head) for head in heads] == [False, True, True, True]
    assert "interrupted before its first token" in heads[3]


def test_the_engine_leaves_handlers_alone_and_goes_on_after_a_stop(checkpoint: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    finished: list[RequestResult] = []
    with runtime.load(checkpoint) as engine:
        requests = [PromptRequest(name, (5, 6, 7), max_new_tokens=8) for name in "abc"]
        stopped = run_batch(
            engine, requests, stop=lambda: engine.stats().cache.num_passes >= 3, on_finish=finished.append
        )
        assert stopped.requests == tuple(finished)
        assert all(one.is_cancelled and 0 < one.num_tokens < 8 for one in stopped.requests)
        assert run_batch(engine, requests, stop=lambda: True).requests == ()
        whole = {one.id: one.token_ids for one in run_batch(engine, requests).requests}
        assert finished and all(whole[cut.id][: cut.num_tokens] == cut.token_ids for cut in finished)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_stop_is_heeded_while_nothing_has_arrived(checkpoint: Path) -> None:
    late = PromptRequest("late", (5, 6), max_new_tokens=2, arrival_s=3600.0)
    answers = iter([False, False, True])
    with runtime.load(checkpoint) as engine:
        assert run_batch(engine, [late], stop=lambda: next(answers)).requests == ()


def _check_batch(rows: list[dict[str, Any]]) -> None:
    """All four are told in order; those that were cut say so."""
    assert [row["id"] for row in rows] == ["p0", "p1", "p2", "p3"]
    assert [row["interrupted"] for row in rows] == [False, True, True, True]
    assert [len(rows[0]["token_ids"]), len(rows[3]["token_ids"])] == [4, 0]
    assert rows[3]["ttft_ms"] is None and rows[3]["text"] == ""
    assert 4 <= len(rows[1]["token_ids"]) < ENDLESS and len(rows[2]["token_ids"]) < ENDLESS


@pytest.fixture
def interrupted_by(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every engine that is loaded raise a signal in one of its passes."""

    def arrange(number: signal.Signals, in_pass: int) -> None:
        from runtime import build

        load = build.load

        def loaded(*args: Any, **options: Any) -> runtime.Engine:
            engine = load(*args, **options)

            def begun(passing: Pass) -> None:
                if engine.stats().cache.num_passes == in_pass:
                    signal.raise_signal(number)

            engine.on_pass(begun)
            return engine

        monkeypatch.setattr(build, "load", loaded)

    return arrange


def _generating(checkpoint: Path, *arguments: str) -> Any:
    return _started([sys.executable, "-m", "runtime.generate", "--model", str(checkpoint), *arguments])


class _started:
    """A process that is gone in the end."""

    def __init__(self, command: list[str]) -> None:
        self._command = command

    def __enter__(self) -> Any:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(self._command, cwd=ROOT, env=environment, **pipes)
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def _read_tokens(process: Any, count: int) -> str:
    """Wait for the first streamed characters."""
    text = process.stdout.read(count)
    assert len(text) == count, process.stderr.read()
    return str(text)
