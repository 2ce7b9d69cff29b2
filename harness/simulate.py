"""Replay a routing trace on a virtual clock: `python -m harness.simulate --trace T --policy lru,next_use`.

The decisions are the engine's own code; only time is simulated. Needs neither torch nor the model. With `--host-slots`
the slots are a GPU's, above host memory that does not hold all experts either: what is counted then is which experts
come from disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from harness.fitting.base import FitOptions
from harness.fitting.heldout import held_out
from harness.measure.host_replay import HostResult, misses, replay_host
from harness.measure.replay import PREDICTORS, ReplayResult, Setting, Timing, artifacts_by_kind, replay
from harness.measure.schedule import Schedule
from runtime.cache.policies import ORACLE, POLICIES
from runtime.errors import UsageError, cli_main
from runtime.files import check_writable, write_named
from runtime.machine import parse_bytes
from runtime.predictors.params import default_period
from runtime.trace import RoutingTrace, read_trace

ALL_POLICIES = (*POLICIES, ORACLE)
DEFAULT_POLICIES = f"lru,next_use,td_next_use,{ORACLE}"
DEFAULT_SLOTS = "15%,25%,45%"
_HOST_POLICIES = "lru,lfu,lfru,next_use,td_next_use"
ASSUMED_EXPERT_BYTES = 6 << 20  # where the trace does not say


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    arguments = _parser().parse_args(argv)
    return cli_main(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    _check_counts(arguments)
    check_writable("--csv", arguments.csv)
    check_writable("--plot", arguments.plot)
    trace = read_trace(arguments.trace)
    if arguments.expert_bytes is not None:
        trace = replace(trace, meta={**trace.meta, "expert_bytes": parse_bytes(arguments.expert_bytes)})
    settings = _settings(arguments, trace)
    if arguments.held_out:
        trace = held_out(trace, artifacts_by_kind(arguments.artifact, trace), FitOptions()).judged
    schedule = Schedule(trace, batch=arguments.batch, max_tokens=arguments.max_tokens)
    quiet = arguments.json or not sys.stderr.isatty()
    if arguments.host_slots:
        return _run_host(arguments, schedule, settings, quiet)
    timing = _timing(arguments, trace)
    results = []
    with tqdm(total=schedule.num_tokens * len(settings), unit="tok", desc="replaying", disable=quiet) as bar:
        for setting in settings:
            bar.set_postfix_str(f"{setting.policy}, {setting.slots} slots")
            done = replay(schedule, setting, timing, on_pass=bar.update)
            results.append(done)
            if arguments.json:
                print(json.dumps(done.as_dict()), flush=True)
    table = pd.DataFrame([result.as_dict() for result in results])
    if arguments.csv:
        write_named("--csv", arguments.csv, table.to_csv(index=False))
    if arguments.plot:
        from harness.report.plots import replays_png

        write_named("--plot", arguments.plot, replays_png(table, trace.num_layers * trace.num_experts))
    if not arguments.json:
        print(_text(results, trace))
    return 0


def _run_host(arguments: argparse.Namespace, schedule: Schedule, settings: Sequence[Setting], quiet: bool) -> int:
    """Two tiers: every setting of the slots above every one of host memory."""
    if any(setting.predictor != "none" or setting.policy == ORACLE for setting in settings) or arguments.plot:
        raise UsageError("--host-slots replays demand alone: leave out belady, predictors and --plot")
    if arguments.streams:
        raise UsageError("--host-slots replays demand alone: leave out --streams")
    num_experts = schedule.trace.num_layers * schedule.trace.num_experts
    slots = [_slots("--host-slots", text, num_experts) for text in arguments.host_slots.split(",")]
    policies = _policies("--host-policy", arguments.host_policy, tuple(POLICIES))
    results: list[HostResult] = []
    with tqdm(total=schedule.num_tokens * len(settings), unit="tok", desc="replaying", disable=quiet) as bar:
        for setting in settings:
            missed = misses(schedule, setting, bar.update)
            for count, policy in itertools.product(slots, policies):
                results.append(replay_host(schedule, setting, missed, policy, count))
                if arguments.json:
                    print(json.dumps(results[-1].as_dict()), flush=True)
    table = pd.DataFrame([result.as_dict() for result in results])
    if arguments.csv:
        write_named("--csv", arguments.csv, table.to_csv(index=False))
    if not arguments.json:
        print(table.drop(columns=["expert_bytes", "tokens"]).to_string(index=False, float_format="{:.3f}".format))
    return 0


def _check_counts(arguments: argparse.Namespace) -> None:
    for name in ("count", "every", "batch", "max_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if arguments.depth < 0:
        raise UsageError(f"--depth {arguments.depth}: 0 (forecasts for eviction only) or more")
    for name in ("expert_ms", "layer_ms"):
        if not 0 <= getattr(arguments, name) < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: 0 or more is needed")


def _settings(arguments: argparse.Namespace, trace: RoutingTrace) -> list[Setting]:
    policies = _policies("--policy", arguments.policy or DEFAULT_POLICIES, ALL_POLICIES)
    if (arguments.streams or arguments.host_slots) and arguments.policy in (None, "all"):
        policies.remove(ORACLE)  # which loads on demand from one tier
    if arguments.streams and ORACLE in policies:
        raise UsageError(f"{ORACLE} loads on demand only, and nothing streams with it: leave it out of --policy")
    predictors = arguments.predictor.split(",")
    if unknown := [name for name in predictors if name not in PREDICTORS]:
        raise UsageError(f"no predictor {unknown[0]!r} that replays a trace; there are {', '.join(PREDICTORS)}")
    slots = [_slots("--slots", text, trace.num_layers * trace.num_experts) for text in arguments.slots.split(",")]
    artifacts = artifacts_by_kind(arguments.artifact, trace)
    if unused := artifacts.keys() - set(predictors):
        raise UsageError(f"--artifact holds a {unused.pop()} predictor, which --predictor does not name")
    return [
        Setting(
            policy,
            count,
            predictor,
            arguments.depth,
            arguments.count,
            *_period(arguments, predictor),
            artifacts.get(predictor),
            arguments.adaptive,
            arguments.streams,
        )
        for count, policy, predictor in itertools.product(slots, policies, predictors)
        if policy != ORACLE or predictor == "none" or len(predictors) == 1
    ]


def _period(arguments: argparse.Namespace, predictor: str) -> tuple[int, str]:
    """Units between two predictions, and the unit."""
    every, unit = default_period(predictor)
    return arguments.every or every, arguments.every_unit or unit


def _policies(option: str, text: str, known: Sequence[str]) -> list[str]:
    policies = list(known) if text == "all" else text.split(",")
    if unknown := [name for name in policies if name not in known]:
        raise UsageError(f"{option}: no policy {unknown[0]!r}; there are {', '.join(known)}")
    return policies


def _slots(option: str, text: str, num_experts: int) -> int:
    try:
        slots = round(num_experts * float(text[:-1]) / 100) if text.endswith("%") else int(text)
    except ValueError:
        raise UsageError(f"{option} {text!r} is neither a count nor a share of all experts such as 25%") from None
    if not 1 <= slots <= num_experts:
        raise UsageError(f"{option} {text} is {slots} slots; from 1 to all {num_experts} experts make sense")
    return slots


def _timing(arguments: argparse.Namespace, trace: RoutingTrace) -> Timing:
    expert_bytes = int(trace.meta.get("expert_bytes") or ASSUMED_EXPERT_BYTES)
    load_s = expert_bytes / parse_bytes(arguments.bandwidth)
    return Timing(load_s, arguments.expert_ms / 1e3, arguments.layer_ms / 1e3)


def _text(results: Sequence[ReplayResult], trace: RoutingTrace) -> str:
    """A table for people, and how much of the way from LRU to Belady each policy goes, where both were replayed."""
    num_experts = trace.num_layers * trace.num_experts
    rows = []
    for result in results:
        peers = {
            r.setting.policy: r
            for r in results
            if r.setting.slots == result.setting.slots and not r.cache.num_prefetch_issued
        }
        rows.append(
            {
                "slots": f"{result.setting.slots} ({result.setting.slots / num_experts:.0%})",
                "policy": result.setting.policy,
                "predictor": result.setting.predictor,
                "hits": f"{result.cache.hit_rate or 0:.1%}",
                "loads/token": f"{result.num_loads / result.cache.num_tokens:.1f}",
                "LRU to Belady": _way(result, peers.get("lru"), peers.get("belady")),
                "prefetch used/wasted": f"{result.cache.num_prefetch_used}/{result.cache.num_prefetch_wasted}",
                "stall": f"{result.stall_s / result.elapsed_s:.0%}",
                "tokens/s": f"{result.cache.num_tokens / result.elapsed_s:.1f}",
            }
        )
    return pd.DataFrame(rows).to_string(index=False)


def _way(result: ReplayResult, lru: ReplayResult | None, belady: ReplayResult | None) -> str:
    """Share of the loads between LRU's and Belady's that `result` saves; prefetches count as loads."""
    if lru is None or belady is None or lru.num_loads == belady.num_loads:
        return ""
    return f"{(lru.num_loads - result.num_loads) / (lru.num_loads - belady.num_loads):.0%}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.simulate", description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="a routing trace (.npz)")
    parser.add_argument(
        "--policy",
        help=f"of {', '.join(ALL_POLICIES)}; or all (default {DEFAULT_POLICIES}; {ORACLE} where it can be)",
    )
    parser.add_argument("--slots", default=DEFAULT_SLOTS, help="counts or shares of all experts (%(default)s)")
    parser.add_argument("--host-slots", help="experts that host memory has room for, below these slots; default: all")
    parser.add_argument("--host-policy", default=_HOST_POLICIES, help="of host memory (%(default)s)")
    parser.add_argument("--predictor", default="none", help=f"of {', '.join(PREDICTORS)} (%(default)s)")
    parser.add_argument(
        "--depth", type=int, default=1, help="layers ahead that are prefetched for; 0: none (%(default)s)"
    )
    parser.add_argument("--count", type=int, default=2, help="experts prefetched per layer and token (%(default)s)")
    parser.add_argument("--every", type=int, help="steps that a forecast is reused for (1; periodic: 40 prompts)")
    parser.add_argument(
        "--every-unit",
        choices=("step", "prompt"),
        help="of --every; only periodic counts prompts, and does unless told",
    )
    parser.add_argument("--adaptive", action="store_true", help="--depth is the most; how far to look is learned")
    parser.add_argument("--streams", action="store_true", help="long prompts stream whole layers, as on a GPU")
    parser.add_argument("--artifact", type=Path, action="append", default=[], help="trained predictor (harness.fit)")
    parser.add_argument(
        "--held-out", action="store_true", help="only requests that no --artifact was trained on (else a fifth of all)"
    )
    parser.add_argument("--batch", type=int, help="requests decoded together; default: the passes of the recorded run")
    parser.add_argument("--max-tokens", type=int, help="stop after about that many tokens")
    parser.add_argument("--expert-bytes", metavar="SIZE", help="what a load moves, such as 6MiB; default: the trace's")
    parser.add_argument("--bandwidth", default="3GB", help="bytes per second of the link (%(default)s)")
    parser.add_argument("--expert-ms", type=float, default=0.5, help="computing one expert (%(default)s)")
    parser.add_argument("--layer-ms", type=float, default=1.5, help="the rest of a layer (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object per configuration, nothing else")
    parser.add_argument("--csv", type=Path, help="write the table there as well")
    parser.add_argument("--plot", type=Path, help="write a plot of hit rate and stall over slots there (.png)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
