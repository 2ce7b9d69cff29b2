"""Tuning for a GPU on a machine without one: the device that is chosen, its memory, space and prior; once all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_nvml import FakeNvml
from test_measurer import Machine, measurer, truth

from harness import pick, tune
from harness.hardware import nvml
from harness.hardware.bandwidth import Curve, Point, Series
from harness.hardware.compute import ExpertTime, measure_experts
from harness.hardware.copies import Copies, CopyPoint, CopySeries, Direction, HostBuffer
from harness.hardware.memory import MemoryModel
from harness.hardware.nvml import read_gpus
from harness.hardware.readings import GpuReadings, GpuState, NvmlReadings, Reading, Status
from harness.measure.environment import GPU_LOST
from harness.measure.peaks import GpuPeak, HostPeak, peak_on
from harness.measure.workload import HELDOUT
from harness.search import gpu as gpu_module
from harness.search import setup as prepared
from harness.search.confirm import Confirmation
from harness.search.gpu import Gpu, examine, host_plan, probe_with
from harness.search.loop import GpuLostError
from harness.search.objective import Objective
from harness.search.outcome import Kind, Limits, Outcome
from harness.search.setup import Settings, Setup, base_of, identity_of
from harness.search.space import Params, Setting, Space, Value
from harness.search.trial import TrialRunner, TrialSpec
from runtime.errors import BudgetError, DeviceError, UsageError
from runtime.facts import CUDA_BUFFER_BYTES
from runtime.host_memory import HostMemory
from runtime.model import meta_model
from runtime.profile import Profile, load_profile

GIB = 1 << 30
GPU = Gpu(0, "GPU-0", "Fake GPU", "cuda:0", 79 * GIB, 70 * GIB, 300 << 20, "580.95.05")
BASE = Profile.default().with_overrides({"compute.decode": "eager"})
KERNELS = ("eager", "grouped_mm")


def _space(base: Profile = BASE, fixed: Sequence[str] = (), **changed: Any) -> Space:
    setting = Setting(256, 100, 8, num_cores=4, decode_kernels=KERNELS, on_gpu=True, **changed)
    return Space(setting, base, fixed)


def _names(space: Space) -> list[str]:
    return [knob.name for knob in space.knobs]


def _picking(**wanted: Value) -> Callable[[Any], Value]:
    return lambda knob: wanted.get(knob.name, knob.default)


def test_the_knobs_of_a_gpu() -> None:
    common = ["slots", "group", "scheduler", "window", "policy", "depth", "count", "every"]
    space = _space()
    assert _names(space) == [*common, "streams", "prefill", "decode"]
    assert next(knob.choices for knob in space.knobs if knob.name == "decode") == KERNELS
    assert _names(_space(has_disk_tier=True)) == [*common, "streams", "io_threads", "prefill", "decode"]
    assert "streams" not in space.choose(_picking(depth=0)), "nothing is left to share a stream with"
    assert space.overrides(space.default)["transfer.streams"] == 2 and "miss" not in space.overrides(space.default)


def test_misses_are_computed_only_where_results_may_be_rounded_otherwise() -> None:
    space = _space(BASE.with_overrides({"numerics": "equivalent"}), fixed=("numerics",))
    assert _names(space)[-3:] == ["miss", "host_share", "threads"]
    acts = {"copy": set(), "compute": {"threads"}, "auto": {"threads", "host_share"}}
    for miss, names in acts.items():
        params = space.choose(_picking(miss=miss))
        assert params.keys() & {"threads", "host_share"} == names
        profile = space._base.with_overrides(space.overrides(params))
        assert profile.miss == miss and profile.compute.host_share is None
    halved = space.choose(_picking(miss="auto", host_share="0.5", threads=4))
    profile = space._base.with_overrides(space.overrides(halved))
    assert profile.compute.host_share == 0.5 and profile.compute.threads == 4
    assert space.contains(halved) and space.complete(halved)["host_share"] == "0.5"
    own = _space(BASE.with_overrides({"numerics": "equivalent", "miss": "auto", "compute.host_share": 0.3}))
    assert own.overrides(own.default)["compute.host_share"] == 0.3
    everything_fits = Space(replace(space.setting, num_slots_fit=256), space._base, ("numerics", "cache.slots"))
    assert "miss" not in _names(everything_fits)


def test_studies_of_the_cpu_go_on() -> None:
    """The digest of their space is what it was."""
    six = Setting(256, 100, 8, num_cores=6, predictors=("gate_lookahead", "previous_token"))
    assert Space(six, Profile.default()).digest() == "1a812cc8657e"
    assert Space(Setting(64, 64, 1), Profile.default(), fixed=("compute.decode",)).digest() == "767817eed427"
    assert _space().digest() != Space(replace(_space().setting, on_gpu=False), BASE).digest()


def _settings(folder: Path, **changed: Any) -> Settings:
    names = {"model": "m", "label": "m", "command": "c", "folder": folder, "profile": folder / "p.yaml"}
    effort = {"budget_s": 60.0, "num_trials": None, "sampler": "tpe", "seed": 0, "storage": None, "resume": False}
    what = {"limits": Limits(), "objective": Objective.LATENCY, "workload": None, "concurrency": 8, "context": 64}
    wanted: dict[str, Any] = {**names, **effort, **what, "gpu": GPU}
    return Settings(**{**wanted, **changed})


def test_the_default_on_a_gpu_has_kernels_that_run_there(tmp_path: Path) -> None:
    assert base_of(_settings(tmp_path)).compute.decode == "eager"
    assert base_of(_settings(tmp_path, gpu=None)).compute.decode == "gemv"
    with pytest.raises(UsageError, match=r"compute.decode=gemv: .* for the CPU"):
        base_of(_settings(tmp_path, fixed={"compute.decode": "gemv"}))


def test_a_study_is_of_one_kind_of_gpu_and_driver(tmp_path: Path) -> None:
    facts: Any = SimpleNamespace(identity=SimpleNamespace(model_dump=dict))
    workload: Any = SimpleNamespace(sha256="0")

    def identity(gpu: Gpu | None) -> dict[str, Any]:
        found: dict[str, Any] = identity_of(_settings(tmp_path, gpu=gpu), facts, workload)["hardware"]
        return found

    assert identity(GPU)["device"] == "cuda:Fake GPU" and identity(GPU)["driver"] == "580.95.05"
    others = [replace(GPU, name="H200"), replace(GPU, driver="1"), replace(GPU, memory_total_bytes=GIB), None]
    assert all(identity(other) != identity(GPU) for other in others)
    elsewhere = replace(GPU, index=3, uuid="GPU-9", device="cuda:1", memory_free_bytes=GIB, context_bytes=0)
    assert identity(elsewhere) == identity(GPU)
    assert set(identity(None)).isdisjoint({"driver", "gpu_memory_gib"})


def _facts(expert_bytes: int = 1 << 20) -> Any:
    config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    config.get_text_config = lambda: config
    return SimpleNamespace(
        num_experts_total=16,
        slot_bytes=expert_bytes + 4096,
        expert_bytes=expert_bytes,
        dense_bytes=1000,
        dtype=torch.bfloat16,
        config=config,
        top_k=2,
        identity=SimpleNamespace(layers=2, experts=8),
    )


def test_the_sum_of_a_gpu_has_its_context_and_buffers() -> None:
    model = MemoryModel.of_gpu(_facts(), context_bytes=300 << 20, context=100)
    kv_bytes = 2 * 2 * 2 * 16 * 100 * 2
    assert model.predict(3, 2).total_bytes == (
        1000 + 3 * ((1 << 20) + 4096) + 2 * kv_bytes + (300 << 20) + CUDA_BUFFER_BYTES
    )


def test_what_is_pinned_is_checked_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.search.gpu.host_memory", lambda: HostMemory(20 << 20, 20 << 20, None))
    plan = host_plan(_facts(), BASE)
    assert 16 << 20 < plan.pinned_bytes < 17 << 20 and plan.holds_all
    allowed = host_plan(_facts(), BASE.with_overrides({"tiers.host_bytes": 5 << 20}))
    assert allowed.pinned_bytes <= 5 << 20 and not allowed.holds_all
    larger = host_plan(_facts(2 << 20), BASE)
    assert larger.pinned_bytes <= 18 << 20 and not larger.holds_all and larger.disk_bytes > 0
    with pytest.raises(BudgetError, match=r"tiers\.host_bytes"):
        host_plan(_facts(), BASE.with_overrides({"tiers.host_bytes": 1 << 20}))


def _rate(bytes_per_s: float, *, under_load: bool = False, memory: HostBuffer = HostBuffer.PINNED) -> CopySeries:
    points = tuple(CopyPoint(size, size / bytes_per_s, 0.0, 0.0, True) for size in (4096, 1 << 20))
    return CopySeries(memory, Direction.TO_DEVICE, under_load, points, None, None, "")


def test_the_rate_at_expert_size_is_that_of_memory_like_the_engines() -> None:
    away = replace(_rate(1e9), direction=Direction.TO_HOST)
    pageable = _rate(3e9, memory=HostBuffer.PAGEABLE)
    pinned, loaded, registered = _rate(50e9), _rate(40e9, under_load=True), _rate(45e9, memory=HostBuffer.REGISTERED)
    refused = CopySeries(HostBuffer.PINNED, Direction.TO_DEVICE, False, (), None, None, "refused")

    def rates(*series: CopySeries) -> tuple[float | None, float | None]:
        copies = Copies(1 << 20, series, None)
        found = [copies.to_device_bytes_per_s(under_load=under_load) for under_load in (False, True)]
        return (found[0] and round(found[0]), found[1] and round(found[1]))

    assert rates(away, pageable, pinned, loaded, registered) == (45e9, 40e9)
    assert rates(away, pinned) == (50e9, 50e9)
    assert rates(away, pageable, refused) == (None, None)


def _probe(copies: Copies | None) -> Any:
    series = (Series(1, False, False, (Point(1 << 20, 1, 1.0, 1e8),), None, None),)
    times = [ExpertTime("eager", 1, 1, 1e-4)]
    return SimpleNamespace(
        curve=Curve(1 << 20, series, 2e8, None),
        compute=times,
        gpu_compute=[replace(times[0], seconds=2e-5)],
        copies=copies,
    )


def _setup(folder: Path, gpu: Gpu | None = GPU, **changed: Any) -> Setup:
    copies = None if gpu is None else Copies(1 << 20, (_rate(50e9), _rate(40e9, under_load=True)), None)
    memory = MemoryModel(256, 1 << 20, 0, 100 << 20, 0)
    space = _space() if gpu is not None else Space(Setting(256, 100, 8), BASE)
    known: dict[str, Any] = {"facts": _facts(), "base": BASE, "workload": None, "texts": _Texts(), "memory": memory}
    known |= {"memory_limit_bytes": GIB, "probe": _probe(copies), "sizes": _Sizes(), "space": space, "default_s": 1.0}
    return Setup(**{"settings": _settings(folder, gpu=gpu), **known, "host_bytes": 4 * GIB, **changed})


class _Sizes(SimpleNamespace):
    context = 64


class _Texts(SimpleNamespace):
    def requests(self, sizes: object) -> dict[str, tuple[()]]:
        return {"search": (), "confirm": ()}

    def segments(self, sizes: object, num_pairs: int) -> list[tuple[()]]:
        return [()]


def test_the_prior_of_a_gpu_is_copies_under_load_and_its_own_computing(tmp_path: Path) -> None:
    costs, on_cpu = _setup(tmp_path)._costs(), _setup(tmp_path, gpu=None)._costs()
    assert costs.of("load/2/1") == pytest.approx((1 << 20) / 40e9) and costs.experts["eager/1"] == {1: 2e-5}
    assert on_cpu.of("load/2/1") == pytest.approx((1 << 20) / 1e8) and on_cpu.experts["eager/1"] == {1: 1e-4}
    assert _setup(tmp_path).bandwidth_bytes_per_s == pytest.approx(50e9)
    assert _setup(tmp_path, gpu=None).bandwidth_bytes_per_s == 2e8


def test_two_are_loaded_at_once_where_the_gpu_and_the_host_have_room_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, free = _setup(tmp_path), {"gpu": 2 * GIB, "host": 8 * GIB}
    pair = [setup.space.default] * 2  # 200 MB each on the GPU
    monkeypatch.setattr("runtime.machine.available_memory_bytes", lambda: free["host"])
    monkeypatch.setattr(Gpu, "free_bytes", lambda gpu: free["gpu"])
    assert setup._fit_together(pair)
    free["host"] -= 1
    assert not setup._fit_together(pair), "each pins all experts"
    free |= {"host": 8 * GIB, "gpu": 300 << 20}
    assert not setup._fit_together(pair) and setup._fit_together(pair[:1])
    free |= {"host": 4 * GIB, "gpu": 0}
    assert _setup(tmp_path, gpu=None)._fit_together(pair), "without a GPU the host's memory alone is asked"


def test_a_gpu_lost_while_confirming_is_no_word_on_the_finalist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = [read_state()]
    failed = Confirmation((), (), None, "the finalist ended with crash", failed=({"group": 8},))
    monkeypatch.setattr(prepared, "confirm", lambda *_, **options: failed)
    monkeypatch.setattr(prepared, "gpu_state", lambda uuid: state[0])
    setup = _setup(tmp_path)
    assert setup.confirm(lambda *_: None, [{}], {}) == failed
    state[0] = replace(state[0], status=Status.GPU_LOST)
    with pytest.raises(GpuLostError, match=GPU_LOST):
        setup.confirm(lambda *_: None, [{}], {})


def read_state() -> GpuState:
    return nvml.gpu_state("GPU-0", FakeNvml())


def test_trials_are_watched_and_run_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ran: list[TrialSpec] = []

    def lost(uuid: str) -> GpuState:
        asked.append(uuid)
        return replace(read_state(), status=Status.GPU_LOST)

    def run(runner: TrialRunner, work: object, spec: TrialSpec, *_: object) -> Outcome:
        ran.append(spec)
        return Outcome(Kind.CRASH)

    monkeypatch.setattr(prepared, "gpu_state", lost)
    monkeypatch.setattr(TrialRunner, "run", run)
    setup = _setup(tmp_path)
    outcome = setup.measurer()(setup.space.default)
    assert ran[0].device == "cuda:0" and set(asked) == {"GPU-0"}
    assert outcome.kind is Kind.ENVIRONMENT and outcome.message.startswith(GPU_LOST)


def test_computed_misses_are_checked_by_agreement_copied_ones_to_the_bit() -> None:
    def rounding(overrides: Mapping[str, Any]) -> list[list[int]]:
        tokens = truth({"scheduler.group": 1})
        tokens[2][5] += 1 if overrides.get("miss") == "compute" else 0
        tokens[4][5] += overrides["cache.slots"] if overrides["cache.slots"] < 20 else 0
        return tokens

    space = _space(BASE.with_overrides({"numerics": "equivalent"}), fixed=("numerics",))
    for miss, kind in (("copy", Kind.WRONG_TOKENS), ("compute", Kind.OK)):
        measure = measurer(Machine(rounding), fixed={"numerics": "equivalent"}, device="cuda:0")
        measure._space = space
        params: list[Params] = [space.choose(_picking(miss=miss, slots=slots)) for slots in (100, 12)]
        assert measure(space.default).kind is Kind.OK
        assert [measure(one).kind for one in params] == [Kind.OK, kind]


@pytest.fixture
def torch_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """torch's counters of a GPU, and what NVML has free."""
    memory = {"reserved": 0, "peak": 0, "free": 70 * GIB}

    class Binding(FakeNvml):
        def nvmlDeviceGetMemoryInfo(self, handle: int, version: int = 1) -> Any:
            return SimpleNamespace(total=80 * GIB, free=memory["free"], used=0, reserved=0)

    monkeypatch.setattr("runtime.nvml.binding", lambda: Binding())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: memory["reserved"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: memory["peak"])
    return memory


