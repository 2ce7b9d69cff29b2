"""What this machine can do: `python -m harness.probe [--model M] [--gpu N] [--seconds S] [--json]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from harness.hardware.bandwidth import Curve, measure_curve
from harness.hardware.compute import TOKENS, ExpertTime, measure_experts
from harness.hardware.copies import Copies, copy_lines, measure_copies
from harness.hardware.nvml import find_gpu, gpu_state, read_gpus
from harness.hardware.readings import GpuReadings, NvmlReadings
from harness.hardware.verdicts import Judgement, disk_links, judge_disk
from runtime import machine, numa
from runtime.device_options import check_gpu_is_numbered
from runtime.errors import DeviceError, UsageError, cli_main
from runtime.host_memory import HostMemory, host_memory
from runtime.machine import format_bytes

if TYPE_CHECKING:
    from runtime.facts import ModelFacts
    from runtime.model import LoadedModel

DEMO_EXPERT_BYTES = 1 << 20
"""Of the widened demo model that is probed and tuned where no other is named."""
BUDGET_S = 9.0
_ENGINE_SHARE, _CURVE_SHARE, _COMPUTE_SHARE = 0.08, 0.62, 0.3
_COPIES_SHARE = 3.0  # beside these: a GPU has more kinds of copies than a disk has of reads
_LARGEST_COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Probe:
    """Facts of the machine, and what it reaches with the files and the experts of one model.

    Attributes:
        device: "cpu", or "cuda:NAME" of the GPU whose copies were timed.
        curve: disk to memory. compute: one expert on the CPU. copies: between host and that GPU; None without one.
        verdicts: on the disk and on the GPU's link. gpu_compute: one expert on the GPU.
    """

    device: str
    num_cpus: int
    host: HostMemory
    nvml: NvmlReadings
    model: str
    curve: Curve
    compute: tuple[ExpertTime, ...]
    copies: Copies | None
    verdicts: tuple[Judgement, ...]
    gpu_compute: tuple[ExpertTime, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        host = {**asdict(self.host), "pinnable_bytes": self.host.pinnable_bytes}
        return {**asdict(self), "host": host, "hardware": machine.fingerprint(self.device)}

    def describe(self) -> str:
        """A block for people."""
        nvml = self.nvml
        driver = nvml.num_gpus if nvml.num_gpus.value is None else f"driver {nvml.driver}, CUDA {nvml.cuda}"
        lines = [
            f"device     {self.device}, {self.num_cpus} cores",
            f"memory     {_memory_line(self.host)}",
            f"NVML       {driver}",
            *(line for gpu in nvml.gpus for line in _gpu_lines(gpu)),
            *_curve_lines(self.curve),
            *_compute_lines(self.compute),
            *_compute_lines(self.gpu_compute, " on the GPU"),
            *(() if self.copies is None else copy_lines(self.copies, _size)),
            *(f"{'verdict' if not number else '':<11}{one.subject}: {one}" for number, one in enumerate(self.verdicts)),
        ]
        return "\n".join(lines)


def take_probe(
    model: str,
    facts: ModelFacts,
    nvml: NvmlReadings,
    *,
    io_threads: int = 2,
    gpu: GpuReadings | None = None,
    budget_s: float = BUDGET_S,
) -> Probe:
    """Measure this machine with the files and experts of `model`, in little more than `budget_s` seconds.

    Args:
        nvml: what was read before. gpu: the one whose copies are timed as well, in three times `budget_s`, and whose
            computing of an expert is, in a third of it.

    Raises:
        ExpertFlowError: the checkpoint cannot be served or read, or CUDA does not see the GPU.
    """
    from runtime.model import checkpoint_files, meta_model
    from runtime.probe import engine_bandwidth

    files, loaded = checkpoint_files(model), meta_model(model)
    copies = None if gpu is None else _copies(gpu, facts.expert_bytes, _COPIES_SHARE * budget_s)
    engine_bytes_per_s = engine_bandwidth(loaded, files, io_threads=io_threads, budget_s=_ENGINE_SHARE * budget_s)
    curve = measure_curve(files, facts.expert_bytes, engine_bytes_per_s, budget_s=_CURVE_SHARE * budget_s)
    disk = judge_disk("disk", curve.best_bytes_per_s, curve.counted_share, disk_links(files[0]))
    return Probe(
        device="cpu" if gpu is None else f"cuda:{gpu.name}",
        num_cpus=machine.cpu_count(),
        host=host_memory(),
        nvml=nvml,
        model=model,
        curve=curve,
        compute=measure_experts(loaded, facts.top_k, budget_s=_COMPUTE_SHARE * budget_s),
        copies=copies,
        verdicts=(disk,) if gpu is None or copies is None else (disk, copies.judge(gpu)),
        gpu_compute=() if gpu is None else _gpu_compute(loaded, facts.top_k, gpu, _COMPUTE_SHARE * budget_s),
    )


def default_model(expert_bytes: int = DEMO_EXPERT_BYTES) -> str:
    """The bundled demo widened to experts of that size, made once and kept."""
    from harness.demo.widen import widened

    return str(widened(expert_bytes))


def check_gpu(index: int, nvml: NvmlReadings) -> GpuReadings:
    """The GPU that `--gpu index` means.

    Raises:
        DeviceError: NVML or CUDA is absent, or there is no such GPU; names the way out.
    """
    gpu = find_gpu(index, nvml)
    from runtime.devices import cuda_index

    try:
        cuda_index(gpu.uuid.value)
    except DeviceError as error:
        raise DeviceError(f"--gpu {index}: {error}") from error
    return gpu


def _copies(gpu: GpuReadings, expert_bytes: int, budget_s: float) -> Copies:
    """From memory near the GPU; two buffers at a time, and no more than a quarter of what is free on the GPU."""
    from harness.hardware.cuda_copies import CudaCopies
    from runtime.devices import cuda_index

    device = CudaCopies(cuda_index(gpu.uuid.value))
    free_bytes = gpu.memory_free_bytes.value or _LARGEST_COPY_BYTES
    largest_bytes = min(_LARGEST_COPY_BYTES, host_memory().pinnable_bytes // 4, free_bytes // 4)
    which = gpu.uuid.value or gpu.index
    try:
        with numa.near(gpu.numa_node.value):
            generation = gpu.pcie_generation_max.value
            return measure_copies(
                device, expert_bytes, largest_bytes, lambda: gpu_state(which), generation, budget_s=budget_s
            )
    finally:
        device.close()


def _gpu_compute(loaded: LoadedModel, top_k: int, gpu: GpuReadings, budget_s: float) -> tuple[ExpertTime, ...]:
    """With one thread: the host only asks for it."""
    from runtime.devices import cuda_index

    device = f"cuda:{cuda_index(gpu.uuid.value)}"
    return measure_experts(loaded, top_k, threads=(1,), budget_s=budget_s, device=device)


def _memory_line(host: HostMemory) -> str:
    limit = "no limit" if host.memlock_bytes is None else f"limit {format_bytes(host.memlock_bytes)}"
    free = f"{format_bytes(host.available_bytes)} free of {format_bytes(host.total_bytes)}"
    return f"{free}, {format_bytes(host.pinnable_bytes)} can be pinned (RLIMIT_MEMLOCK: {limit})"


def _gpu_lines(gpu: GpuReadings) -> Iterator[str]:
    free, total = gpu.memory_free_bytes, gpu.memory_total_bytes
    memory = free if free.value is None or total.value is None else f"{_of(free.value, total.value)}"
    yield f"{f'GPU {gpu.index}':<11}{gpu.name}, {gpu.uuid}, capability {gpu.compute_capability}, {memory}"
    slot, alone = gpu.pcie_generation_max, gpu.gpu_pcie_generation_max
    limited = f"; the GPU alone {alone}" if None not in (slot.value, alone.value) and slot.value != alone.value else ""
    link = f"PCIe {gpu.pcie_generation} x{gpu.pcie_width} now, at most {slot} x{gpu.pcie_width_max}{limited}"
    yield f"{'':11}{link}, NUMA node {gpu.numa_node}, {gpu.pcie_replays} replays"
    reasons, others = gpu.throttle_reasons, gpu.foreign_processes
    throttled = reasons if reasons.value is None else ", ".join(reasons.value) or "not throttled"
    busy = others if others.value is None else f"{len(others.value)} other processes"
    yield f"{'':11}{throttled}, {gpu.temperature_c} °C, {busy}, ECC {_switch(gpu.ecc)}, MIG {_switch(gpu.mig)}"


def _of(part_bytes: int, whole_bytes: int) -> str:
    return f"{format_bytes(part_bytes)} free of {format_bytes(whole_bytes)}"


def _switch(reading: Any) -> str:
    return str(reading) if reading.value is None else "on" if reading.value else "off"


def _curve_lines(curve: Curve) -> Iterator[str]:
    sizes = sorted({point.num_bytes for series in curve.series for point in series.points})
    yield f"disk       {'MB/s at':<18}" + "".join(f"{_size(size):>10}" for size in sizes) + "  latency   asymptote"
    for series in curve.series:
        load = " + load" if series.under_load else ""
        name = f"{'O_DIRECT' if series.direct else 'buffered'} x{series.threads}{load}"
        latency = "-" if series.latency_s is None else f"{series.latency_s * 1e3:.2f} ms"
        asymptote = "-" if series.asymptote_bytes_per_s is None else f"{series.asymptote_bytes_per_s / 1e6:.0f}"
        rates = _cells({point.num_bytes: point.bytes_per_s / 1e6 for point in series.points}, sizes, "{:.0f}".format)
        yield f"{'':11}{name:<18}{rates}  {latency:>7}   {asymptote:>9}"
    engine = f"{curve.engine_bytes_per_s / 1e6:.0f} MB/s at one expert ({format_bytes(curve.expert_bytes)})"
    yield f"engine     {engine}, through its own transfer"


def _compute_lines(times: tuple[ExpertTime, ...], where: str = "") -> Iterator[str]:
    rows: dict[str, dict[int, float]] = {}
    for one in times:
        rows.setdefault(f"{one.kernel}{where or f' x{one.threads}'}", {})[one.num_tokens] = one.seconds * 1e3
    if not times:
        return
    yield f"expert     {'ms for tokens':<18}" + "".join(f"{num_tokens:>10}" for num_tokens in TOKENS)
    for name, row in rows.items():
        yield f"{'':11}{name:<18}{_cells(row, TOKENS, '{:.3f}'.format)}"


def _cells(row: dict[int, float], columns: Any, text: Callable[[float], str]) -> str:
    return "".join(f"{text(row[column]) if column in row else '-':>10}" for column in columns)


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 10} KiB" if num_bytes < 1 << 20 else f"{num_bytes / (1 << 20):.4g} MiB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.probe", description=__doc__)
    parser.add_argument("--model", help="checkpoint whose files are read; default: the demo with 1 MiB experts")
    parser.add_argument("--gpu", type=int, metavar="N", help="time copies to this GPU, too, as nvidia-smi numbers them")
    parser.add_argument("--device", metavar="cpu", help="leave GPUs alone")
    more = "how long to measure; more reaches larger sizes and steadier figures (%(default)s)"
    parser.add_argument("--seconds", type=float, default=BUDGET_S, metavar="S", help=more)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _run(options: argparse.Namespace) -> None:
    if not 0 < options.seconds < float("inf"):
        raise UsageError(f"--seconds {options.seconds}: give a number above 0")
    check_gpu_is_numbered(options)
    nvml = read_gpus()
    gpu = None if options.gpu is None else check_gpu(options.gpu, nvml)
    from runtime.facts import describe

    model = options.model or default_model()
    probe = take_probe(model, describe(model), nvml, gpu=gpu, budget_s=options.seconds)
    print(json.dumps(probe.as_dict()) if options.json else probe.describe())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    options = _parser().parse_args(arguments)
    return cli_main(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
