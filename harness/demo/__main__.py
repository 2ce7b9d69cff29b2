"""CLI: `python -m harness.demo --expert-bytes 6MiB` widens the demo model (or any bf16 Qwen3-MoE) to any size."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from harness.demo import DEFAULT_SHARD_BYTES, LAYOUTS
from runtime.errors import UsageError, cli_main
from runtime.files import check_writable

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str) -> int:
    """ "6MiB", "1.5 GB" or "4096" as bytes; argparse turns the error into its usual one line."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if not match or match.group(2).lower() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write e.g. 6MiB, 512MB or 1048576")
    return int(float(match.group(1)) * UNITS[match.group(2).lower()])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.demo", description=__doc__)
    parser.add_argument(
        "--expert-bytes", type=parse_bytes, required=True, help="size of one expert, e.g. 6MiB (upper limit)"
    )
    parser.add_argument(
        "--hidden-size", type=int, help="the source's times a power of two; default: as wide as the experts"
    )
    parser.add_argument("--out", type=Path, help="folder to write; default: the cache (EXPERTFLOW_CACHE)")
    parser.add_argument("--model", type=Path, help="bf16 Qwen3-MoE checkpoint to widen; default: the bundled one")
    parser.add_argument(
        "--shard-bytes", type=parse_bytes, default=DEFAULT_SHARD_BYTES, help="largest file (default 512MiB)"
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="hub", help="hub: a tensor per expert; fused: one per layer"
    )
    return parser


def _write(options: argparse.Namespace) -> Path:
    from harness.demo.widen import bundled_model, widen, widened

    sizes = {"hidden_size": options.hidden_size, "layout": options.layout}
    if options.out is None and options.model is None:
        return widened(options.expert_bytes, shard_bytes=options.shard_bytes, **sizes)
    if options.out is None:
        raise UsageError("--model needs --out: only the bundled model is kept in the cache")
    return widen(
        options.model or bundled_model(),
        options.out,
        expert_bytes=options.expert_bytes,
        shard_bytes=options.shard_bytes,
        **sizes,
    )


def run(arguments: list[str] | None = None) -> int:
    """Widen, then print the folder and its true sizes."""
    options = _parser().parse_args(arguments)
    if options.out is not None and not options.out.exists():
        check_writable("--out", options.out)
    # Imported late: --help and mistakes in the arguments answer at once.
    from harness.demo.checkpoint import Checkpoint

    folder = _write(options)
    model = Checkpoint(folder)
    expert_bytes = 6 * model.hidden_size * model.intermediate_size
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(
        f"{folder}: {len(model.sparse_layers)} layers x {model.num_experts} experts of {expert_bytes} bytes "
        f"({expert_bytes / 2**20:.3f} MiB; hidden {model.hidden_size}, intermediate {model.intermediate_size}), "
        f"{total / 2**20:.0f} MiB in all"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli_main(run))