def test_the_peak_is_what_torch_reserved_and_what_cuda_takes_beside_it(torch_gpu: dict[str, int]) -> None:
    peak = GpuPeak("cuda:0")
    torch_gpu |= {"reserved": 2 * GIB, "peak": 3 * GIB, "free": 70 * GIB - 2 * GIB - (400 << 20)}
    assert peak.num_bytes() == 3 * GIB
    peak.settle()
    assert peak.free_bytes == 70 * GIB and peak.outside_bytes == 400 << 20
    torch_gpu |= {"peak": 5 * GIB, "free": 0}  # another engine, beside which this one is measured
    assert peak.num_bytes() == 5 * GIB + (400 << 20)


def test_where_the_cpu_computes_the_host_is_asked() -> None:
    assert all(isinstance(peak_on(device), HostPeak) for device in (None, "cpu"))


def test_what_cannot_be_told_is_not_counted(torch_gpu: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.nvml.binding", lambda: FakeNvml(nvmlDeviceGetMemoryInfo=4))
    peak = GpuPeak("cuda:0")
    torch_gpu["peak"] = GIB
    peak.settle()
    assert peak.free_bytes is None and peak.num_bytes() == GIB


def test_gemv_is_not_timed_on_a_gpu(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 20))
    monkeypatch.setattr("runtime.readback._uploader", lambda device: lambda tensor: tensor.to(device))
    times = measure_experts(meta_model(str(tiny_checkpoint)), 2, threads=(1,), budget_s=0.0, device="meta")
    assert {one.kernel for one in times} == {"eager", "grouped_mm"}


