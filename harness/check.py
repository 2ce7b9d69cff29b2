"""Does a profile still keep what it promises, on this machine? `python -m harness.check --profile P [--pairs N]`

The profile and the default configuration, under the same limits, are measured in turns in fresh processes. Exit code 0:
it does; 1: it does not; 2: it cannot be asked; 3: too noisy to say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from runtime.errors import UsageError, cli_main

NUM_PAIRS = 20
"""More than to prove a gain: its size is to be known as well."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.check", description=__doc__)
    parser.add_argument("--profile", type=Path, required=True, metavar="FILE", help="written by harness.tune")
    parser.add_argument("--model", help="checkpoint folder or hub id; default: the one that the profile names")
    parser.add_argument("--workload", type=Path, metavar="FILE", help="JSON lines with text; default: bundled text")
    parser.add_argument(
        "--pairs", type=int, default=NUM_PAIRS, metavar="N", help=f"of interleaved runs (default {NUM_PAIRS})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see `--help`."""
    options = _parser().parse_args(arguments)
    return cli_main(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    # Imported late: --help answers at once, and the processes that are measured, which import this module, stay small.
    from tqdm import tqdm

    from harness.search.confirm import MIN_PAIRS
    from harness.search.recheck import check_profile

    if options.pairs < MIN_PAIRS:
        raise UsageError(f"--pairs {options.pairs}: at least {MIN_PAIRS} are needed for an interval of 95 %")
    with tqdm(total=2 * options.pairs, unit="run", desc="measuring", disable=not sys.stderr.isatty()) as bar:
        found = check_profile(
            options.profile, options.model, options.workload, options.pairs, lambda name, outcome: bar.update()
        )
    print(json.dumps(found.as_dict()) if options.json else found.describe())
    return found.verdict


if __name__ == "__main__":
    sys.exit(main())
