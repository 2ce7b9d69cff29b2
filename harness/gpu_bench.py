"""Systems on a GPU side by side: `python -m harness.gpu_bench --expert-bytes 12MiB --hidden-size 2048 --out FOLDER`.

The demo widened to the expert width that is asked for, decoded one token at a time by replayed held-out text, and a
long prompt: resident, offloaded at several residencies, with and without prefetch, on-demand copies, plain
transformers, and accelerate's CPU offload. One JSON file, written anew after every system.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.errors import UsageError, cli_main
from runtime.files import write_atomic
from runtime.machine import format_bytes, parse_bytes

if TYPE_CHECKING:
    import torch

    from harness.measure.gpu_runs import System, Systems

_PROFILED_TOKENS = 9  # more would take minutes to sum up
_SLOW_TOKENS = 4
NO_PREFETCH = {"prefetch.depth": 0, "predictor.kind": "none"}
AHEAD = {"prefetch.on_trial": False}


class Contender(NamedTuple):
    """A system and the overrides of the profile that it runs with."""

    name: str
    kind: str
    overrides: dict[str, Any]
    num_requests: int | None = None
    has_prefill: bool = True


def contenders(top_k: int, num_experts: int) -> Iterator[Contender]:
    """In the order in which they are measured: the most telling first."""
    yield Contender("resident", "resident", {})
    yield Contender("25 %", "offloaded", {"cache.slots": "25%", **NO_PREFETCH})
    yield Contender("25 %, prefetch", "offloaded", {"cache.slots": "25%", **AHEAD})
    yield Contender("25 %, LRU", "offloaded", {"cache.slots": "25%", "cache.policy": "lru", **NO_PREFETCH})
    yield Contender("on demand", "offloaded", {"cache.slots": top_k, "cache.policy": "lru", **NO_PREFETCH})
    yield Contender("accelerate", "accelerate", {}, num_requests=1, has_prefill=False)
    yield Contender("transformers", "transformers", {})
    for share in ("6.25%", "10%", "50%", "100%"):
        yield Contender(f"{share.rstrip('%')} %", "offloaded", {"cache.slots": share, **NO_PREFETCH})


def _measure(system: System, contender: Contender, workload: Any, most_tokens: int) -> dict[str, Any]:
    """The figures of one system; a slow one decodes one request, shortened, and no long prompt."""
    from dataclasses import replace

    if contender.num_requests is not None:
        short = [replace(one, output_ids=one.output_ids[:most_tokens]) for one in workload.requests]
        workload = replace(workload, requests=tuple(short[: contender.num_requests + 1]))
    if not contender.has_prefill:
        workload = replace(workload, long_prompt=())
    return system.measure(workload)


def _profile(system: System, request: Any, file: Path) -> None:
    """What the host and the GPU spend the time of a short request on."""
    from dataclasses import replace

    from torch.profiler import ProfilerActivity, profile

    few = replace(request, output_ids=request.output_ids[:_PROFILED_TOKENS])
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        seconds = system.step_s(few)
    averages = seen.key_averages()
    tables = [averages.table(sort_by=by, row_limit=25) for by in ("self_cpu_time_total", "self_cuda_time_total")]
    write_atomic(file, f"{seconds:.4f} s\n" + "\n".join(tables))


def _line(name: str, found: dict[str, Any]) -> str:
    parts = [f"{name:<16}{found['tokens_per_s']:9.1f} tokens/s {found['tpot_ms_p50']:8.2f} ms"]
    if "bytes_per_token" in found:
        parts.append(f"{format_bytes(found['bytes_per_token'])} per token, {found['hit_rate']:.1%} hits")
        parts.append(f"copies alone {found['replay_ms_per_token']:.2f} ms, stall {found['stall_ms_per_token']:.2f}")
    if found["prefill"]:
        parts.append(f"prefill {min(found['prefill']['seconds']) * 1e3:.0f} ms")
    parts.append(f"{format_bytes(found['peak_gpu_bytes'])} of GPU memory")
    return ", ".join(parts)


def _run(options: argparse.Namespace) -> None:
    started = time.perf_counter()

    from harness.demo.widen import widened
    from harness.measure.gpu_runs import GpuWorkload, Systems
    from harness.measure.provenance import provenance
    from runtime.devices import find_device, is_gpu
    from runtime.facts import describe
    from runtime.profile import Profile

    device = find_device(options.device, Profile.default())
    if not is_gpu(device):
        raise UsageError(f"--device {options.device}: this compares systems on a GPU; name cuda or cuda:N")
    checkpoint = widened(parse_bytes(options.expert_bytes), hidden_size=options.hidden_size)
    facts = describe(checkpoint)
    workload = GpuWorkload.of(
        checkpoint,
        num_requests=options.requests,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        long_tokens=options.long_tokens,
    )
    systems = Systems(checkpoint, device)
    out = options.out / f"bench-expert{facts.expert_bytes}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        **provenance("harness.gpu_bench", datetime.now(UTC)),
        "gpu": _gpu(device),
        "model": facts.identity.model_dump(),
        "dense_bytes": facts.dense_bytes,
        "experts": facts.num_experts_total,
        "systems": {},
    }
    print(f"{checkpoint.name}, ready after {time.perf_counter() - started:.0f} s", flush=True)
    for contender in contenders(facts.top_k, facts.num_experts_total):
        if options.only and contender.name not in options.only:
            continue
        if time.perf_counter() - started > options.budget_s:
            print(f"no time left for {contender.name}")
            continue
        found = _one(systems, contender, workload, options, out.parent)
        report["systems"][contender.name] = {"overrides": contender.overrides, **found}
        write_atomic(out, json.dumps(report, indent=1) + "\n")
        print(found["error"] if "error" in found else _line(contender.name, found), flush=True)


def _one(
    systems: Systems, contender: Contender, workload: Any, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        system: System = getattr(systems, contender.kind)(contender.overrides)
    except ImportError as error:
        return {"error": f"{contender.name}: {error}"}
    try:
        loaded_s = time.perf_counter() - began
        found = _measure(system, contender, workload, most_tokens=_SLOW_TOKENS)
        if contender.name in options.profile:
            name = re.sub("[^A-Za-z0-9.]+", "-", contender.name)
            _profile(system, workload.requests[1], folder / f"profile-{name}.txt")
        return {"load_s": loaded_s, "total_s": time.perf_counter() - began, **found}
    finally:
        system.close()


def _gpu(device: torch.device) -> dict[str, Any]:
    import torch

    from harness.hardware.nvml import read_gpus

    properties = torch.cuda.get_device_properties(device)
    driver = read_gpus().driver
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": driver.value,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.gpu_bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--expert-bytes", default="12MiB", help="of one expert, at most (default %(default)s)")
    parser.add_argument("--hidden-size", type=int, help="the demo's times a power of two")
    parser.add_argument("--device", default="cuda:0", help="(default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder (default %(default)s)")
    parser.add_argument("--requests", type=int, default=3, help="decoded, after one to warm up (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=128, help="(default %(default)s)")
    parser.add_argument("--long-tokens", type=int, default=2048, help="of the prompt that is prefilled (%(default)s)")
    parser.add_argument("--budget-s", type=float, default=480.0, help="no system is begun later (default %(default)s)")
    parser.add_argument("--only", action="append", metavar="NAME", help="measure this system only; may be repeated")
    parser.add_argument("--profile", action="append", default=[], metavar="NAME", help="also profile this system")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    options = _parser().parse_args(arguments)
    return cli_main(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
