"""Train a predictor from routing traces: `python -m harness.fit routing_path --trace T.npz --out P.safetensors`.

What is printed was reached on requests that it did not train on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pandas as pd

from harness.fitting.base import Fit, FitOptions, FitResult, joined, routing_shape
from runtime.errors import UsageError, cli_main
from runtime.files import check_writable
from runtime.predictors.artifact import RoutingShape, check_target, write_artifact
from runtime.predictors.periodic import SENSITIVITY
from runtime.trace import read_trace

if TYPE_CHECKING:
    from harness.fitting.sensitivity import Sensitivity

# Imported when asked for: not all of them need torch.
KINDS = {
    "activation_matrix": "harness.fitting.activation_matrix",
    "periodic": "harness.fitting.periodic",
    "routing_path": "harness.fitting.routing_path",
    "sequence": "harness.fitting.sequence",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    arguments = _parser().parse_args(argv)
    return cli_main(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    options = _options(arguments)
    trace = joined([read_trace(path) for path in arguments.trace])
    check_target(arguments.out, arguments.kind, routing_shape(trace))
    check_writable("--out", arguments.out)
    measured = _sensitivity(arguments, routing_shape(trace), options)
    fit = cast(Fit, import_module(KINDS[arguments.kind]).fit)
    result = fit(trace, options, quiet=not sys.stderr.isatty())
    if measured:
        params = {task: one.as_params() for task, one in measured.items()}
        artifact = replace(result.artifact, params={**result.artifact.params, SENSITIVITY: params})
        result = replace(result, artifact=artifact)
    write_artifact(arguments.out, result.artifact)
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
    for name in ("sensitivity", "texts", "threshold"):
        if getattr(arguments, name) is not None and (arguments.kind != "periodic" or not arguments.sensitivity):
            raise UsageError(f"--{name}: how much routing matters to a task is measured by periodic --sensitivity only")
    if arguments.threshold is not None and not 0 < arguments.threshold <= 1:
        raise UsageError(f"--threshold {arguments.threshold}: a share of tokens above 0, up to 1, is needed")
    return FitOptions(
        validation_share=arguments.validation_share,
        seed=arguments.seed,
        epochs=arguments.epochs,
        threads=arguments.threads,
    )


def _sensitivity(
    arguments: argparse.Namespace, shape: RoutingShape, options: FitOptions
) -> Mapping[str, Sensitivity] | None:
    """By task, where it is asked for; what was measured is printed."""
    if not arguments.sensitivity:
        return None
    from harness.fitting.sensitivity import THRESHOLD, sensitivity_of, sensitivity_text

    found = sensitivity_of(
        arguments.sensitivity,
        arguments.texts,
        shape,
        options,
        threshold=arguments.threshold or THRESHOLD,
        quiet=not sys.stderr.isatty(),
    )
    print(f"{sensitivity_text(found)}\n")
    return found


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
    parser.add_argument(
        "--sensitivity",
        metavar="CHECKPOINT",
        help="periodic: measure with the model which layers' routing does not matter to which task",
    )
    parser.add_argument(
        "--texts", type=Path, help='of --sensitivity: JSON lines {"task", "text"}; default: held-out text of the demo'
    )
    parser.add_argument(
        "--threshold", type=float, help="of --sensitivity: agreement from which on a layer does not matter (0.85)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
