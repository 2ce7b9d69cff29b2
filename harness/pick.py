"""Another point of a finished search as a profile, without measuring again: `python -m harness.pick --run R …`.

Limits and objective that are not given are those of the run; with none given, it is the configuration that the run
itself chose.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from harness.report.messages import configuration_text, infeasible_text
from harness.report.run_file import Figures, Point, RunFile, load_run
from harness.search.objective import Objective
from harness.search.outcome import Limits, Tried, feasible, front
from harness.search.space import params_key
from runtime.errors import ExpertFlowError, cli_main
from runtime.files import check_writable, write_named
from runtime.machine import format_bytes
from runtime.profile import Profile, dump_profile


class NothingFitsError(ExpertFlowError):
    """No configuration of the run is within the limits."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.pick", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder that harness.tune wrote")
    memory = "limit on what the process takes of the memory, such as 6GiB; of a run on a GPU: of the GPU's"
    parser.add_argument("--max-memory", metavar="SIZE", help=memory)
    parser.add_argument("--slo-tpot", type=float, metavar="MS", help="limit on the time per output token, p50")
    parser.add_argument("--slo-ttft", type=float, metavar="MS", help="limit on the time to the first token, p50")
    parser.add_argument("--objective", choices=[str(one) for one in Objective], help="what to make small")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="of the profile; default: picked.yaml in the run's folder"
    )
    parser.add_argument("--list", action="store_true", help="show the front within the limits and write nothing")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    return cli_main(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    run = load_run(options.run)
    limits = _limits(options, run.limits)
    objective = run.objective if options.objective is None else Objective(options.objective)
    point = pick(run, limits, objective)
    if options.list:
        print(listing(run, limits, point))
        return
    folder = options.run if options.run.is_dir() else options.run.parent
    out = options.out or folder / "picked.yaml"
    check_writable("--out", out)
    write_named("--out", out, dump_profile(_profile(run, point, limits, given)))
    print(f"{described(run, point)}\nprofile    {out}")


def pick(run: RunFile, limits: Limits, objective: Objective) -> Point:
    """The best configuration of a run within `limits`.

    One that was measured beside the default, and failed or was not found better by the run's own objective, is not
    taken for better.

    Raises:
        NothingFitsError: there is none; it says which limit is exceeded, by how much, and the closest configuration.
    """
    chosen = run.point(run.chosen)
    if (limits, objective) == (run.limits, run.objective) and chosen is not None:
        return chosen
    tried = _usable(run)
    within = feasible(tried, limits)
    if not within:
        raise NothingFitsError(infeasible_text(tried, limits) if tried else "no configuration of this run ever ran")
    default = next((one for one in within if one.params == run.default), None)
    ranked = [one for one in objective.rank(within, default) if default is None or not _is_refuted(run, one, objective)]
    return next(point for point in run.points if point.params == ranked[0].params)


def _usable(run: RunFile) -> list[Tried]:
    return [run.tried(point) for point in run.points if point.params not in run.failed]


def _is_refuted(run: RunFile, one: Tried, objective: Objective) -> bool:
    found = run.confirmed
    return found is not None and objective is run.objective and not found.is_proven and one.params == found.params


def listing(run: RunFile, limits: Limits, chosen: Point) -> str:
    """The front within `limits` as a table, with the default and what would be picked."""
    from harness.report.tables import front_table, front_text, with_marked

    values = {params_key(point.params): point.values for point in run.points}
    point = run.point(run.default)
    default = None if point is None else run.tried(point)
    shown = with_marked(front(feasible(_usable(run), limits)), default, run.tried(chosen))
    table = front_table(shown, default, chosen.params, lambda params: values[params_key(params)])
    return front_text(table, (point or chosen).values, run.num_experts, memory=run.memory)


def described(run: RunFile, point: Point) -> str:
    """What was picked, its figures, and how they compare with the default's."""
    found = run.figures(point).objectives
    lines = [
        f"picked     {configuration_text(point.params)}",
        f"figures    {_figure(found.latency_ms_p50)} ms per output token, TTFT {_figure(found.ttft_ms_p50)} ms, "
        f"{_figure(found.tokens_per_s)} tokens/s, peak {run.memory} {format_bytes(found.peak_memory_bytes or 0)}",
        f"default    {'this is it' if point.params == run.default else _compared(run.figures(point), run.memory)}",
    ]
    return "\n".join(lines)


def _compared(figures: Figures, which: str) -> str:
    found, baseline, ratio, pairs = figures
    if baseline is None:
        return "did not run"
    latency = _share(found.latency_ms_p50, baseline.latency_ms_p50)
    memory = _share(found.peak_memory_bytes, baseline.peak_memory_bytes)
    sure = (
        "from the search alone, not confirmed side by side"
        if ratio is None
        else f"{ratio.confidence:.1%} interval of the latency {ratio.low:.2f} to {ratio.high:.2f}, {pairs} pairs"
    )
    return f"{latency} of its latency, {memory} of its peak {which} ({sure})"


def _figure(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"


def _share(one: float | None, other: float | None) -> str:
    return "?" if one is None or other is None else f"{one / other:.2f}"


def _profile(run: RunFile, point: Point, limits: Limits, given: Sequence[str]) -> Profile:
    """It can be had again by the run's command and then this one."""
    own = shlex.join(["python", "-m", "harness.pick", *given])
    provenance = run.provenance.model_copy(
        update={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": f"{run.provenance.command} && {own}",
        }
    )
    return run.profile(point, limits=limits, provenance=provenance)


def _limits(options: argparse.Namespace, own: Limits) -> Limits:
    given = asdict(Limits.parse(options.max_memory, options.slo_tpot, options.slo_ttft))
    return replace(own, **{name: value for name, value in given.items() if value is not None})


if __name__ == "__main__":
    sys.exit(main())
