"""Train a predictor from routing traces: `python -m harness.fit routing_path --trace T.npz --out P.safetensors`.

What is printed was reached on requests that it did not train on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import cast

import pandas as pd

from harness.fitting.base import Fit, FitOptions, FitResult, joined, routing_shape
from runtime.errors import ArtifactError, UsageError, cli_main
from runtime.predictors.artifact import RoutingShape, read_artifact, write_artifact
from runtime.trace import read_trace

# Imported when asked for: not all of them need torch.
KINDS = {
    "activation_matrix": "harness.fitting.activation_matrix",
    "periodic": "harness.fitting.periodic",
    "routing_path": "harness.fitting.routing_path",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    arguments = _parser().parse_args(argv)
    return cli_main(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    options = _options(arguments)
    trace = joined([read_trace(path) for path in arguments.trace])
    _check_out(arguments.out, arguments.kind, routing_shape(trace))
    fit = cast(Fit, import_module(KINDS[arguments.kind]).fit)
    result = fit(trace, options, quiet=not sys.stderr.isatty())
    try:
        write_artifact(arguments.out, result.artifact)
    except OSError as error:
        raise ArtifactError(f"{arguments.out}: cannot write the predictor: {error.strerror or error}") from error
    print(_text(result, arguments))


def _options(arguments: argparse.Namespace) -> FitOptions:
    if arguments.kind not in KINDS:
        raise UsageError(f"no predictor {arguments.kind!r} that is trained; there are {', '.join(KINDS)}")
    for name in ("epochs", "threads"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} {getattr(arguments, name)}: at least 1 is needed")
    if not 0 < arguments.validation_share < 1:
        raise UsageError(f"--validation-share {arguments.validation_share}: a share between 0 and 1 is needed")
    if arguments.seed < 0:
        raise UsageError(f"--seed {arguments.seed}: 0 or more is needed")
    return FitOptions(
        validation_share=arguments.validation_share,
        seed=arguments.seed,
        epochs=arguments.epochs,
        threads=arguments.threads,
    )


def _check_out(out: Path, kind: str, shape: RoutingShape) -> None:
    """Before minutes of training: the file can be written, and replaces nothing but an earlier one of its kind."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out}: {folder} is not a folder that can be written to; name another")
    if not out.exists():
        return
    try:
        read_artifact(out, kind=kind, shape=shape)
    except ArtifactError:
        raise UsageError(
            f"--out {out}: exists, and is not a {kind} predictor for a model of this shape; delete it or name another"
        ) from None


def _text(result: FitResult, arguments: argparse.Namespace) -> str:
    artifact, out = result.artifact, arguments.out
    figures = pd.Series({name.replace("_", " "): f"{value:.3f}" for name, value in result.figures.items()})
    told = (
        f"{artifact.kind} for {artifact.model}, on held-out requests (k = {artifact.shape.top_k})\n"
        f"{figures.to_string()}\n\n"
        f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB). Next, in a profile:\n"
        f"  predictor: {{kind: {artifact.kind}, artifact: {out}}}"
    )
    if len(arguments.trace) == 1:
        told += f"\nor beside other predictors: python -m harness.predict --trace {arguments.trace[0]} --artifact {out}"
    return told


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.fit", description=__doc__.splitlines()[0])
    defaults = FitOptions()
    parser.add_argument("kind", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--trace", type=Path, action="extend", nargs="+", required=True, help="routing traces (.npz)")
    parser.add_argument("--out", type=Path, required=True, help="the predictor (.safetensors)")
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of split, weights and order (%(default)s)")
    parser.add_argument("--threads", type=int, default=defaults.threads, help="of the CPU (%(default)s)")
    parser.add_argument(
        "--validation-share", type=float, default=defaults.validation_share, help="of the requests (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
