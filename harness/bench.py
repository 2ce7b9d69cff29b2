"""A profile side by side with its peers under one memory limit: `python -m harness.bench`.

Every contender runs in a process and a memory cgroup of its own and decodes the same held-out text, in interleaved
blocks. The resident model has no limit: it is the upper reference. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import UsageError, cli_main
from runtime.files import check_writable

CONTENDERS = ("ours", "resident", "accelerate_experts", "accelerate_layers", "on_demand")
OTHERS = ("lru", "lru_prefetch")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.bench", description=__doc__)
    parser.add_argument("--profile", type=Path, help="profile to measure; default: the default profile")
    parser.add_argument("--model", help="checkpoint folder or hub id; default: the demo with experts of 6 MiB")
    parser.add_argument("--slots", help="slots at the tight limit: 64 or 25%% (default: the profile's, else 25%%)")
    parser.add_argument("--limit", default="tight", help="tight, half, or a size: total memory of each contender")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded per block (default 64)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of each prompt (default 64)")
    parser.add_argument("--blocks", type=int, default=5, help="interleaved repeats, each on other text (default 5)")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help=f"any of %(default)s,{','.join(OTHERS)}")
    parser.add_argument("--threads", type=int, help="compute threads of each (default: the profile's, else 1)")
    parser.add_argument("--workload", type=Path, help="JSON lines of text; default: the demo's held-out text")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder for raw samples (%(default)s)")
    parser.add_argument(
        "--memory-check", action="store_true", help="only check the promised peak of memory, at --slots"
    )
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    return parser


def _check(options: argparse.Namespace) -> None:
    check_writable("--out", None if options.memory_check else options.out / "samples.json")
    for name in options.contenders.split(","):
        if name not in (*CONTENDERS, *OTHERS):
            raise UsageError(f"unknown contender {name!r}; known: {', '.join((*CONTENDERS, *OTHERS))}")
    for option in ("tokens", "prompt_tokens", "blocks"):
        least = 2 if option == "tokens" else 1
        if getattr(options, option) < least:
            raise UsageError(
                f"--{option.replace('_', '-')} {getattr(options, option)} is too few; give {least} or more"
            )


def _run(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    _check(options)
    # A terminated bench cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Imported late: --help and mistakes in the arguments answer at once.
    from harness.measure.bench_study import bench, check_promise, setup_of

    setup = setup_of(options)
    return check_promise(setup, options) if options.memory_check else bench(setup, options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli_main(lambda: _run(argv))


if __name__ == "__main__":
    sys.exit(main())