READINGS = NvmlReadings(Reading(2), Reading("580.95.05"), gpus=read_gpus(FakeNvml()).gpus)


def _options(**given: Any) -> Namespace:
    return Namespace(**{"gpu": None, "device": None, **given})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """NVML has two GPUs; the numbers of those that torch sees."""
    numbers = [1]

    def examined(gpu: GpuReadings, readings: NvmlReadings) -> Gpu:
        if gpu.index not in numbers:
            raise DeviceError(f"GPU {gpu.index} (Fake GPU): torch does not see it")
        return replace(GPU, index=gpu.index)

    monkeypatch.setattr(nvml, "read_gpus", lambda: READINGS)
    monkeypatch.setattr(gpu_module, "examine", examined)
    return numbers


def test_the_first_gpu_that_can_be_used_is_tuned_for(seen: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    found = tune._choose_device(_options())
    assert found is not None and found.index == 1
    assert capsys.readouterr().out == "tuning for GPU 1: Fake GPU (cuda:0); for the CPU: --device cpu\n"
    named = tune._choose_device(_options(gpu=1))
    assert named == found and capsys.readouterr().out == "tuning for GPU 1: Fake GPU (cuda:0)\n"
    assert tune._choose_device(_options(device="cpu")) is None
    with pytest.raises(DeviceError, match=r"GPU 0 .* torch does not see it"):
        tune._choose_device(_options(gpu=0))
    with pytest.raises(DeviceError, match=r"--gpu 2: there is no such GPU"):
        tune._choose_device(_options(gpu=2))
    with pytest.raises(UsageError, match="--gpu 1 and --device cpu exclude each other"):
        tune._choose_device(_options(gpu=1, device="cpu"))
    with pytest.raises(UsageError, match=r"--device cuda:0: .* --gpu 0"):
        tune._choose_device(_options(device="cuda:0"))
    seen.clear()
    assert tune._choose_device(_options()) is None
    assert capsys.readouterr().out == "tuning for the CPU (GPU 0 (Fake GPU): torch does not see it)\n"


def test_a_gpu_that_does_not_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome(Kind.ERROR, "this torch (2.11) sees no CUDA; run with --device cpu")
    monkeypatch.setattr(TrialRunner, "run", lambda *_: outcome)
    with pytest.raises(DeviceError, match=r"GPU 0 \(Fake GPU\): this torch \(2.11\) sees no CUDA"):
        examine(READINGS.gpus[0], READINGS)
    with pytest.raises(DeviceError, match="could not be measured: this torch"):
        probe_with(TrialRunner(Path("log")), gpu_module.ProbeSpec("m", "GPU-0", 2))


def test_the_demo_does_not_fit_into_its_limits() -> None:
    experts = {None: 256 << 20, GPU: 256 * tune.GPU_DEMO_EXPERT_BYTES}
    for gpu, demo_bytes in experts.items():
        limits = tune._limits(Namespace(demo=True, max_memory=None, slo_tpot=None, slo_ttft=None), gpu)
        fixed_bytes = CUDA_BUFFER_BYTES if gpu is not None else 300 << 20  # the least that is taken beside experts
        assert limits.max_memory_bytes is not None and limits.max_memory_bytes - fixed_bytes < 1.6 * demo_bytes
        if gpu is not None:
            assert limits.max_memory_bytes < demo_bytes
    asked = Namespace(demo=True, max_memory="1GiB", slo_tpot=None, slo_ttft=None)
    assert tune._limits(asked, GPU).max_memory_bytes == GIB
    assert tune._label(None, None) == "demo-1MiB" and tune._label(None, GPU) == "demo-12MiB"


def test_trials_are_forked_from_a_server_that_never_asked_cuda_anything() -> None:
    """It could not be used in a fork any more, not even to count devices."""
    program = (
        "import importlib, torch\n"
        "def asked(*a, **k): raise SystemExit('CUDA was asked')\n"
        "for name in ('is_available', 'device_count', '_lazy_init'): setattr(torch.cuda, name, asked)\n"
        "from harness.search import child\n"
        "for module in child._PRELOAD: importlib.import_module(module)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


_PROGRAM = """
import sys
import fake_gpu
from harness import tune
from harness.search import gpu, plan

gpu.ProbeSpec.__init__.__defaults__ = (0.1,)
code = tune.main(sys.argv[2:])
if code == 0:
    fake_gpu.install()
    import runtime
    with runtime.load(sys.argv[1], strict=True) as engine:
        print(engine.match.level, engine.profile.transfer.streams, *engine.notes, sep=" | ")
sys.exit(code)
"""


@pytest.mark.slow
def test_all_of_it(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From --gpu 0 to a profile that says so and loads; every trial computes on a GPU that is none (`fake_gpu`)."""
    lines = HELDOUT.read_text().splitlines()
    (tmp_path / "text.jsonl").write_text("\n".join(lines[:: len(lines) // 12]))
    arguments = ["--gpu", "0", "--model", str(tiny_checkpoint), "--workload", "text.jsonl", "--trials", "3"]
    arguments += ["--time-budget", "10s", "--concurrency", "2", "--max-memory", "900MiB", "--out", "run"]
    arguments += ["--no-simulator", "--profile-out", "profiles/tiny.yaml"]
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "FAKE_GPU": ""}
    command = [sys.executable, "-c", _PROGRAM, "profiles/tiny.yaml", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    out = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr + done.stdout
    assert out[0] == "tuning for GPU 0: Fake GPU (cuda:0)" and "of GPU memory" in done.stdout
    assert any(line.startswith("host       262 kB of pinned host memory hold all experts") for line in out)
    profile = load_profile(tmp_path / "profiles" / "tiny.yaml")
    assert profile.match is not None and profile.match.device == "cuda:Fake GPU"
    assert profile.match.memory_total_bytes == 79 * GIB
    bandwidth = profile.match.bandwidth_at_expert_size_bytes_per_s
    assert bandwidth is not None and bandwidth.min == pytest.approx(0.5 * 12288 / (2e-6 + 12288 / 10e9), rel=0.01)
    assert profile.provenance is not None and (profile.provenance.hardware or {})["driver"] == "580.95.05"
    assert profile.compute.decode in KERNELS and profile.objectives is not None
    peak_bytes = profile.objectives.peak_memory_bytes or 0
    assert 320 << 20 < peak_bytes < 321 << 20, "context and what torch reserved, not what the process takes of the host"
    exact = [line for line in out if line.startswith("exact | ")]
    assert exact and "pinned host memory hold all experts" in exact[0]
    assert "peak GPU memory" in done.stdout
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert found["gpu"]["uuid"] == "GPU-0" and found["gpu"]["context_bytes"] == 300 << 20
    assert found["probe"]["gpu_compute"] and found["hardware"]["device"] == "cuda:Fake GPU"
    assert pick.main(["--run", str(tmp_path / "run"), "--objective", "memory"]) == 0
    picked = load_profile(tmp_path / "run" / "picked.yaml")
    assert picked.match == profile.match
    assert pick.main(["--run", str(tmp_path / "run"), "--list"]) == 0
    said = capsys.readouterr().out
    assert "picked.yaml" in said and said.count("peak GPU memory") == 2 + (" of its peak GPU memory" in said)
