"""A profile side by side with its peers under one memory limit: `python -m harness.bench`.

Every contender runs in a process and a memory cgroup of its own and decodes the same held-out text, in interleaved blocks.
The resident model has no limit: it is the upper reference. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer

from harness.demo.widen import default_cache, widened
from harness.measure import bench_report as report
from harness.measure.baselines import fused_copy
from harness.measure.bench_files import record, save
from harness.measure.blocks import Row, run_blocks
from harness.measure.cgroup import unavailable_reason
from harness.measure.contest import Contest, Field, field, measure_process_bytes
from harness.measure.limits import Limit, ModelBytes, make_limit
from harness.measure.memory_check import check_memory
from harness.measure.workload import TokenRequest, cut, load_workload
from runtime import machine
from runtime.build import ModelFacts, describe
from runtime.errors import UsageError, cli_main
from runtime.model import checkpoint_files
from runtime.profile import load_profile

CONTENDERS = ("ours", "resident", "accelerate_experts", "accelerate_layers", "on_demand")
DEMO_EXPERT_BYTES = 6 << 20
BLOCK_CAP_S = 20.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.bench", description=__doc__)
    parser.add_argument("--profile", type=Path, help="profile to measure; default: the default profile")
    parser.add_argument("--model", help="checkpoint folder or hub id; default: the demo with experts of 6 MiB")
    parser.add_argument("--slots", help='slots that "tight" makes room for, such as 64 or 25%%; default: the profile\'s, else 25%%')
    parser.add_argument("--limit", default="tight", help="tight, half, or a size: total memory of each contender")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded per block (default 64)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of each prompt (default 64)")
    parser.add_argument("--blocks", type=int, default=5, help="interleaved repeats, each on other text (default 5)")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="any of %(default)s")
    parser.add_argument("--threads", type=int, help="compute threads of every contender; default: the profile's, else 1")
    parser.add_argument("--workload", type=Path, help="JSON lines of text; default: the demo's held-out text")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder for raw samples (default %(default)s)")
    parser.add_argument("--memory-check", action="store_true", help="only check the promised peak of memory, at --slots")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON object")
    return parser


@dataclass(frozen=True)
class Setup:
    """What the arguments mean on this machine."""

    names: tuple[str, ...]
    model: str
    profile: str | None
    facts: ModelFacts
    sizes: ModelBytes
    tight_slots: int
    threads: int
    tokenizer: Any


def _setup(options: argparse.Namespace) -> Setup:
    names = tuple(options.contenders.split(","))
    for name in names:
        if name not in CONTENDERS:
            raise UsageError(f"unknown contender {name!r}; known: {', '.join(CONTENDERS)}")
    for option in ("tokens", "prompt_tokens", "blocks"):
        least = 2 if option == "tokens" else 1
        if getattr(options, option) < least:
            raise UsageError(f"--{option.replace('_', '-')} {getattr(options, option)} is too few; give {least} or more")
    profile = None if options.profile is None else load_profile(options.profile)
    known = None if profile is None or profile.provenance is None else profile.provenance.model
    model = options.model or known or str(widened(DEMO_EXPERT_BYTES))
    facts = describe(model)
    sizes = ModelBytes(facts.dense_bytes, facts.slot_bytes, facts.num_experts_total)
    slots = options.slots or (None if profile is None else profile.cache.slots) or "25%"
    threads = options.threads or (1 if profile is None else profile.compute.threads)
    path = None if options.profile is None else str(options.profile)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return Setup(names, model, path, facts, sizes, sizes.slots_of(str(slots)), threads, tokenizer)


def _contest(setup: Setup, options: argparse.Namespace, warm: TokenRequest, use_cgroup: bool, scratch: Path) -> Contest:
    fused = setup.model
    if any(name.startswith("accelerate") for name in setup.names):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            fused = str(pool.submit(fused_copy, setup.model, default_cache()).result())
    return Contest(
        model=setup.model,
        profile=setup.profile,
        threads=setup.threads,
        sizes=setup.sizes,
        top_k=setup.facts.top_k,
        use_cgroup=use_cgroup,
        warm_request=warm,
        num_tokens=options.tokens,
        cap_s=BLOCK_CAP_S,
        fused=fused,
        scratch=scratch,
        say=lambda text: tqdm.write(text, file=sys.stderr),
    )


def _names(setup: Setup, say: Any) -> list[str]:
    """What is measured, the reference included; resident models only where the machine has the memory for them."""
    names = list(setup.names) + ["reference"]
    resident = [name for name in names if name in report.UNLIMITED]
    free = machine.available_memory_bytes()
    for name in resident[:0:-1] if free < 2 * len(resident) * setup.sizes.total_bytes else ():
        say(f"{name} is left out: {machine.format_bytes(free)} are available for {len(resident)} resident models")
        names.remove(name)
    return names


def _measure(
    setup: Setup, options: argparse.Namespace, contest: Contest, limit: Limit, requests: tuple[TokenRequest, ...], path: Path
) -> dict[str, Any]:
    files = [*checkpoint_files(setup.model), *checkpoint_files(contest.fused)]
    head = record(setup.facts, limit, contest, shlex.join(["python", "-m", "harness.bench", *sys.argv[1:]]))
    with field(contest, limit) as running:
        for name in _names(setup, contest.say):
            running.add(name)
        rows = running.rows
        with tqdm(total=len(rows) * len(requests), desc="blocks", unit="run", file=sys.stderr) as bar:
            run_blocks(
                list(rows.values()),
                requests,
                [*files, *contest.scratch.rglob("*.dat")],
                on_sample=lambda row: bar.update(),
                on_block=lambda: save(path, head, rows, None),
            )
        found = report.ladder(rows, setup.facts, _memory_rate(running))
    summary = {"limit": limit.name, "limit_bytes": limit.total_bytes, **report.summary(rows, found)}
    save(path, head, rows, summary)
    if not options.json:
        print(limit.describe(setup.sizes))
        print(report.table(rows, page_cache_limited=contest.use_cgroup))
        print("the ladder of the bound: not measured" if found is None else found.table())
        print(f"raw samples: {path}")
    return summary


def _memory_rate(running: Field) -> float:
    reference = running.rows.get("reference")
    if reference is None or reference.process is None or reference.failure is not None:
        return float("inf")
    return float(reference.process.ask("memory_rate", timeout_s=60.0)["memory_bytes_per_s"])
