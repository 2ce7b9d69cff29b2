"""The GPU that trials run on. The process that tunes never initialises CUDA: it would take memory of the GPU that it
measures, and what asks torch anything runs in a trial's process."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.hardware.nvml import gpu_state, read_gpus
from harness.hardware.readings import GpuReadings, NvmlReadings
from harness.search.outcome import Kind
from harness.search.trial import TrialRunner
from runtime.errors import DeviceError
from runtime.host_memory import HostPlan, PoolNeed, host_memory, plan_host
from runtime.transfer.host_slab import ALIGNMENT_BYTES
from runtime.transfer.layout import align
from runtime.transfer.slots import PAGE_BYTES

if TYPE_CHECKING:
    from harness.probe import Probe
    from runtime.facts import ModelFacts
    from runtime.profile import Profile

PROBE_S = 4.0
"""Seconds of a probe, three times as many for copies: a prior is wanted, and trials correct it."""
_TIMEOUT_S = 300.0
_MOST_GAPS = 3  # of an expert in host memory: before each of its tensors but the first


@dataclass(frozen=True)
class Gpu:
    """What is known of it.

    Attributes:
        index: NVML's. device: what torch calls it in the processes of trials, such as "cuda:0": CUDA numbers and hides
            GPUs by its own rules (CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER), so that it was found by its UUID.
        memory_total_bytes: as torch says, which is what profiles match. memory_free_bytes: before anything ran on it.
        context_bytes: what a process takes of it before it loads a model; 0 where that could not be told.
    """

    index: int
    uuid: str
    name: str
    device: str
    memory_total_bytes: int
    memory_free_bytes: int
    context_bytes: int
    driver: str | None = None

    @property
    def kind(self) -> str:
        """As profiles name devices: "cuda:NAME"."""
        return f"cuda:{self.name}"

    def free_bytes(self) -> int:
        """Now; 0 where NVML does not tell."""
        return gpu_state(self.uuid).memory_free_bytes.value or 0

    def fingerprint(self) -> dict[str, str | int]:
        """What a measurement depends on, beside the host: `machine.fingerprint`."""
        known: dict[str, str | int] = {"gpu_memory_gib": round(self.memory_total_bytes / (1 << 30))}
        return known if self.driver is None else {**known, "driver": self.driver}


def examine(gpu: GpuReadings, nvml: NvmlReadings) -> Gpu:
    """Whether torch sees a GPU of NVML's and computes on it, asked in a process of its own.

    Raises:
        DeviceError: it does not; says why.
    """
    with tempfile.TemporaryDirectory() as scratch:
        outcome = TrialRunner(Path(scratch) / "gpu.log").run(_examined, gpu.uuid.value, _TIMEOUT_S)
    if outcome.kind is not Kind.OK or outcome.result is None:
        raise DeviceError(f"GPU {gpu.index} ({gpu.name}): {outcome.message}")
    return Gpu(index=gpu.index, uuid=str(gpu.uuid.value), driver=nvml.driver.value, **outcome.result)


def _examined(uuid: str | None) -> dict[str, Any]:
    """Runs in a trial's process."""
    import torch

    from harness.measure.peaks import GpuPeak
    from runtime.devices import cuda_index

    device = f"cuda:{cuda_index(uuid)}"
    peak = GpuPeak(device)
    try:
        _compute(device)
    except RuntimeError as error:  # such as a GPU too old for this torch
        raise DeviceError(f"nothing can be computed on it: {str(error).partition(chr(10))[0]}") from error
    peak.settle()
    properties = torch.cuda.get_device_properties(device)
    free_bytes = torch.cuda.mem_get_info(device)[0] if peak.free_bytes is None else peak.free_bytes
    return {
        "name": properties.name,
        "device": device,
        "memory_total_bytes": int(properties.total_memory),
        "memory_free_bytes": int(free_bytes),
        "context_bytes": peak.outside_bytes,
    }


def _compute(device: str) -> None:
    """The least that any model does: it loads the library of matrix products, too."""
    import torch

    matrix = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    torch.nn.functional.linear(matrix, matrix)
    torch.cuda.synchronize(device)


@dataclass(frozen=True)
class ProbeSpec:
    """What to probe, and for how long; see `harness.probe.take_probe`."""

    model: str
    uuid: str
    io_threads: int
    budget_s: float = PROBE_S


def probe_with(runner: TrialRunner, spec: ProbeSpec) -> Probe:
    """Measure the machine and one of its GPUs in a process of its own.

    Raises:
        DeviceError: it failed, or nothing could be copied to the GPU.
    """
    from pydantic import TypeAdapter

    from harness.probe import Probe

    outcome = runner.run(_probed, spec, _TIMEOUT_S)
    if outcome.kind is not Kind.OK:
        raise DeviceError(f"the GPU could not be measured: {outcome.message}")
    probe: Probe = TypeAdapter(Probe).validate_python(outcome.result)
    assert probe.copies is not None
    if probe.copies.to_device_bytes_per_s() is None:
        problems = [one.problem for one in probe.copies.series if one.problem]
        raise DeviceError(f"nothing could be copied to the GPU: {problems[0] if problems else 'no time'}")
    return probe


def _probed(spec: ProbeSpec) -> dict[str, Any]:
    """Runs in a trial's process."""
    from harness.probe import take_probe
    from runtime.facts import describe

    nvml = read_gpus()
    gpu = next((one for one in nvml.gpus if one.uuid.value == spec.uuid), None)
    if gpu is None:
        raise DeviceError(f"NVML does not see GPU {spec.uuid} any more")
    facts = describe(spec.model)
    probe = take_probe(spec.model, facts, nvml, io_threads=spec.io_threads, gpu=gpu, budget_s=spec.budget_s)
    return asdict(probe)


def host_plan(facts: ModelFacts, profile: Profile) -> HostPlan:
    """Where the experts of every trial will rest, as loading decides.

    Raises:
        BudgetError: the host has no room for them.
    """
    slab_bytes = align(facts.expert_bytes + _MOST_GAPS * ALIGNMENT_BYTES, PAGE_BYTES)
    need = PoolNeed(facts.num_experts_total, slab_bytes, facts.slot_bytes, min(facts.top_k, facts.identity.experts))
    return plan_host([need], host_memory(), profile.tiers.host_bytes if profile.tiers is not None else None)
