"""Whether the simulator and the memory model can be believed: `python -m harness.fidelity [--model M] …`.

Configurations are drawn by Latin hypercube and written down before anything is measured. Each is then measured beside
the default, as the tuner would measure it; the simulator is calibrated on the first few pairs alone and foretells every
ratio to the default, the memory model every peak. `--out` of an earlier run goes on with it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import UsageError, cli_main
from runtime.files import write_named

if TYPE_CHECKING:
    from harness.measure.fidelity_file import Results
    from harness.measure.fidelity_runs import Pair
    from harness.search.outcome import Outcome
    from harness.search.setup import Settings, Setup

DEFAULT_MAX_MEMORY = "704MiB"
"""Of the demo, as in `make tune`."""
_BUDGET_S = 150.0
"""Of a search, which the sizes of a run depend on: short ones, since every configuration runs four times."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness.fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="checkpoint folder or hub id; default: the demo with 1 MiB experts")
    parser.add_argument(
        "--max-memory", default=DEFAULT_MAX_MEMORY, metavar="SIZE", help="limit on the process (%(default)s)"
    )
    parser.add_argument("--configurations", type=int, default=24, metavar="N", help="to draw (%(default)s)")
    parser.add_argument("--calibration", type=int, default=8, metavar="N", help="to calibrate on (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the hypercube (%(default)s)")
    parser.add_argument("--workload", type=Path, metavar="FILE", help="JSON lines with text; default: bundled text")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests outstanding (%(default)s)")
    parser.add_argument(
        "--context", type=int, default=1024, metavar="N", help="tokens to have memory for (%(default)s)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="fix a profile key")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: results/fidelity/TIME.json; a .csv and a .png beside it"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    options = _parser().parse_args(argv)
    return cli_main(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    from harness.measure.fidelity_file import Results
    from harness.measure.resumable import result_path
    from harness.search.setup import prepare

    for name, least in (("configurations", 2), ("calibration", 0), ("seed", 0), ("concurrency", 1), ("context", 1)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name} {getattr(options, name)}: at least {least} is needed")
    out = result_path(options.out, "fidelity")
    with tempfile.TemporaryDirectory(prefix="expertflow-fidelity-") as scratch:
        settings = _settings(options, Path(scratch) / "run")
        results = Results.open(out, _about(settings, options))
        setup = prepare(settings)
        settings.folder.mkdir()
        setup = _declare(results, setup, options)
        _measure(results, setup)
        _conclude(results, setup)


def _settings(options: argparse.Namespace, folder: Path) -> Settings:
    from harness.probe import default_model
    from harness.search.objective import Objective
    from harness.search.outcome import Limits
    from harness.search.setup import Settings
    from runtime.machine import parse_bytes
    from runtime.profile import parse_overrides

    return Settings(
        model=options.model or default_model(),
        label="demo-1MiB" if options.model is None else Path(options.model).name,
        command="python -m harness.fidelity",
        folder=folder,
        profile=folder / "unused.yaml",
        limits=Limits(max_memory_bytes=parse_bytes(options.max_memory)),
        objective=Objective.LATENCY,
        budget_s=_BUDGET_S,
        num_trials=None,
        sampler="tpe",
        seed=options.seed,
        storage=None,
        resume=False,
        workload=options.workload,
        concurrency=options.concurrency,
        context=options.context,
        fixed=parse_overrides(options.set),
    )


def _about(settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """What a run is of; JSON."""
    return {
        "model": settings.label,
        "workload": "bundled" if settings.workload is None else settings.workload.name,
        "concurrency": settings.concurrency,
        "context": settings.context,
        "max_memory_bytes": settings.limits.max_memory_bytes,
        "fixed": dict(settings.fixed),
        "seed": options.seed,
        "num_configurations": options.configurations,
        "num_calibration": options.calibration,
    }


def _declare(results: Results, setup: Setup, options: argparse.Namespace) -> Setup:
    """Draw the configurations and write them down, or take those of the file; the setup that they are of."""
    from harness.search.hypercube import latin_hypercube
    from harness.search.plan import Sizes
    from harness.search.space import Setting

    if results.declared:
        known = results.declared
        space = setup.space.within(Setting(**known["setting"]))
        return replace(setup, space=space, sizes=Sizes(**known["sizes"]), default_s=known["default_s"])
    drawn = latin_hypercube(
        setup.space, options.configurations, seed=options.seed, accepts=lambda params: not setup.guard.excess(params)
    )
    if len(drawn) < options.configurations:
        raise UsageError(f"--configurations {options.configurations}: only {len(drawn)} others than the default fit; "
                         "ask for fewer, or fix fewer keys")  # fmt: skip
    results.declared = {
        "configurations": drawn,
        "setting": asdict(setup.space.setting),
        "sizes": asdict(setup.sizes),
        "default_s": setup.default_s,
    }
    results.save()
    return setup


def _measure(results: Results, setup: Setup) -> None:
    from tqdm import tqdm

    from harness.measure.fidelity_runs import measure_pairs, watched

    number = len(results.configurations)
    print(f"\nrun        {setup.sizes}, {setup.settings.concurrency} outstanding, each beside the default")
    print(f"drawn      {number} configurations, written to {results.path}", flush=True)
    began_s, num_before, quiet = time.monotonic(), len(results.pairs), not sys.stderr.isatty()
    with tqdm(total=number, initial=num_before, unit="pair", desc="measuring", disable=quiet) as bar:

        def on_pair(pair: Pair) -> None:
            results.pairs.append(pair)
            results.save()
            bar.update()
            if quiet:
                left = number - len(results.pairs)
                left_s = left * (time.monotonic() - began_s) / (len(results.pairs) - num_before)
                print(f"pair {len(results.pairs):3} of {number}  {_line(pair)}  {left_s / 60:.0f} min left", flush=True)

        overrides = setup.measurer().overrides
        run = watched(lambda params: _trial(setup, overrides(params)))
        measure_pairs(results.configurations, setup.space.default, run, results.pairs, on_pair)


def _trial(setup: Setup, overrides: dict[str, Any]) -> Outcome:
    from harness.search.plan import timeout_s
    from harness.search.trial import TrialSpec, measure

    settings = setup.settings
    requests = setup.texts.requests(setup.sizes)["search"]
    spec = TrialSpec(settings.model, overrides, requests, settings.concurrency)
    return setup.runner.run(measure, spec, timeout_s(setup.default_s))


def _line(pair: Pair) -> str:
    if not pair.is_ok:
        failed = next(one for one in (*pair.configuration, *pair.default) if one.kind != "ok")
        return f"{failed.kind}: {failed.message}"
    mine, other = pair.runs({}, {})
    return f"latency {mine.latency_ms_p50:7.1f} ms, default {other.latency_ms_p50:7.1f} ms"


def _conclude(results: Results, setup: Setup) -> None:
    """Simulate, compare, write."""
    from harness.measure.fidelity_runs import calibrated, foretold
    from harness.report.fidelity import figures, scatter_png, verdict

    configurations, default = results.configurations, setup.space.default
    num_calibration = results.about["num_calibration"]
    measurer = setup.measurer()
    guess, overrides = setup.guide(measurer, lambda num_simulated: None).simulator, measurer.overrides
    simulator = calibrated(guess, overrides, configurations, default, results.pairs, num_calibration)
    table = foretold(simulator, overrides, setup.guard, configurations, default, results.pairs, num_calibration)
    found = figures(table)
    write_named("--out", results.path.with_suffix(".csv"), table.to_csv(index=False))
    if len(table):
        write_named("--out", results.path.with_suffix(".png"), scatter_png(table))
    num_failed = len(results.pairs) - len(table)
    results.save(probe={**setup.probe.as_dict(), "model": results.about["model"]}, num_failed=num_failed, figures=found)
    print(f"\n{verdict(found)}")
    if num_failed:
        print(f"failed     {num_failed} pairs, which are in no figure")
    print(
        f"result     {results.path}, {results.path.with_suffix('.csv').name}, {results.path.with_suffix('.png').name}"
    )


if __name__ == "__main__":
    sys.exit(main())
