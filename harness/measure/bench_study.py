"""One bench: contenders that are started under a limit, measured in interleaved blocks, and said side by side."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness.demo.widen import widened
from harness.hardware.bound import Ladder
from harness.measure import bench_report as report
from harness.measure.baselines import fused_copy
from harness.measure.bench_files import RawFile
from harness.measure.blocks import Row, run_blocks
from harness.measure.cgroup import unavailable_reason
from harness.measure.contest import Contest, Field, field, measure_process_bytes
from harness.measure.limits import Limit, ModelBytes, make_limit
from harness.measure.memory_check import check_memory
from harness.measure.process import Spec
from harness.measure.workload import TokenRequest, cut, load_workload
from runtime import machine
from runtime.facts import ModelFacts, describe
from runtime.model import checkpoint_files, read_tokenizer
from runtime.profile import checkpoint_cache, checkpoint_of, load_profile

DEMO_EXPERT_BYTES = 6 << 20
BLOCK_CAP_S = 20.0


@dataclass(frozen=True)
class Findings:
    """What a bench measured."""

    rows: Mapping[str, Row]
    ladder: Ladder | None


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


def setup_of(options: argparse.Namespace) -> Setup:
    """What the options of `harness.bench` ask for."""
    profile = None if options.profile is None else load_profile(options.profile)
    known = options.model or (None if profile is None else checkpoint_of(profile))
    model = known or str(widened(DEMO_EXPERT_BYTES))
    facts = describe(model)
    sizes = ModelBytes(facts.dense_bytes, facts.slot_bytes, facts.num_experts_total)
    slots = options.slots or (None if profile is None else profile.cache.slots) or "25%"
    threads = options.threads or (1 if profile is None else profile.compute.threads)
    path = None if options.profile is None else str(options.profile)
    names = tuple(options.contenders.split(","))
    return Setup(names, model, path, facts, sizes, sizes.slots_of(str(slots)), threads, read_tokenizer(model))


def _contest(setup: Setup, options: argparse.Namespace, warm: TokenRequest, use_cgroup: bool, scratch: Path) -> Contest:
    fused = setup.model
    if any(name.startswith("accelerate") for name in setup.names):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            fused = str(pool.submit(fused_copy, setup.model, checkpoint_cache()).result())
    return Contest(
        model=setup.model,
        profile=setup.profile,
        threads=setup.threads,
        sizes=setup.sizes,
        top_k=setup.facts.top_k,
        num_pools=setup.facts.num_pools,
        context=options.prompt_tokens + options.tokens,
        use_cgroup=use_cgroup,
        warm_request=warm,
        num_tokens=options.tokens,
        cap_s=BLOCK_CAP_S,
        fused=fused,
        files=tuple(sorted({*checkpoint_files(setup.model), *checkpoint_files(fused)})),
        scratch=scratch,
        say=lambda text: tqdm.write(text, file=sys.stderr),
    )


def _start_all(setup: Setup, running: Field) -> None:
    """The contenders that were asked for and the reference; resident models only as far as the machine has memory."""
    room = machine.available_memory_bytes() // int(1.3 * setup.sizes.total_bytes)
    resident = [name for name in ("reference", "resident") if name in (*setup.names, "reference")]
    for name in (*setup.names, "reference"):
        if name in resident[room:]:
            reason = f"this machine has no memory for {len(resident)} resident models"
            running.rows[name] = Row(name, None, failure=reason, fits=False)
        else:
            running.add(name)


def _measure(
    setup: Setup, contest: Contest, limit: Limit, requests: tuple[TokenRequest, ...], out: RawFile
) -> Findings:
    with field(contest, limit) as running:
        _start_all(setup, running)
        rows = running.rows
        with tqdm(total=len(rows) * len(requests), desc="measuring", unit="run", file=sys.stderr) as bar:
            run_blocks(
                list(rows.values()),
                requests,
                [*contest.files, *contest.scratch.rglob("*.dat")],
                cap_s=contest.cap_s,
                on_sample=lambda row: bar.update(),
                on_block=lambda: out.save(rows),
            )
        found = report.ladder(rows, setup.facts, _memory_rate(running))
    return Findings(rows, found)


def _memory_rate(running: Field) -> float:
    process = running.rows["reference"].process if "reference" in running.rows else None
    return float("nan") if process is None else process.ask("memory_rate", timeout_s=60.0)["memory_bytes_per_s"]


def bench(setup: Setup, options: argparse.Namespace) -> int:
    """Measure, print and keep; the exit code."""
    requests = cut(
        load_workload(options.workload),
        setup.tokenizer,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.tokens,
        num_requests=options.blocks + 1,
        part="confirm",
    )
    reason = unavailable_reason()
    if reason is not None:
        print(f"no memory cgroup can be made here ({reason}): page cache not limited", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="expertflow-bench-") as scratch:
        contest = _contest(setup, options, requests[0], reason is None, Path(scratch))
        contest.say("measuring what the process itself needs")
        wanted = options.limit if options.limit in ("tight", "half") else machine.parse_bytes(options.limit)
        limit = make_limit(wanted, setup.sizes, measure_process_bytes(contest), setup.tight_slots)
        out = RawFile.create(options.out, limit, setup.facts, contest)
        try:
            found = _measure(setup, contest, limit, requests[1:], out)
        except KeyboardInterrupt:
            print(f"interrupted: {out.kept()}", file=sys.stderr)
            raise
    summary = {"limit": limit.name, "limit_bytes": limit.total_bytes, **report.summary(found.rows, found.ladder)}
    out.save(found.rows, summary)
    if not options.json:
        print(limit.describe(setup.sizes))
        share = setup.sizes.dense_bytes / setup.sizes.total_bytes
        print(report.table(found.rows, page_cache_limited=contest.use_cgroup, dense_share=share))
        print("the ladder of the bound: not measured" if found.ladder is None else found.ladder.table())
        print(f"raw samples: {out.path}")
    print(json.dumps(summary))
    return 0


def check_promise(setup: Setup, options: argparse.Namespace) -> int:
    """Whether the promised peak of memory is kept; the exit code."""
    (request,) = cut(
        load_workload(options.workload),
        setup.tokenizer,
        prompt_tokens=512,
        output_tokens=64,
        num_requests=1,
        part="confirm",
    )
    overrides = {"cache.slots": setup.tight_slots, "compute.threads": setup.threads}
    spec = Spec("engine", setup.model, setup.threads, setup.profile, overrides)
    check = check_memory(spec, setup.sizes, request)
    if not options.json:
        print(check.describe())
    print(json.dumps(check.as_dict()))
    return 0 if check.passed else 1
