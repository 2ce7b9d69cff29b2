"""Does a profile keep its promise of memory over time on this machine? `python -m harness.soak --profile P`

Serves many requests of random lengths, alone and in batches, and watches the process: its peak against what the profile
promises, growth, files, threads; every token is held against the resident model's. Exit code 1 if one does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from runtime import machine
from runtime.errors import UsageError, cli_main
from runtime.files import check_writable, write_named
from runtime.profile import checkpoint_of, load_profile, parse_overrides

if TYPE_CHECKING:
    from harness.measure.soak import Soak

NUM_SAMPLES = 40
LEAST_REQUESTS = 40
DEMO_OVERRIDES = {"cache.slots": "25%", "scheduler.group": 4}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    options = _parser().parse_args(argv)
    return cli_main(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    _check(options)
    # Imported late: --help and mistakes in the arguments answer at once.
    from tqdm import tqdm

    from harness.measure.provenance import provenance
    from harness.measure.soak import run_soak

    soak = _soak(options)
    compare = _fits_resident(soak.model)
    if not compare:
        print("the resident model does not fit this machine: tokens are not compared", file=sys.stderr)
    quiet = options.json or not sys.stderr.isatty()
    with tqdm(total=soak.num_requests * (1 + compare), unit="request", disable=quiet) as bar:
        found = run_soak(soak, compare=compare, on_requests=bar.update)
    summary = {**provenance("harness.soak", datetime.now(UTC)), **found.as_dict()}
    if options.out:
        write_named("--out", options.out, json.dumps(summary, indent=1) + "\n")
    if options.csv:
        write_named("--csv", options.csv, found.csv())
    print(json.dumps(summary) if options.json else found.describe())
    return 1 if found.failures else 0


def _check(options: argparse.Namespace) -> None:
    if options.requests < LEAST_REQUESTS:
        raise UsageError(f"--requests {options.requests}: fewer than {LEAST_REQUESTS} say nothing about memory")
    check_writable("--out", options.out)
    check_writable("--csv", options.csv)


def _soak(options: argparse.Namespace) -> Soak:
    from harness.demo.widen import bundled_model
    from harness.measure.soak import Soak

    ranges = [_range(name, getattr(options, name)) for name in ("prompt_tokens", "output_tokens")]
    profile = None if options.profile is None else load_profile(options.profile)
    device = profile and profile.match and profile.match.device
    if device is not None and device != "cpu":
        raise UsageError(
            f"{options.profile} is for {device}: it promises memory of the GPU, and this watches the host's; "
            f"python -m harness.check --profile {options.profile} holds it against its promise"
        )
    known = None if profile is None or options.model else checkpoint_of(profile)
    return Soak(
        model=str(options.model or known or bundled_model()),
        profile=None if options.profile is None else str(options.profile),
        overrides={**({} if profile is not None else DEMO_OVERRIDES), **parse_overrides(options.set)},
        max_memory_bytes=None if options.max_memory is None else machine.parse_bytes(options.max_memory),
        num_requests=options.requests,
        seed=options.seed,
        prompt_tokens=ranges[0],
        output_tokens=ranges[1],
        sample_every=max(1, options.requests // NUM_SAMPLES),
    )


def _range(name: str, text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UsageError(f"--{name.replace('_', '-')} {text!r}: not of the form 4-96")
    return int(first), int(last)


def _fits_resident(model: str) -> bool:
    from runtime.facts import RESIDENT_FACTOR, describe

    return RESIDENT_FACTOR * describe(model).model_bytes <= machine.available_memory_bytes()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.soak", description=__doc__)
    parser.add_argument("--profile", type=Path, help="whose promise (limits.max_memory_bytes) is tested")
    parser.add_argument("--model", help="checkpoint folder or hub id; default: the profile's, else the bundled demo")
    parser.add_argument(
        "--requests", type=int, default=1000, metavar="N", help="(%(default)s); growth is judged from 400 on"
    )
    parser.add_argument("--max-memory", metavar="SIZE", help="the promise; default: the profile's, else what is needed")
    parser.add_argument("--prompt-tokens", default="4-96", metavar="A-B", help="lengths of prompts (%(default)s)")
    parser.add_argument("--output-tokens", default="1-8", metavar="A-B", help="lengths of answers (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a profile key")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and texts")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there as JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write memory over requests there")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


if __name__ == "__main__":
    sys.exit(main())
