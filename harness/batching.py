"""What batching and its schedulers bring: `python -m harness.batching count|overlap|deadline|memory|equality`.

count     distinct experts of a trace's batches by scheduler and by what it knows of routes; needs no model
overlap   route_overlap against fifo: distinct experts, tokens/s and client latency, in interleaved blocks
deadline  deadline against fifo: share of requests within their SLO, in an open loop
memory    the largest batch under limits just above the resident model's peak: resident against offloaded
equality  batched texts against those that each request gets alone, in float32
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.errors import UsageError, cli_main
from runtime.files import check_writable

COUNTS = ("blocks", "requests", "tokens", "prompt_tokens", "threads", "max_tokens")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness.batching", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="count|overlap|deadline|memory|equality")
    for name, (about, add) in _ARGUMENTS.items():
        command = commands.add_parser(name, help=about, description=about)
        add(command)
        command.add_argument("--out", type=Path, default=Path("results/batching"), help="folder of the result")
        command.add_argument("--json", action="store_true", help="print nothing but one JSON object")
    return parser


def _add_model(command: argparse.ArgumentParser, default: str = "the demo with experts of 6 MiB") -> None:
    command.add_argument("--model", help=f"checkpoint folder or hub id; default: {default}")
    command.add_argument("--threads", type=int, default=1, help="compute threads (%(default)s)")
    command.add_argument("--workload", type=Path, help="JSON lines of text; default: the demo's held-out text")


def _add_count(command: argparse.ArgumentParser) -> None:
    command.add_argument("--trace", type=Path, required=True, help="a routing trace (.npz)")
    command.add_argument("--shape", default="2x4,4x2,8x1,8x4", help="GROUPxWINDOW, several with commas (%(default)s)")
    command.add_argument("--quantum", default="1,8", help="tokens of a batch's turn, several with commas (%(default)s)")
    command.add_argument("--slots", default="25%", help="of the replayed cache (%(default)s)")
    command.add_argument("--expert-bytes", metavar="SIZE", help="what a load moves, such as 6MiB; default: the trace's")
    command.add_argument("--max-tokens", type=int, default=6000, help="of each row (%(default)s)")


def _add_overlap(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("--slots", default="25%", help="expert slots (%(default)s)")
    command.add_argument("--shape", default="2x4", help="GROUPxWINDOW, several with commas (%(default)s)")
    command.add_argument("--quantum", default="8", help="of route_overlap, several with commas (%(default)s)")
    command.add_argument("--artifact", type=Path, help="routing path predictor (harness.fit): one more contender")
    command.add_argument("--prompt-tokens", type=int, default=32, help="of each request (%(default)s)")
    command.add_argument("--tokens", type=int, default=96, help="most that a request decodes (%(default)s)")
    command.add_argument("--requests", type=int, default=16, help="of each block (%(default)s)")
    command.add_argument("--blocks", type=int, default=5, help="interleaved repeats, each on other text (%(default)s)")


def _add_deadline(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("--slots", default="25%", help="expert slots (%(default)s)")
    command.add_argument("--shape", default="4x2", help="GROUPxWINDOW (%(default)s)")
    command.add_argument("--load", type=float, default=1.2, help="arrivals, as a share of fifo's rate (%(default)s)")
    command.add_argument("--slo-factors", default="3,6,12", help="SLOs, times a request's idle latency (%(default)s)")
    command.add_argument("--requests", type=int, default=24, help="of each block (%(default)s)")
    command.add_argument("--blocks", type=int, default=4, help="interleaved repeats, each another seed (%(default)s)")


def _add_memory(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("--above", default="2,5,10", help="percent above the resident model's peak (%(default)s)")
    command.add_argument("--requests", type=int, default=64, help="the largest batch of interest (%(default)s)")
    command.add_argument("--prompt-tokens", type=int, default=512, help="of each request (%(default)s)")
    command.add_argument("--tokens", type=int, default=16, help="that each request decodes (%(default)s)")


def _add_equality(command: argparse.ArgumentParser) -> None:
    _add_model(command, "the bundled demo")
    command.add_argument("--slots", default="25%", help="expert slots (%(default)s)")
    command.add_argument("--requests", type=int, default=16, help="served together (%(default)s)")
    command.add_argument("--prompt-tokens", type=int, default=32, help="of each request (%(default)s)")
    command.add_argument("--tokens", type=int, default=64, help="that each request decodes (%(default)s)")


_ARGUMENTS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "count": ("distinct experts of a trace's batches", _add_count),
    "overlap": ("route_overlap against fifo", _add_overlap),
    "deadline": ("deadline against fifo", _add_deadline),
    "memory": ("the largest batch under a memory limit", _add_memory),
    "equality": ("batched against alone", _add_equality),
}


def _run(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    for name in COUNTS:
        value = getattr(options, name, None)
        least = 2 if name == "tokens" else 1
        if isinstance(value, int) and value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value}: at least {least} is needed")
    check_writable("--out", options.out / "samples.json")
    # A terminated measurement cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return _command(options.what)(options)


def _command(what: str) -> Callable[[argparse.Namespace], int]:
    """Imported late: counting needs no torch."""
    if what == "count":
        from harness.measure.batch_count import count

        return count
    from harness.measure.batch_study import COMMANDS

    return COMMANDS[what]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return cli_main(lambda: _run(argv))


if __name__ == "__main__":
    sys.exit(main())
