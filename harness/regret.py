"""How far from the optimum the search ends, where the optimum is known: `python -m harness.regret [--seeds N] …`.

The machine is simulated with coefficients that the search does not see: each 10 to 30 % above or below those that its
own simulator begins with, runs that scatter by 4 %, memory 4 % above the memory model. The whole grid is tabulated for
the optimum under the memory limit. `--out` of an earlier run goes on with it: what is there is kept.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import UsageError, cli_main

if TYPE_CHECKING:
    from harness.measure.regret_file import Results
    from harness.measure.regret_runs import Variant
    from harness.search.problem import Problem

TRACE = Path(__file__).parents[1] / "tests" / "data" / "demo-routing.npz"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness.regret", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="machines to search on (%(default)s)")
    parser.add_argument("--trials", type=int, default=40, metavar="N", help="launched in a search (%(default)s)")
    parser.add_argument("--samplers", default="tpe", help="several with commas: tpe, gp, nsga2, random (%(default)s)")
    parser.add_argument("--no-guide", action="store_true", help="the sampler alone: no proposals by the simulator")
    parser.add_argument("--trace", type=Path, default=TRACE, help="of a workload, with phases; default: the demo's")
    parser.add_argument("--concurrency", type=int, default=4, metavar="N", help="requests outstanding (%(default)s)")
    parser.add_argument("--tokens", type=int, default=12, metavar="N", help="of each request's output (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="fix one more profile key")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes; default: one for each core")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: results/regret/TIME.json; a .csv beside it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    options = _parser().parse_args(argv)
    return cli_main(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything of this or a further process computes

    from harness.measure.regret_file import Results
    from harness.measure.resumable import result_path
    from runtime import machine

    variants = _checked(options)
    problem = _problem(options)
    results = Results.open(result_path(options.out, "regret"), _about(problem, options.trials))
    print(f"grid       {problem.space.size()} configurations of {', '.join(knob.name for knob in problem.space.knobs)}")
    tasks = list(_missing(results, problem, options, variants))
    _work_off(tasks, results, options.jobs or machine.cpu_count())
    results.save()
    _report(results, [asdict(variant) for variant in variants])
    print(f"result     {results.path}, {results.path.with_suffix('.csv').name}")


def _checked(options: argparse.Namespace) -> list[Variant]:
    from harness.measure.regret_runs import Variant
    from harness.search.study import SAMPLERS

    for name, least in (("seeds", 1), ("trials", 2), ("concurrency", 1), ("tokens", 2), ("jobs", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}: at least {least} is needed")
    samplers = [name.strip() for name in options.samplers.split(",")]
    if unknown := [name for name in samplers if name not in SAMPLERS or name == "brute"]:
        known = ", ".join(name for name in SAMPLERS if name != "brute")
        raise UsageError(f"--samplers {unknown[0]!r} is not one that can be compared; take {known}")
    return [Variant(name, is_guided=not options.no_guide) for name in dict.fromkeys(samplers)]


def _problem(options: argparse.Namespace) -> Problem:
    from harness.search.problem import FIXED, Problem
    from runtime.profile import parse_overrides

    fixed = {**FIXED, **parse_overrides(options.set)}
    return Problem(options.trace, options.tokens, options.concurrency, tuple(fixed.items()))


def _about(problem: Problem, num_trials: int) -> dict[str, Any]:
    """What figures depend on beside the seed; JSON."""
    from harness.search import hidden

    memory = problem.memory
    return {
        "trace": problem.trace.name,
        "trace_sha256": sha256(problem.trace.read_bytes()).hexdigest(),
        "output_tokens": problem.num_output_tokens,
        "concurrency": problem.concurrency,
        "fixed": [list(pair) for pair in problem.fixed],
        "grid": problem.space.size(),
        "space": problem.space.digest(),
        "memory": asdict(memory),
        "max_memory_bytes": problem.limit_bytes,
        "trials": num_trials,
        "bias": [hidden.LEAST_BIAS, hidden.MOST_BIAS],
        "noise": hidden.NOISE,
        "memory_above_model": hidden.MEMORY_ABOVE_MODEL,
    }


@dataclass(frozen=True)
class _Task:
    """The optimum of a seed, or one search."""

    problem: Problem
    seed: int
    variant: Variant | None
    num_trials: int


def _missing(
    results: Results, problem: Problem, options: argparse.Namespace, variants: Sequence[Variant]
) -> Generator[_Task]:
    bare = replace(problem)  # without what was worked out here: it travels to other processes
    for seed in range(options.seeds):
        if seed not in results.optima:
            yield _Task(bare, seed, None, options.trials)
    for seed in range(options.seeds):
        for variant in variants:
            if not results.has(seed, variant):
                yield _Task(bare, seed, variant, options.trials)


def _work_off(tasks: Sequence[_Task], results: Results, num_jobs: int) -> None:
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    with (
        tqdm(total=len(tasks), unit="task", desc="searching", disable=quiet) as bar,
        closing(_done(tasks, min(num_jobs, len(tasks)))) as done,
    ):
        for number, (task, found) in enumerate(done, 1):
            results.add(task.seed, task.variant, found)
            line = _line(results, task, found)
            bar.set_postfix_str(line, refresh=False)
            bar.update()
            if quiet:
                print(f"{number:4} of {len(tasks)}  {line}", flush=True)


def _done(tasks: Sequence[_Task], num_jobs: int) -> Generator[tuple[_Task, dict[str, Any]]]:
    """Every task and what it came to, in the order in which they end; closed early, the processes are ended."""
    if num_jobs <= 1:
        yield from map(_work, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap_unordered(_work, tasks)


def _work(task: _Task) -> tuple[_Task, dict[str, Any]]:
    """Perhaps in a process of the pool."""
    from harness.measure.regret_runs import search_once

    problem = _kept(task.problem)
    if task.variant is not None:
        return task, search_once(problem, task.seed, task.variant, task.num_trials).as_dict()
    optimum = problem.hidden(task.seed, problem.guard()).optimum(problem.space.configurations())
    return task, optimum._asdict()


@cache
def _kept(problem: Problem) -> Problem:
    """The first one that is equal, with what was worked out for it."""
    return problem


def _line(results: Results, task: _Task, found: dict[str, Any]) -> str:
    if task.variant is None:
        return f"seed {task.seed}: at best {found['latency_ms']:.1f} ms, {found['num_fit']} configurations fit"
    regret = results.regret(task.seed, found["latency_ms"])
    known = "" if regret is None else f"{regret:.2%} above the best, "
    return f"seed {task.seed}, {task.variant.sampler}: {known}{found['num_infeasible']} trials out of memory"


def _report(results: Results, variants: Sequence[dict[str, Any]]) -> None:
    from harness.report.regret import figures, table_text, verdict

    about, table = results.about, figures(results.table())
    fit = [optimum["num_fit"] / about["grid"] for optimum in results.optima.values()]
    print(f"fits       {sum(fit) / len(fit):.0%} of it within {about['max_memory_bytes'] / 1e6:.0f} MB\n")
    print(f"{table_text(table)}\n")
    for row in (dict(zip(table.columns, values, strict=True)) for values in table.itertuples(index=False)):
        if {name: row[name] for name in variants[0]} in variants:
            print(f"{verdict(row)}\n")


if __name__ == "__main__":
    sys.exit(main())
