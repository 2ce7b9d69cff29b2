"""The probe on a real GPU: what NVML says agrees with CUDA, and copies are timed and judged."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from harness.hardware.copies import PLAN, CopyError, Direction, HostBuffer, measure_copies
from harness.hardware.cuda_copies import CudaCopies
from harness.hardware.nvml import gpu_state, read_gpus
from harness.hardware.readings import GpuReadings, Status
from harness.hardware.verdicts import Verdict
from runtime.devices import cuda_index
from runtime.errors import DeviceError

pytestmark = pytest.mark.gpu

EXPERT_BYTES = 6_291_456 + 4096


@pytest.fixture(scope="module")
def gpu() -> GpuReadings:
    """The first GPU of NVML's that torch sees."""
    seen = read_gpus().gpus
    for one in seen:
        try:
            cuda_index(one.uuid.value)
        except DeviceError:
            continue
        return one
    pytest.fail(f"torch {torch.__version__} sees none of NVML's {len(seen)} GPUs")


def test_nvml_and_cuda_mean_the_same_gpu(gpu: GpuReadings) -> None:
    properties = torch.cuda.get_device_properties(cuda_index(gpu.uuid.value))
    assert gpu.name.value == properties.name
    assert gpu.compute_capability.value == f"{properties.major}.{properties.minor}"
    assert gpu.memory_total_bytes.value == pytest.approx(properties.total_memory, rel=0.05)
    assert (gpu.memory_free_bytes.value or 0) > 0


def test_the_state_is_cheap_and_knows_another_process(gpu: GpuReadings) -> None:
    state = gpu_state(gpu.uuid.value or 0)
    assert (state.status, state.uuid) == (Status.OK, gpu.uuid.value)
    code = (
        f"import torch; x = torch.ones(1, device='cuda:{cuda_index(gpu.uuid.value)}'); print('up', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"up\n"
        busy = gpu_state(gpu.uuid.value or 0).foreign_processes
        other.communicate(b"\n")
    if busy.value is None or state.foreign_processes.value is None:
        pytest.skip(f"NVML does not list processes here: {busy}")
    assert len(busy.value) > len(state.foreign_processes.value)


def test_copies_of_every_kind_are_timed_and_the_link_is_judged(gpu: GpuReadings) -> None:
    device = CudaCopies(cuda_index(gpu.uuid.value))
    try:
        copies = measure_copies(
            device,
            EXPERT_BYTES,
            256 << 20,
            lambda: gpu_state(gpu.uuid.value or gpu.index),
            gpu.pcie_generation_max.value,
            budget_s=12.0,
        )
    finally:
        device.close()
    assert [(one.memory, one.direction, one.under_load) for one in copies.series] == list(PLAN)
    for one in copies.series:
        assert not one.problem and EXPERT_BYTES in {point.num_bytes for point in one.points}
        assert all(point.copy_s > 0 for point in one.points)
    at_expert = {
        (one.memory, one.direction, one.under_load): point.bytes_per_s
        for one in copies.series
        for point in one.points
        if point.num_bytes == EXPERT_BYTES
    }
    pinned = at_expert[HostBuffer.PINNED, Direction.TO_DEVICE, False]
    assert pinned > 1e9 and at_expert[HostBuffer.REGISTERED, Direction.TO_DEVICE, False] > 0.7 * pinned
    assert at_expert[HostBuffer.PAGEABLE, Direction.TO_DEVICE, False] < 1.05 * pinned
    assert copies.while_copying is not None
    judgement = copies.judge(gpu)
    print(judgement)
    assert judgement.verdict is not Verdict.UNMEASURABLE or gpu.pcie_generation.value is None


def test_memory_that_is_not_to_be_had_is_refused_and_the_device_works_on(gpu: GpuReadings) -> None:
    device = CudaCopies(cuda_index(gpu.uuid.value))
    try:
        with pytest.raises(CopyError):
            device.allocate(HostBuffer.PAGEABLE, 2 * (gpu.memory_total_bytes.value or 0))
        device.allocate(HostBuffer.REGISTERED, 1 << 20)
        assert device.is_intact(1 << 20)
        device.start(Direction.TO_HOST, 1 << 20, 4, under_load=True)
        assert device.finish() > 0
    finally:
        device.close()


def test_the_command_measures_the_gpu(gpu: GpuReadings) -> None:
    command = [sys.executable, "-m", "harness.probe", "--gpu", str(gpu.index), "--seconds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert f"link of GPU {gpu.index}: " in done.stdout and str(gpu.uuid) in done.stdout
