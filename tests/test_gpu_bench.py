"""The bench of a GPU, on streams and counters that this machine has: what it measures, writes and says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from late_streams import LateStreams, compute_late

from harness import gpu_bench
from harness.measure import contenders, gpu_contest, gpu_runs, gpu_systems, process
from harness.measure.process import ContenderFailed, Spec
from harness.report.gpu import markdown
from runtime import build_tiers, devices
from runtime.devices import CPU
from runtime.transfer.cuda import Lane

SIZES = {"shape": "64KiB", "requests": "2", "prompt-tokens": "16", "output-tokens": "7", "long-tokens": "40"}
ARGUMENTS = [word for name, value in SIZES.items() for word in (f"--{name}", value)]


class Gpu:
    """What the command is told it runs on; the systems compute on the CPU."""

    type = "cuda"


class InProcess:
    """A contender that is asked without a process; what it is sent and answers is JSON all the same."""

    peak_bytes = None

    def __init__(self, spec: Spec) -> None:
        self._contender: Any = contenders.build(asdict(spec))
        self.facts: dict[str, Any] = self._contender.facts()

    def ask(self, op: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        assert timeout_s > 0
        try:
            answer = getattr(self._contender, op)(**json.loads(json.dumps(arguments)))
        except Exception as error:
            raise ContenderFailed(f"{type(error).__name__}: {error}", out_of_memory=False) from error
        found: dict[str, Any] = json.loads(json.dumps(answer))
        return found


class Processes:
    """Starts contenders here, and notes which run; `fails` raises for one that cannot be started."""

    def __init__(self) -> None:
        self.started, self.running = list[str](), set[str]()
        self.fails: Callable[[str], None] = lambda name: None

    @contextmanager
    def start(self, name: str, spec: Spec, timeout_s: float) -> Iterator[InProcess]:
        assert timeout_s > 0
        self.fails(name)
        self.started.append(name)
        self.running.add(name)
        made = InProcess(spec)
        try:
            yield made
        finally:
            made.ask("close", timeout_s=1.0)
            self.running.remove(name)


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU in this process: its memory is the host's, its copies are late, its peak is what `Memory` says."""
    compute_late(monkeypatch)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: 1 << 20)
    monkeypatch.setattr(gpu_runs, "gpu_facts", lambda device: {"name": "none", "torch": torch.__version__})
    monkeypatch.setattr(gpu_runs, "READ_BYTES", 1 << 20)
    find = devices.find_device

    def find_device(name: str, profile: Any) -> Any:
        if name != "cuda:0":
            return find(name, profile)
        # The child computes on what it is given; the command only asks whether it is a GPU.
        return CPU if sys._getframe(1).f_code.co_name == "build" else Gpu()

    monkeypatch.setattr(devices, "find_device", find_device)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> Processes:
    monkeypatch.setenv("EXPERTFLOW_CACHE", str(shared_cache))
    pretend(monkeypatch)
    found = Processes()
    monkeypatch.setattr(gpu_contest, "_start", found.start)
    return found


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def bench(out: Path, *more: str, code: int = 0) -> dict[str, Any]:
    assert gpu_bench.main([*ARGUMENTS, "--out", str(out), *more]) == code
    (file,) = out.glob("bench-*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def only(*names: str) -> list[str]:
    return [word for name in names for word in ("--only", name)]


@pytest.mark.slow
def test_offloaded_systems_predict_what_the_resident_one_does(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["25 %", "100 %", "on demand", "LRU, synchronous", "transformers"]
    found = bench(tmp_path, *only(*names))
    systems = found["systems"]
    assert list(systems) == ["resident", *sorted(names, key=list(systems).index)] and found["model"]["experts"] == 32
    assert set(systems) == {"resident", *names} and not found["left_out"]
    assert processes.started == ["resident", "offloaded", "on demand", "LRU, synchronous", "transformers"]
    assert not processes.running
    for name in names:
        assert systems[name]["compared_tokens"] == 2 * 7
        assert systems[name]["equal_tokens"] == 14 or name == "transformers"  # through its own kernels
        assert len(systems[name]["blocks"]) == 2 and systems[name]["tpot_over_resident"]["num_pairs"] == 2
    assert all(systems[name]["prefill"]["equals_resident"] for name in names[:3]) and "prefill" not in systems[names[3]]
    quarter, everything, nothing_kept = (systems[name] for name in names[:3])
    assert 0.0 < quarter["hit_rate"] < 1.0 and nothing_kept["hit_rate"] < 0.2 and everything["hit_rate"] == 1.0
    assert 0 == everything["bytes_per_token"] < quarter["bytes_per_token"] < nothing_kept["bytes_per_token"]
    assert everything["host_us_per_layer_step"]["count"] == 2 and "host_us_per_layer_step" not in quarter
    for system in (quarter, nothing_kept):
        for block in system["blocks"]:
            assert block["decode_tokens"] == 6 and block["num_lookups"] == 6 * 8 * 4  # steps, layers, experts
            assert 0 < block["oracle_loads"] <= block["needed_loads"] == block["num_loads"]
        steps = system["ladder"]
        assert steps["bound_oracle"] >= steps["bound_own"] and steps["fraction"]["num_pairs"] == 2
        assert system["prefill"]["share_of_h2d"]["count"] == gpu_runs.PREFILL_REPEATS
    assert systems["LRU, synchronous"]["ladder"] is None
    lines = capsys.readouterr().out.splitlines()
    (row,) = [
        line
        for line in markdown(tmp_path, ["olmoe-1b-7b"]).splitlines()
        if line.startswith("| 25 % | ") and "14 of 14" in line
    ]
    assert row.count("|") == 11
    assert sum("met " in line or "not taken" in line for line in lines) == len(found["goals"])


@pytest.mark.slow
def test_what_fails_is_an_entry_and_the_rest_goes_on(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = gpu_systems.Systems.gpu_engine

    def gpu_engine(self: gpu_systems.Systems, overrides: dict[str, Any]) -> Any:
        if overrides["cache.slots"] == "25%":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, overrides)

    def fails(name: str) -> None:
        if name == "accelerate":
            raise ContenderFailed("accelerate is not installed", out_of_memory=False)

    monkeypatch.setattr(gpu_systems.Systems, "gpu_engine", gpu_engine)
    processes.fails = fails
    systems = bench(tmp_path, *only("25 %", "accelerate", "10 %"), code=1)["systems"]
    assert "CUDA out of memory" in systems["25 %"]["error"] and "not installed" in systems["accelerate"]["error"]
    assert systems["10 %"]["equal_tokens"] == 14 and "error" not in systems["10 %"]
    assert processes.started == ["resident", "offloaded", "offloaded"] and not processes.running
    assert "FAILED: accelerate is not installed" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_resident_model_the_others_are_measured_alone(processes: Processes, tmp_path: Path) -> None:
    def fails(name: str) -> None:
        if name == "resident":
            raise ContenderFailed("CUDA out of memory", out_of_memory=True)

    processes.fails = fails
    found = bench(tmp_path, *only("25 %"), code=1)
    assert found["systems"]["resident"]["error"] == "CUDA out of memory"
    quarter = found["systems"]["25 %"]
    assert quarter["tokens_per_s"]["count"] == 2 and "ladder" not in quarter and found["gpu"]["name"] == "none"
    (goal,) = [one for one in found["goals"] if one["goal"] == "fraction of attainable at 25 %"]
    assert goal["status"] == "not taken"


def test_without_time_nothing_is_begun(
    processes: Processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(tmp_path, "--budget-s", "0.001", code=1)
    assert found["systems"] == {"resident": {"error": "no time was left"}} and "25 %" in found["left_out"]
    assert "no time was left for 25 %" in capsys.readouterr().out and not processes.running


def test_synchronous_copies_are_waited_for_by_the_host(
    processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LateStreams copies when somebody waits: for the computation to wait is too late, two at a time too many."""
    copied, late = list[int](), list[int]()

    class Watched(LateStreams):
        def wait(self, event: list[int], lane: Lane) -> None:
            if lane is not Lane.COMPUTE:
                super().wait(event, lane)

        def copy(self, lane: Lane, expert: int, slot: int, start: int, num_bytes: int) -> None:
            late.extend([expert] * any(one is not None for one in self._pending))
            copied.append(expert)
            super().copy(lane, expert, slot, start, num_bytes)

    monkeypatch.setattr(build_tiers, "CudaStreams", Watched)
    systems = bench(tmp_path, *only("LRU, synchronous"))["systems"]
    assert len(copied) > 100 and not late
    assert systems["LRU, synchronous"]["equal_tokens"] == 14, "something was computed before its copy"


@pytest.mark.slow
def test_systems_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The resident one by a fake GPU in the child; the offloaded one finds no GPU there, and says so."""
    monkeypatch.setenv("EXPERTFLOW_CACHE", str(shared_cache))
    pretend(monkeypatch)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import pytest, test_gpu_bench as fakes; "
        "from harness.measure import contenders; spec = sys.argv[-1]; "
        "'gpu_reference' in spec and fakes.pretend(pytest.MonkeyPatch()); sys.exit(contenders.main(spec))"
    )
    made = process.LineProcess
    monkeypatch.setattr(
        process,
        "LineProcess",
        lambda command, **more: made([sys.executable, "-c", code, command[-1]], **more),
    )
    found = bench(tmp_path, *only("25 %"), "--profile", "resident", code=1)["systems"]
    assert (tmp_path / "profile-expert61440-resident.txt").read_text().count("Self CPU") >= 2
    assert found["resident"]["prefill"]["num_tokens"] == 40 and "error" not in found["resident"]
    assert "sees no GPU" in found["25 %"]["error"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--device", "cpu"], "this compares systems on a GPU"),
        (["--shape", "wide"], "one of olmoe-1b-7b, deepseek-v2-lite, qwen3-30b-a3b"),
        (["--only", "30 %"], "no system is called '30 %'"),
        (["--table", "nowhere"], "there is no such folder"),
    ],
)
@pytest.mark.usefixtures("processes")
def test_mistakes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], told: str) -> None:
    assert gpu_bench.main([*ARGUMENTS, "--out", str(tmp_path), *more]) == 2
    assert told in capsys.readouterr().err


def test_every_shape_is_made_exactly() -> None:
    from harness.demo.widen import choose_shape

    for hidden, intermediate in gpu_bench.SHAPES.values():
        shape = choose_shape(128, 64, 6 * hidden * intermediate, hidden)
        assert (shape.hidden_size, shape.intermediate_size) == (hidden, intermediate)
        assert sum(shape.unit_repeats) == intermediate
