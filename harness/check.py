"""Did it become slower, does it decide otherwise, does a profile still keep what it promises? `python -m harness.check`

One layer at a time:

    (nothing)      traces replayed on the virtual clock: every counter as committed, in seconds, on any machine
    --base REF     this working tree beside another commit, in turns on this machine: slower by more than the margin?
    --series       the history of figures: where did it change?   (an alert, never a failure)
    --profile P    the profile beside the default, in turns: does it keep what its evidence promises, here?

Exit code 0: pass; 1: regression; 2: it cannot be asked; 3: too noisy to say; 4: nothing can be measured here.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.device_options import add_device_options, named_device
from runtime.errors import UsageError, cli_main
from runtime.files import check_writable, write_named

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.checks.report import Report

GOLDENS = Path("tests/data/counters-golden.json")
HISTORY = Path("results/history")
NUM_PROFILE_PAIRS = 20
"""More than to prove a gain: its size is to be known as well."""


def _parser() -> argparse.ArgumentParser:
    head, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m harness.check",
        description=head,
        epilog=rest.strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    layer = parser.add_mutually_exclusive_group()
    layer.add_argument("--base", metavar="REF", help="commit to compare the working tree with, such as origin/main")
    layer.add_argument("--series", action="store_true", help="look for changes in the history of figures")
    layer.add_argument("--profile", type=Path, metavar="FILE", help="written by harness.tune")
    layer.add_argument("--bless", action="store_true", help="make what the counters are now the committed ones")
    parser.add_argument("--reason", metavar="TEXT", help="of --bless: why the decisions are meant to differ")
    parser.add_argument(
        "--goldens", type=Path, default=GOLDENS, metavar="FILE", help="counters as committed (%(default)s)"
    )
    parser.add_argument("--history", type=Path, default=HISTORY, metavar="DIR", help="of --series (%(default)s)")
    parser.add_argument("--pairs", type=int, metavar="N", help="of interleaved runs; default: as many as are needed")
    parser.add_argument("--margin", metavar="SHARE", help="of --base: slower by less is no regression (2%%)")
    parser.add_argument("--aa", action="store_true", help="of --base: that commit beside itself: how noisy is it here?")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="of --base: only this benchmark")
    parser.add_argument("--model", help="of --profile: checkpoint folder or hub id; default: the one that it names")
    parser.add_argument("--workload", type=Path, metavar="FILE", help="of --profile: JSON lines with text")
    add_device_options(parser, "of --profile; default: what the profile was tuned on")
    parser.add_argument(
        "--benchmark-json",
        type=Path,
        metavar="FILE",
        help="samples in pytest-benchmark's format: written by --base, added to the history by --series",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append a summary for a pull request")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the findings as JUnit XML")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    options = _parser().parse_args(arguments)
    return cli_main(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    _refuse_what_does_not_belong(options)
    for option in ("markdown", "junit"):
        check_writable(f"--{option}", getattr(options, option))
    if options.bless:
        return _bless(options)
    if options.base is not None:
        report = _paired(options)
    elif options.series:
        report = _series(options)
    elif options.profile is not None:
        report = _profile(options)
    else:
        report = _counters(options)
    _write(report, options)
    print(json.dumps(report.as_dict()) if options.json else report.describe())
    return report.verdict


_BELONGS: dict[str, tuple[str, ...]] = {
    "reason": ("bless",),
    "pairs": ("base", "profile"),
    "margin": ("base",),
    "aa": ("base",),
    "only": ("base",),
    "model": ("profile",),
    "workload": ("profile",),
    "device": ("profile",),
    "gpu": ("profile",),
    "benchmark_json": ("base", "series"),
}
"""Which layers take an option that not all do."""


def _refuse_what_does_not_belong(options: argparse.Namespace) -> None:
    for option, layers in _BELONGS.items():
        value = getattr(options, option)
        if (value or (option == "gpu" and value is not None)) and not any(getattr(options, layer) for layer in layers):
            names = " or ".join(f"--{layer}" for layer in layers)
            raise UsageError(f"--{option.replace('_', '-')} does nothing here: it belongs to {names}")
    if options.bless and (options.json or options.markdown or options.junit):
        raise UsageError("--bless checks nothing: --json, --markdown and --junit belong to a check")
    if options.pairs is not None and options.pairs < 1:
        raise UsageError(f"--pairs {options.pairs}: at least 1 is needed")


# What a layer needs is imported late: --help answers at once, the counters need no torch, and the processes that
# are measured, which import this module, stay small.


def _counters(options: argparse.Namespace) -> Report:
    from harness.checks.counters import check_counters

    return check_counters(options.goldens)


def _bless(options: argparse.Namespace) -> int:
    if not (options.reason or "").strip():
        raise UsageError('--bless needs --reason "why the decisions are meant to differ"; it is kept with the counters')
    from harness.checks.counters import bless

    print(bless(options.goldens, options.reason.strip()))
    return 0


def _series(options: argparse.Namespace) -> Report:
    from harness.checks.series import scan_series

    return scan_series(options.history, options.benchmark_json)


def _paired(options: argparse.Namespace) -> Report:
    asked = None if options.margin is None else _share(options.margin)
    check_writable("--benchmark-json", options.benchmark_json)
    from harness.checks.decision import MARGIN, MIN_PAIRS, NUM_PAIRS
    from harness.checks.paired import check_paired

    margin = MARGIN if asked is None else asked
    num_pairs = NUM_PAIRS if options.pairs is None else options.pairs
    if num_pairs < MIN_PAIRS:
        raise UsageError(f"--pairs {num_pairs}: at least {MIN_PAIRS} are needed to decide")
    with _progress(None) as tell:
        report = check_paired(
            options.base, num_pairs=num_pairs, margin=margin, is_aa=options.aa, on_block=tell, only=options.only
        )
    if options.benchmark_json is not None:
        from harness.checks.benchmark_json import of_report

        write_named("--benchmark-json", options.benchmark_json, json.dumps(of_report(report), indent=1) + "\n")
    return report


def _profile(options: argparse.Namespace) -> Report:
    from harness.checks.promise import check_profile
    from harness.search.confirm import MIN_PAIRS

    num_pairs = NUM_PROFILE_PAIRS if options.pairs is None else options.pairs
    if num_pairs < MIN_PAIRS:
        raise UsageError(f"--pairs {num_pairs}: at least {MIN_PAIRS} are needed for an interval of 95 %")
    device = named_device(options)
    with _progress(2 * num_pairs) as tell:
        found = check_profile(
            options.profile, options.model, options.workload, num_pairs, lambda name, outcome: tell(name), device
        )
    command = ["python", "-m", "harness.check", "--profile", str(options.profile), "--pairs", str(num_pairs)]
    command += [] if device is None else ["--device", device]
    return found.report(options.profile.name, shlex.join(command))


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal; nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(total=total, unit="run", desc="measuring", disable=not sys.stderr.isatty()) as bar:

        def tell(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        yield tell


def _share(text: str) -> float:
    """0.02 of "2%" or "0.02"."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UsageError(f"--margin {text!r} is not a share such as 2% or 0.02")
    return share


def _write(report: Report, options: argparse.Namespace) -> None:
    """The files that were asked for. Summaries of several layers may share one file."""
    if options.junit is not None:
        write_named("--junit", options.junit, report.junit())
    if options.markdown is not None:
        path: Path = options.markdown
        before = path.read_bytes() if path.exists() else b""
        write_named("--markdown", path, before + report.markdown().encode())


if __name__ == "__main__":
    sys.exit(main())
