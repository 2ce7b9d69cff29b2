"""Which GPU is meant by its number, what is said where there is none, and that nothing is compiled for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from tiny import save_tiny
from transformers import CompileConfig, GenerationConfig, StaticCache

import runtime
from runtime import devices, generate, nvml
from runtime.errors import DeviceError, cli_main
from runtime.telemetry import EngineStats, engine_stats

UUIDS = ["aaaa", "bbbb", "cccc"]  # by torch's numbers
BUS_ORDER = ["GPU-cccc", "GPU-dddd", "GPU-aaaa", "GPU-bbbb"]  # by NVML's; the second one is hidden from torch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), dtype=torch.float32)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three GPUs that torch sees, of four."""
    monkeypatch.setattr(devices, "_num_gpus", lambda: len(UUIDS))
    monkeypatch.setattr(torch.cuda, "get_device_properties", _properties)
    for name, function in (
        ("nvmlInit", lambda: None),
        ("nvmlShutdown", lambda: None),
        ("nvmlDeviceGetCount", lambda: len(BUS_ORDER)),
        ("nvmlDeviceGetHandleByIndex", BUS_ORDER.__getitem__),
        ("nvmlDeviceGetHandleByUUID", lambda uuid: uuid),
        ("nvmlDeviceGetIndex", BUS_ORDER.index),
        ("nvmlDeviceGetUUID", lambda handle: handle),
    ):
        monkeypatch.setattr(pynvml, name, function)


def _properties(device: torch.device | int) -> Any:
    return SimpleNamespace(uuid=UUIDS[device if isinstance(device, int) else device.index])


@pytest.mark.usefixtures("gpus")
def test_a_gpu_has_the_number_that_the_driver_shows() -> None:
    assert [str(devices.numbered_gpu(number)) for number in (0, 2, 3)] == ["cuda:2", "cuda:0", "cuda:1"]
    assert [devices.gpu_number(torch.device("cuda", index)) for index in range(3)] == [2, 3, 0]
    assert devices.gpu_number(devices.CPU) is None
    with pytest.raises(DeviceError, match="--gpu 1: torch does not see the GPU GPU-dddd; check CUDA_VISIBLE_DEVICES"):
        devices.numbered_gpu(1)
    for absent in (4, -1):
        with pytest.raises(DeviceError, match=rf"--gpu {absent}: there is no such GPU; NVML sees 0 … 3"):
            devices.numbered_gpu(absent)


@pytest.mark.usefixtures("gpus")
def test_without_nvml_a_gpu_has_torchs_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    assert devices.gpu_number(torch.device("cuda", 1)) == 1
    with pytest.raises(DeviceError, match=r"--gpu 0: NVML says .*; name the GPU by torch's number \(--device cuda:0\)"):
        devices.numbered_gpu(0)
    monkeypatch.setattr(nvml, "binding", lambda: None)
    assert devices.gpu_number(torch.device("cuda", 1)) == 1
    with pytest.raises(DeviceError, match="--gpu 0: nvidia-ml-py is not installed; install it, or name the GPU by"):
        devices.numbered_gpu(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("named", [["--gpu", "0"], ["--device", "cuda:0"]])
def test_generating_on_a_gpu_that_is_not_there_is_one_line(
    checkpoint: Path, named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--model", str(checkpoint), "--prompt", "a", *named]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "sees no GPU" in line and line.endswith("compute on the CPU (--device cpu)")


def test_a_device_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--model", "m", "--prompt", "a", "--gpu", "0", "--device", "cpu"])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("load", [runtime.load, runtime.load_reference])
def test_generate_compiles_nothing_on_a_gpu(
    checkpoint: Path, load: Callable[..., runtime.Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(checkpoint) as engine:
        model: Any = engine.model
        cache = StaticCache(config=model.config, max_cache_len=8)
        on_gpu = SimpleNamespace(device=torch.device("cuda", 0), config=model.config)
        decide = type(model)._valid_auto_compile_criteria

        def would_compile(config: GenerationConfig) -> bool:
            return bool(decide(on_gpu, {"cache": cache, "past_key_values": cache}, config))

        assert would_compile(GenerationConfig()), "else this test says nothing"
        for asked in (None, GenerationConfig(max_new_tokens=4)):
            config, _ = model._prepare_generation_config(asked, cache_implementation="static")
            assert not would_compile(config)
        compiled = CompileConfig()
        compiled._compile_all_devices = True  # on the CPU as on a GPU
        monkeypatch.setattr(model, "get_compiled_call", lambda config: pytest.fail("the forward is compiled"))
        ids = torch.tensor([[3, 4, 5]])
        greedy: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
        static = model.generate(ids, **greedy, cache_implementation="static", compile_config=compiled)
        assert torch.equal(static, model.generate(ids, **greedy))


def test_memory_of_a_gpu_is_told_beside_the_hosts() -> None:
    stats = engine_stats([], [], 0, 0, peak_resident_bytes=2 * 10**9, peak_gpu_bytes=10**9)
    assert "memory     1.00 GB of GPU memory in tensors, 2.00 GB of host memory at the peak" in stats.summary()
    assert stats.line() == "peak 1.00 GB of GPU memory in tensors, 2.00 GB of host memory"
    assert stats.as_dict()["peak_gpu_bytes"] == 10**9
    assert "GPU" not in EngineStats().summary()


def test_a_gpu_whose_memory_runs_out_ends_a_command_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nno more")

    assert cli_main(full) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: CUDA out of memory; take fewer expert slots")

    def other() -> None:
        raise RuntimeError("of our own")

    with pytest.raises(RuntimeError, match="of our own"):
        cli_main(other)
