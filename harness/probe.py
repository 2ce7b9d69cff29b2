"""What this machine can do: `python -m harness.probe [--model M] [--gpu N] [--json]`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from harness.hardware.bandwidth import Curve, engine_bandwidth, measure_curve
from harness.hardware.nvml import GpuReadings, NvmlReadings, find_gpu, read_gpus
from runtime import machine
from runtime.errors import DeviceError, cli_main
from runtime.machine import format_bytes

if TYPE_CHECKING:
    from runtime.facts import ModelFacts

DEMO_EXPERT_BYTES = 1 << 20
"""Of the widened demo model that is probed and tuned where no other is named."""


@dataclass(frozen=True)
class Probe:
    """Facts of the machine, and bandwidth on the files of one model."""

    device: str
    num_cpus: int
    memory_total_bytes: int
    memory_available_bytes: int
    nvml: NvmlReadings
    model: str
    curve: Curve

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "hardware": machine.fingerprint(self.device)}

    def describe(self) -> str:
        """A block for people."""
        lines = [
            f"device     {self.device}, {self.num_cpus} cores",
            f"memory     {format_bytes(self.memory_available_bytes)} free of {format_bytes(self.memory_total_bytes)}",
            *(_gpu_line(gpu) for gpu in self.nvml.gpus),
            f"NVML       {self.nvml.num_gpus if self.nvml.num_gpus.value is None else f'driver {self.nvml.driver}'}",
            *_curve_lines(self.curve),
        ]
        return "\n".join(lines)


def take_probe(model: str, facts: ModelFacts, nvml: NvmlReadings, *, io_threads: int = 2) -> Probe:
    """Measure this machine with the files of `model`, in some eight seconds.

    Raises:
        ExpertFlowError: the checkpoint cannot be served or read.
    """
    from runtime.model import checkpoint_files

    files = checkpoint_files(model)
    engine_bytes_per_s = engine_bandwidth(model, io_threads=io_threads)
    return Probe(
        device="cpu",
        num_cpus=machine.cpu_count(),
        memory_total_bytes=machine.total_memory_bytes(),
        memory_available_bytes=machine.available_memory_bytes(),
        nvml=nvml,
        model=model,
        curve=measure_curve(files, facts.expert_bytes, engine_bytes_per_s),
    )


def default_model() -> str:
    """The bundled demo widened to 1 MiB experts, made once and kept."""
    from harness.demo.widen import widened

    return str(widened(DEMO_EXPERT_BYTES))


def check_gpu(index: int, nvml: NvmlReadings) -> GpuReadings:
    """The GPU that `--gpu index` means.

    Raises:
        DeviceError: NVML or CUDA is absent, or there is no such GPU; names the way out.
    """
    gpu = find_gpu(index, nvml)
    import torch

    if not torch.cuda.is_available():
        raise DeviceError(f"--gpu {index}: this torch ({torch.__version__}) sees no CUDA; run with --device cpu")
    return gpu


def _gpu_line(gpu: GpuReadings) -> str:
    free = gpu.memory_free_bytes
    memory = free if free.value is None else f"{format_bytes(free.value)} free"
    link = f"PCIe {gpu.pcie_generation} x{gpu.pcie_width} (at most {gpu.pcie_generation_max} x{gpu.pcie_width_max})"
    return f"GPU {gpu.index}      {gpu.name}, {memory}, {link}"


def _curve_lines(curve: Curve) -> list[str]:
    sizes = [point.num_bytes for point in curve.series[0].points]
    lines = [f"disk       {'MB/s at':<18}" + "".join(f"{_size(size):>9}" for size in sizes) + "  latency   asymptote"]
    for series in curve.series:
        name = f"{'O_DIRECT' if series.direct else 'buffered'} x{series.threads}"
        latency = "-" if series.latency_s is None else f"{series.latency_s * 1e3:.2f} ms"
        asymptote = "-" if series.asymptote_bytes_per_s is None else f"{series.asymptote_bytes_per_s / 1e6:.0f}"
        rates = "".join(f"{point.bytes_per_s / 1e6:>9.0f}" for point in series.points)
        lines.append(f"{'':11}{name:<18}{rates}  {latency:>7}   {asymptote:>9}")
    engine = f"{curve.engine_bytes_per_s / 1e6:.0f} MB/s at one expert ({format_bytes(curve.expert_bytes)})"
    return [*lines, f"engine     {engine}, through its own transfer"]


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 10} KiB" if num_bytes < 1 << 20 else f"{num_bytes / (1 << 20):.4g} MiB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.probe", description=__doc__)
    parser.add_argument("--model", help="checkpoint whose files are read; default: the demo with 1 MiB experts")
    parser.add_argument("--gpu", type=int, metavar="N", help="the GPU to ask for; fails where it cannot be used")
    parser.add_argument("--device", choices=["cpu"], help="cpu is all that can be measured yet")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _run(options: argparse.Namespace) -> None:
    nvml = read_gpus()
    if options.gpu is not None:
        check_gpu(options.gpu, nvml)
    from runtime.facts import describe

    model = options.model or default_model()
    probe = take_probe(model, describe(model), nvml)
    print(json.dumps(probe.as_dict()) if options.json else probe.describe())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    options = _parser().parse_args(arguments)
    return cli_main(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
