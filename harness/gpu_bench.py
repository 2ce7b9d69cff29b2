"""Systems on a GPU side by side: `python -m harness.gpu_bench --shape olmoe-1b-7b --out FOLDER`.

The demo widened to the expert width of a model, on the demo's own grid of layers and experts: resident, offloaded at
several residencies, on demand, copied synchronously, plain transformers, and accelerate's CPU offload. They decode
replayed held-out text one token at a time and prefill a long prompt. One JSON file, written anew after every system.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.device_options import add_device_options, named_device
from runtime.errors import UsageError, cli_main
from runtime.files import write_atomic
from runtime.machine import parse_bytes

if TYPE_CHECKING:
    from harness.measure.gpu_contest import GpuContest
    from harness.measure.gpu_visits import Visit
    from runtime.facts import ModelFacts


JsonDict = dict[str, Any]


class Width(NamedTuple):
    """Hidden and intermediate size of a model's experts."""

    hidden_size: int
    intermediate_size: int


SHAPES = {
    "olmoe-1b-7b": Width(2048, 1024),
    "deepseek-v2-lite": Width(2048, 1408),
    "qwen3-30b-a3b": Width(2048, 768),
}
BUDGET_S = 510.0  # of nine minutes: interpreters have to start and to end


def _checkpoint(shape: str) -> Path:
    """The demo at that width, made where it is not there yet."""
    from harness.demo.widen import widened

    if shape in SHAPES:
        hidden, intermediate = SHAPES[shape]
        return widened(6 * hidden * intermediate, hidden_size=hidden)
    try:
        expert_bytes = parse_bytes(shape)
    except UsageError as error:
        raise UsageError(f"--shape {shape}: give a size such as 12MiB, or one of {', '.join(SHAPES)}") from error
    return widened(expert_bytes)


def _described(shape: str, facts: ModelFacts) -> JsonDict:
    found, config = facts.identity, facts.config
    of = f"the expert width of {shape}" if shape in SHAPES else "that expert size"
    grid = f"{found.layers} layers x {found.experts} experts, top-{found.top_k}"
    return {
        "name": shape,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.moe_intermediate_size,
        "expert_bytes": facts.expert_bytes,
        "described": f"the demo at {of} ({config.hidden_size} x {config.moe_intermediate_size}, {found.dtype}) "
        f"on its own grid of {grid}",
    }


class _Report:
    """The file of a run."""

    def __init__(self, options: argparse.Namespace, facts: ModelFacts) -> None:
        from harness.measure.provenance import provenance

        self.label = options.shape if options.shape in SHAPES else f"expert{facts.expert_bytes}"
        self._folder = options.out
        self._head = {
            **provenance("harness.gpu_bench", datetime.now(UTC)),
            "shape": _described(options.shape, facts),
            "model": facts.identity.model_dump(),
            "dense_bytes": facts.dense_bytes,
            "experts_bytes": facts.num_experts_total * facts.expert_bytes,
            "workload": {
                name: getattr(options, name) for name in ("requests", "prompt_tokens", "output_tokens", "long_tokens")
            },
        }

    def save(self, contest: GpuContest) -> list[JsonDict]:
        """Write all that is known; the goals as they stand."""
        from harness.measure.gpu_figures import derived, goals

        figures = derived(contest.systems, self._head["experts_bytes"])
        found = goals(contest.systems, figures)
        report = {
            **self._head,
            "gpu": contest.gpu,
            "memory_rate": contest.memory_rate,
            "systems": contest.systems,
            "derived": figures,
            "goals": found,
            "left_out": contest.left_out,
        }
        write_atomic(self._folder / f"bench-{self.label}.json", json.dumps(report, indent=1) + "\n")
        return found

    def save_profile(self, name: str, text: str) -> None:
        """Beside it."""
        plain = re.sub("[^A-Za-z0-9.]+", "-", name).strip("-")
        write_atomic(self._folder / f"profile-{self.label}-{plain}.txt", text)


def _run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    if options.table is not None:
        from harness.report.gpu import markdown

        print(markdown(options.table, list(SHAPES)))
        return 0

    from runtime.devices import find_device, is_gpu
    from runtime.profile import Profile

    device = named_device(options) or "cuda:0"
    if not is_gpu(find_device(device, Profile.default())):
        raise UsageError(f"--device {device}: this compares systems on a GPU; name cuda or cuda:N")
    return _compare(options, device, started)


def _compare(options: argparse.Namespace, device: str, started: float) -> int:
    """Measure the systems and say what was met, by `options.budget_s` after `started` (`time.perf_counter`); the exit
    code."""
    from harness.measure.gpu_contest import GpuContest
    from harness.measure.gpu_runs import GpuWorkload
    from harness.report.gpu import goal_lines, system_line
    from runtime.facts import describe

    checkpoint = _checkpoint(options.shape)
    facts = describe(checkpoint)
    wanted = _wanted(options, facts.top_k)
    workload = GpuWorkload.of(
        checkpoint,
        num_requests=options.requests,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        long_tokens=options.long_tokens,
    )
    report = _Report(options, facts)

    def on_entry(name: str) -> None:
        report.save(contest)
        print(system_line(name, contest.systems[name]), flush=True)

    contest = GpuContest(
        str(checkpoint),
        device,
        facts,
        workload,
        end_s=started + options.budget_s,
        on_entry=on_entry,
        on_profile=report.save_profile,
        profiled=options.profile,
    )
    print(f"{checkpoint.name}, ready after {time.perf_counter() - started:.0f} s", flush=True)
    contest.run(wanted)
    goals = report.save(contest)
    for line in goal_lines(goals):
        print(line)
    if contest.left_out:
        print(f"no time was left for {', '.join(contest.left_out)}")
    failed = [name for name, one in contest.systems.items() if "error" in one]
    return 1 if failed else 0


def _wanted(options: argparse.Namespace, top_k: int) -> list[Visit]:
    """All, or those that were named."""
    from harness.measure.gpu_visits import visits

    every = list(visits(top_k))
    known = ["resident", *(one.name for one in every)]
    for name in (*(options.only or ()), *options.profile):
        if name not in known:
            raise UsageError(f"no system is called {name!r}; known: {', '.join(map(repr, known))}")
    return [one for one in every if not options.only or one.name in options.only]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.gpu_bench", description=__doc__.split("\n\n")[0])
    shapes = f"expert width of {', '.join(SHAPES)}, or a size of one expert (default %(default)s)"
    parser.add_argument("--shape", default="olmoe-1b-7b", help=shapes)
    add_device_options(parser, "default: cuda:0")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder (default %(default)s)")
    parser.add_argument("--requests", type=int, default=6, help="decoded, after one to warm up (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--long-tokens", type=int, default=2048, help="of the prompt that is prefilled (%(default)s)")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="for all of it (default %(default)s)")
    only = 'measure this system beside the resident one only, such as "25 %%"; may be repeated'
    parser.add_argument("--only", action="append", metavar="NAME", help=only)
    parser.add_argument(
        "--profile", action="append", default=[], metavar="NAME", help="also profile this system; may be repeated"
    )
    table = "measure nothing; print what that folder holds as Markdown"
    parser.add_argument("--table", type=Path, metavar="FOLDER", help=table)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`. 1: a system failed, and the file says how."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the systems' processes end with it
    return cli_main(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
