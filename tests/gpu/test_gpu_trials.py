"""What the tuner asks of a GPU beside running the engine: that it computes, and what a process takes of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

# Where this file's process has used CUDA already: what is told is of a process that has not.
_PROGRAM = """
import torch
from harness.hardware.nvml import find_gpu, read_gpus
from harness.search.gpu import examine

nvml = read_gpus()
seen = {str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())}
index = next(gpu.index for gpu in nvml.gpus if (gpu.uuid.value or "").removeprefix("GPU-") in seen)
gpu = examine(find_gpu(index, nvml), nvml)
assert gpu.name == torch.cuda.get_device_name(gpu.device), gpu
assert gpu.memory_total_bytes == torch.cuda.get_device_properties(gpu.device).total_memory, gpu
assert 0 < gpu.memory_free_bytes <= 1.01 * gpu.memory_total_bytes, gpu
assert 50 << 20 < gpu.context_bytes < 4 << 30, gpu
from harness.measure.peaks import GpuPeak

peak = GpuPeak(gpu.device)
held = torch.ones(256 << 20, dtype=torch.uint8, device=gpu.device)
peak.settle()
least = held.numel() + peak.outside_bytes
assert peak.outside_bytes > 50 << 20 and least <= peak.num_bytes() < least + (64 << 20), peak.num_bytes()
"""


def test_a_gpu_is_examined_and_a_peak_has_what_cuda_takes() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
