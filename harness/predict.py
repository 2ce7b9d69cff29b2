"""How well predictors forecast a trace: `python -m harness.predict --trace T [--artifact FILE …] [--per-layer]`.

Trained predictors and the popularity of experts are judged on requests that they were not made from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from harness.fitting.base import FitOptions, joined, rows_of
from harness.fitting.heldout import Parts, held_out
from harness.measure.prediction import (
    MORE,
    Judge,
    Popularity,
    Ranks,
    in_request_order,
    popularity_in,
    ranked,
    ratios,
    recorded_ranks,
)
from harness.measure.replay import PREDICTORS, Setting, artifacts_by_kind, predictor_of
from harness.measure.schedule import Schedule
from harness.report.predictors import predictors_text
from runtime.errors import UsageError, cli_main
from runtime.files import check_writable, write_named
from runtime.predictors.base import Predictor
from runtime.predictors.params import TRAINED, default_period
from runtime.predictors.previous_token import PreviousToken
from runtime.trace import RoutingTrace, read_trace

CONTROL, ALL_EXPERTS = "zero_staleness", "all_experts"
_PER_TOKEN = ["recall_at_k", "recall_at_k_plus_3", "precision", "coverage"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    arguments = _parser().parse_args(argv)
    return cli_main(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    check_writable("--csv", arguments.csv)
    trace = joined([read_trace(path) for path in arguments.trace])
    artifacts = artifacts_by_kind(arguments.artifact, trace)
    names = _names(arguments, trace, artifacts)
    parts = _parts(trace, artifacts, arguments)
    counts = _counts(names, parts, artifacts, arguments)
    overall = ratios(counts.groupby("predictor", sort=False).sum(min_count=1))
    by_layer = ratios(counts)
    for table in (overall, by_layer):
        table.loc[[ALL_EXPERTS], _PER_TOKEN] = np.nan  # it ranks nothing
    if arguments.csv:
        write_named("--csv", arguments.csv, (by_layer if arguments.per_layer else overall).to_csv())
    if arguments.json:
        about = {"depth": arguments.depth, "batch": arguments.batch, **_about(parts)}
        for name in overall.index:
            layers = by_layer.loc[name] if arguments.per_layer else None
            print(json.dumps({"predictor": name, **about, **_figures(overall.loc[name], layers)}))
        return 0
    print(_heading(parts, arguments))
    print(predictors_text(overall, trace.top_k, trace.top_k + MORE))
    if arguments.per_layer:
        print("\n" + predictors_text(by_layer, trace.top_k, trace.top_k + MORE))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name in ("depth", "batch", "max_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if not 0 < arguments.validation_share < 1:
        raise UsageError(f"--validation-share {arguments.validation_share}: a share between 0 and 1 is needed")
    if arguments.seed < 0:
        raise UsageError(f"--seed {arguments.seed}: 0 or more is needed")


def _names(arguments: argparse.Namespace, trace: RoutingTrace, artifacts: Mapping[str, str]) -> list[str]:
    """What is asked for, else whatever this trace and these artefacts allow; the baselines come by themselves."""
    if arguments.predictor is None:
        impossible = {"none", *(kind for kind, cannot_do_without in TRAINED.items() if cannot_do_without)}
        if trace.predicted is None or trace.predicted.shape[2] < arguments.depth:
            impossible.add("gate_lookahead")
        names = [name for name in PREDICTORS if name in artifacts or name not in impossible]
    else:
        names = arguments.predictor.split(",")
    if unknown := [name for name in names if name not in PREDICTORS]:
        raise UsageError(f"no predictor {unknown[0]!r} that runs on a trace; there are {', '.join(PREDICTORS)}")
    return [name for name in dict.fromkeys(names) if name != "previous_token"]


def _parts(trace: RoutingTrace, artifacts: Mapping[str, str], arguments: argparse.Namespace) -> Parts:
    options = FitOptions(validation_share=arguments.validation_share, seed=arguments.seed)
    judged, past, reason = held_out(trace, {} if arguments.unseen else artifacts, options)
    rows = Schedule(judged, batch=1, max_tokens=arguments.max_tokens).passes
    return Parts(rows_of(judged, np.concatenate(rows)), past, reason)


def _counts(
    names: Sequence[str], parts: Parts, artifacts: Mapping[str, str], arguments: argparse.Namespace
) -> pd.DataFrame:
    """Rows: predictor and layer."""
    trace, popularity = parts.judged, popularity_in(parts.past)
    judge = Judge(trace, popularity, arguments.batch)
    schedule, num_ranks = in_request_order(trace), trace.top_k + MORE
    num_walks = 3 + len(names) - ("gate_lookahead" in names)
    quiet = arguments.json or not sys.stderr.isatty()
    with tqdm(total=trace.num_tokens * num_walks, unit="tok", desc="forecasting", disable=quiet) as bar:

        def walk(predictor: Predictor, depth: int = arguments.depth) -> Ranks:
            return ranked(schedule, predictor, depth, num_ranks, on_token=bar.update)

        found = {CONTROL: judge.counts(walk(_previous_token(trace), depth=0))}
        found["popularity"] = judge.counts(walk(Popularity(popularity)))
        found["previous_token"] = judge.counts(walk(_previous_token(trace)))
        for name in names:
            bar.set_postfix_str(name)
            if name == "gate_lookahead":
                ranks = recorded_ranks(trace, arguments.depth, num_ranks)
            else:
                ranks = walk(predictor_of(_setting(name, artifacts), schedule))
            found[name] = judge.counts(ranks)
    everything = np.broadcast_to(
        np.arange(trace.num_experts, dtype=np.uint16), (*trace.experts.shape[:2], trace.num_experts)
    )
    found[ALL_EXPERTS] = judge.counts(everything, picks=trace.num_experts)
    return pd.concat(found, names=["predictor"])


def _setting(name: str, artifacts: Mapping[str, str]) -> Setting:
    """Of its policy and slots nothing is used."""
    every, unit = default_period(name)
    return Setting("lru", 1, name, every=every, every_unit=unit, artifact=artifacts.get(name))


def _previous_token(trace: RoutingTrace) -> PreviousToken:
    return PreviousToken(trace.num_layers, trace.num_experts)


def _about(parts: Parts) -> dict[str, Any]:
    requests = np.unique(parts.judged.request).tolist()
    return {"tokens": parts.judged.num_tokens, "requests": requests, "judged_on": parts.reason}


def _heading(parts: Parts, arguments: argparse.Namespace) -> str:
    judged = parts.judged
    num_judged, num_past = (np.unique(part.request).size for part in (judged, parts.past))
    batches = f"batches of {arguments.batch}"
    if num_judged < arguments.batch:
        batches = f"no batch figures: {num_judged} requests make no batch of {arguments.batch} (--batch)"
    return (
        f"judged on {judged.num_tokens} tokens of {num_judged} requests: {parts.reason}\n"
        f"popularity from {parts.past.num_tokens} tokens of {num_past} other requests\n"
        f"{judged.num_layers} layers x {judged.num_experts} experts, top-{judged.top_k}; "
        f"forecast {arguments.depth} layers ahead; {batches}\n"
    )


def _figures(row: pd.Series, layers: pd.DataFrame | None) -> dict[str, Any]:
    """For JSON, where what was not measured is null."""
    found: dict[str, Any] = {str(name): None if pd.isna(value) else float(value) for name, value in row.items()}
    if layers is not None:
        found["layers"] = [_figures(layer, None) for _, layer in layers.iterrows()]
    return found


_TRACES = "routing traces (.npz) of one model; those that predictors were trained on, in the same order"
_COLUMNS = (
    "recall@n: share of the chosen experts among the n likeliest forecast; where nothing was forecast (see coverage) "
    "it counts as 0. precision: share of the top_k forecast experts that were chosen. batch recall: of the experts "
    "that any token of a batch chose, the share that was forecast for any (ExpertFlow's accuracy); popularity's: the "
    "same of as many most popular experts, which a predictor must beat; picked/needed: experts per batch and layer. "
    "zero_staleness, a forecast made too late, must read 100%; all_experts is what batch recall is worth alone."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness.predict", description=__doc__.splitlines()[0], epilog=_COLUMNS
    )
    parser.add_argument("--trace", type=Path, action="extend", nargs="+", required=True, help=_TRACES)
    parser.add_argument("--predictor", help=f"of {', '.join(PREDICTORS)}; default: all that the trace allows")
    parser.add_argument(
        "--artifact", type=Path, action="append", default=[], help="a trained predictor; its held-out requests are used"
    )
    parser.add_argument(
        "--unseen", action="store_true", help="the predictors were trained on other traces: judge them across domains"
    )
    parser.add_argument("--depth", type=int, default=1, help="layers ahead that are forecast (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="requests together in the batch figures (%(default)s)")
    parser.add_argument("--validation-share", type=float, default=0.2, help="of the requests, judged (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these requests (%(default)s)")
    parser.add_argument("--max-tokens", type=int, help="stop after that many tokens")
    parser.add_argument("--per-layer", action="store_true", help="every layer as well")
    parser.add_argument("--json", action="store_true", help="one JSON object per predictor, nothing else")
    parser.add_argument("--csv", type=Path, help="write the table there as well")
    return parser


if __name__ == "__main__":
    sys.exit(main())
