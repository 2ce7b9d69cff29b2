"""The measurements of `harness.batching` that run the model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from harness.demo.widen import bundled_model
from harness.measure import kv_room, slo
from harness.measure import process as processes
from harness.measure.batch_count import shapes, whole_numbers
from harness.measure.batch_runs import Arm, replayed, run_arms, serve
from harness.measure.batch_setup import Setup, bar_of, finish, running_engine, say
from harness.measure.cgroup import unavailable_reason
from harness.measure.equality import MOST_MARGIN, differences, generate_alone
from harness.measure.process import Spec
from harness.measure.workload import TokenRequest
from harness.report import batching as report
from runtime import machine
from runtime.batching import PAGE_TOKENS
from runtime.build import load
from runtime.errors import UsageError
from runtime.profile import SCHEDULERS, Profile
from runtime.prompts import PromptRequest
from runtime.schedulers.make import build_scheduler

SHORTEST = 0.5
"""Of the tokens that a request decodes at most, so that requests do not end all at once."""


def overlap(options: argparse.Namespace) -> int:
    """`route_overlap` against `fifo`, for every shape and quantum."""
    wanted, quanta = shapes(options.shape), whole_numbers(options.quantum, "quantum")
    setup = Setup.of(options)
    arms = list(_overlap_arms(wanted, quanta, options.artifact))
    texts = setup.texts(options.prompt_tokens, options.tokens, options.requests * (options.blocks + 1))
    generator = np.random.default_rng(0)
    lengths = generator.integers(round(SHORTEST * options.tokens), options.tokens + 1, len(texts)).tolist()
    requests = [
        replayed(text, max_new_tokens=options.tokens, num_tokens=length)
        for text, length in zip(texts, lengths, strict=True)
    ]
    warm, *blocks = [requests[at : at + options.requests] for at in range(0, len(requests), options.requests)]
    outstanding = max(group * window for group, window in wanted)
    file = setup.file("overlap", slots=options.slots, outstanding=outstanding)
    with running_engine(setup) as process, bar_of(len(arms) * len(blocks)) as bar:
        for arm in arms:
            serve(process, warm[: arm.scheduler["group"]], arm.scheduler, outstanding, arm.artifact)
        run_arms(
            process, arms, blocks, outstanding, setup.files, bar.update, lambda: file.save(arms=report.arms_json(arms))
        )
    summary = report.overlap_summary(arms)
    return finish(setup, file, summary, report.overlap_table(summary))


def _overlap_arms(wanted: Sequence[tuple[int, int]], quanta: Sequence[int], artifact: Path | None) -> Iterator[Arm]:
    for group, window in wanted:
        shape = {"group": group, "window": window}
        yield Arm(f"fifo {group}x{window}", {"kind": "fifo", **shape})
        for quantum in quanta if window > 1 else ():
            section = {"kind": "route_overlap", **shape, "quantum": quantum}
            yield Arm(f"route_overlap {group}x{window} q{quantum}", section)
            if artifact is not None:
                yield Arm(f"route_overlap {group}x{window} q{quantum}, routes predicted", section, str(artifact))


def deadline(options: argparse.Namespace) -> int:
    """`deadline` against `fifo`, in an open loop."""
    ((group, window),) = _one(shapes(options.shape))
    factors = _factors(options.slo_factors)
    if not options.load > 0:
        raise UsageError(f"--load {options.load:g}: a share of fifo's rate, above 0")
    setup = Setup.of(options)
    texts = setup.texts(*slo.TEXT_TOKENS, options.requests * options.blocks)
    arms = [Arm(kind, {"kind": kind, "group": group, "window": window}) for kind in ("fifo", "deadline")]
    file = setup.file("deadline", slots=options.slots, load=options.load, slo_factors=factors)
    with running_engine(setup) as process, bar_of(len(arms) * options.blocks) as bar:
        idle = {kind: _idle(process, texts, kind) for kind in slo.KINDS}
        rate = _rate(process, slo.mixed(texts[: options.requests], [0]), arms[0], group * window)
        say(report.idle_line(idle, rate))
        file.save(requests_per_s=rate, idle=[{**asdict(kind), **asdict(one)} for kind, one in idle.items()])
        parts = [texts[at : at + options.requests] for at in range(0, len(texts), options.requests)]
        blocks = [
            slo.stream(part, idle, options.load * rate, factors, [number, options.requests])
            for number, part in enumerate(parts)
        ]
        run_arms(process, arms, blocks, None, setup.files, bar.update, lambda: file.save(arms=report.arms_json(arms)))
    summary = report.deadline_summary(arms, blocks)
    return finish(setup, file, summary, report.deadline_table(summary))


def _one(found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    if len(found) != 1:
        raise UsageError(f"--shape: one GROUPxWINDOW, not {len(found)}")
    return found


def _factors(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if min(found) <= 0:
        raise UsageError(f"--slo-factors {text!r} is not numbers above 0, such as 3,6,12")
    return found


def _idle(process: Any, texts: Sequence[TokenRequest], kind: slo.Kind) -> slo.Idle:
    """The second of two runs: the first one finds its experts on disk."""
    for _ in range(2):
        sample = serve(process, [slo.alone(texts, kind)], {"kind": "fifo", "group": 1}, 1)
    return slo.idle_of(sample)


def _rate(process: Any, requests: Sequence[PromptRequest], arm: Arm, outstanding: int) -> float:
    """Requests per second that a scheduler serves where they never run out."""
    sample = serve(process, requests, arm.scheduler, outstanding)
    ends_s = sorted(one["finish_s"] for one in sample["requests"])
    # At the end too few are outstanding, which would count as less than it can do.
    busy = ends_s[: max(1, len(ends_s) - outstanding)]
    return len(busy) / float(busy[-1])


def memory(options: argparse.Namespace) -> int:
    """Resident against offloaded under limits just above the resident model's peak."""
    percents = whole_numbers(options.above, "above")
    if (reason := unavailable_reason()) is not None:
        raise UsageError(f"no memory cgroup can be made here ({reason}), without which no limit holds; run as root")
    setup = Setup.of(options)
    texts = setup.texts(options.prompt_tokens, options.tokens, options.requests)
    pages = -(-(options.prompt_tokens + options.tokens) // PAGE_TOKENS) + 1

    def start(name: str, spec: Spec, limit_bytes: int | None) -> Any:
        return processes.start(name, spec, limit_bytes=limit_bytes, use_cgroup=True)

    def spec_of(slots: int, kv_bytes: int) -> Spec:
        return setup.spec("batch", **{"cache.slots": slots, "cache.kv_bytes": kv_bytes})

    token_bytes = machine.kv_cache_bytes(setup.facts.config, 1, 1, setup.facts.dtype.itemsize)
    resident = setup.spec("batch_resident")
    file = setup.file("memory", requests=options.requests)
    say("what our process needs beside weights and slots")
    few = max(setup.facts.num_pools, setup.facts.top_k)
    needs = kv_room.measure_process_bytes(
        start, spec_of(few, pages * PAGE_TOKENS * token_bytes), few, setup.sizes, texts[0]
    )
    peak = kv_room.resident_peak(start, resident, setup.sizes, needs, texts[0], say)
    if peak is None:
        raise UsageError("the resident model does not run on this machine even without other requests")
    room = kv_room.Room(setup.sizes, token_bytes, pages * PAGE_TOKENS, needs, peak)
    rows: list[dict[str, Any]] = []
    with bar_of(2 * len(percents)) as bar:
        for percent in percents:
            limit = peak + peak * percent // 100
            about = {"percent": percent, "limit_bytes": limit}
            number, sample = kv_room.resident_batch(start, resident, room, limit, texts)
            rows.append({**about, **report.memory_row("resident", room, limit, number, sample)})
            bar.update()
            number, sample = kv_room.our_batch(start, spec_of, room, limit, texts)
            rows.append({**about, **report.memory_row("offloaded", room, limit, number, sample)})
            bar.update()
            file.save(room=asdict(room), rows=rows)
    summary = {"resident_peak_bytes": peak, "rows": rows}
    return finish(setup, file, summary, report.memory_table(room, rows, setup.sizes))


def equality(options: argparse.Namespace) -> int:
    """Every scheduler's texts against those of each request alone, in float32."""
    options.model = options.model or str(bundled_model())
    setup = Setup.of(options)
    texts = setup.texts(options.prompt_tokens, options.tokens, options.requests)
    requests = [PromptRequest(text.id, text.prompt_ids, options.tokens, text.task) for text in texts]
    overrides = {"cache.slots": options.slots, "compute.threads": options.threads}
    rows: list[dict[str, Any]] = []
    file = setup.file("equality", slots=options.slots, dtype="float32", most_margin=MOST_MARGIN)
    with load(Profile.default(), setup.model, overrides=overrides, dtype=torch.float32) as engine:
        with tqdm(requests, desc="alone", unit="request", file=sys.stderr) as bar:
            alone = [generate_alone(engine, request) for request in bar]
        for kind in tqdm(SCHEDULERS, desc="batched", unit="run", file=sys.stderr):
            section = {"scheduler.kind": kind, "scheduler.group": 4, "scheduler.window": 2}
            scheduler = build_scheduler(Profile.default().with_overrides(section))
            found = differences(engine, requests, alone, scheduler)
            rows.append({"scheduler": kind, "requests": len(requests), "differences": [asdict(one) for one in found]})
    summary = {"rows": rows, "passed": all(one["margin"] <= MOST_MARGIN for r in rows for one in r["differences"])}
    finish(setup, file, summary, report.equality_table(rows))
    return 0 if summary["passed"] else 1


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "overlap": overlap,
    "deadline": deadline,
    "memory": memory,
    "equality": equality,
}
