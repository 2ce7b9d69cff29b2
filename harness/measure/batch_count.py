"""`harness.batching count`: what each scheduler's batches need on a trace, by what it knows of routes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pandas as pd
from tqdm import tqdm

from harness.fitting.base import joined
from harness.measure.batch_file import ResultFile
from harness.measure.grouping import Knowledge, ScheduledPasses
from harness.measure.replay import Setting, Timing, replay
from runtime.errors import UsageError
from runtime.machine import parse_bytes
from runtime.schedulers.base import Scheduler
from runtime.schedulers.fifo import Fifo
from runtime.schedulers.route_overlap import RouteOverlap
from runtime.trace import RoutingTrace, read_trace

POLICY = "next_use"
LOAD_BYTES_PER_S, EXPERT_S, LAYER_S = 3e9, 0.5e-3, 1.5e-3  # harness.simulate's
ASSUMED_EXPERT_BYTES = 6 << 20


@dataclass(frozen=True)
class Row:
    """One scheduler; `quantum` None: fifo."""

    group: int
    window: int
    quantum: int | None
    knows: Knowledge

    def make(self) -> Scheduler:
        """It, new."""
        if self.quantum is None:
            return Fifo(self.group, self.window)
        return RouteOverlap(self.group, self.window, self.quantum)


def count(options: argparse.Namespace) -> int:
    """The command."""
    trace = joined([read_trace(options.trace)])
    rows = list(_rows(shapes(options.shape), whole_numbers(options.quantum, "quantum")))
    slots = _slots(options.slots, trace)
    num_bytes = int(parse_bytes(options.expert_bytes) if options.expert_bytes else trace.meta.get("expert_bytes") or 0)
    timing = Timing((num_bytes or ASSUMED_EXPERT_BYTES) / LOAD_BYTES_PER_S, EXPERT_S, LAYER_S)
    file = ResultFile.create(options.out, "count", trace=options.trace.name, model=trace.meta.get("model"), slots=slots)
    found: list[dict[str, Any]] = []
    with tqdm(total=len(rows) * options.max_tokens, unit="tok", disable=not sys.stderr.isatty()) as bar:
        for row in rows:
            found.append(_counted(trace, row, slots, timing, options.max_tokens))
            bar.update(options.max_tokens)
            file.save(rows=found)
    file.save(complete=True)
    if not options.json:
        print(f"{trace.meta.get('model', options.trace)}, {slots} slots, policy {POLICY}; ratios are fifo's over it\n")
        print(_table(found))
        print(f"raw figures: {file.path}")
    print(json.dumps({"rows": found}))
    return 0


def shapes(text: str) -> list[tuple[int, int]]:
    """[(4, 2), (2, 4)] of "4x2,2x4".

    Raises:
        UsageError: not of that form.
    """
    try:
        found = [tuple(int(part) for part in shape.split("x")) for shape in text.split(",")]
    except ValueError:
        found = []
    if not found or any(len(shape) != 2 or min(shape) < 1 for shape in found):
        raise UsageError(f"--shape {text!r} is not GROUPxWINDOW, such as 4x2 or 4x2,2x4")
    return [(shape[0], shape[1]) for shape in found]


def whole_numbers(text: str, name: str) -> list[int]:
    """[1, 8] of "1,8".

    Raises:
        UsageError: not numbers of at least 1.
    """
    parts = text.split(",")
    if not all(part.isdigit() and int(part) >= 1 for part in parts):
        raise UsageError(f"--{name} {text!r} is not whole numbers of at least 1, such as 1,8")
    return [int(part) for part in parts]


def _rows(wanted: Sequence[tuple[int, int]], quanta: Sequence[int]) -> Iterator[Row]:
    for group, window in wanted:
        yield Row(group, window, None, "none")
        for quantum in quanta if window > 1 else ():
            for knows in get_args(Knowledge):
                if (quantum, knows) != (1, "none"):  # which is fifo
                    yield Row(group, window, quantum, knows)


def _slots(text: str, trace: RoutingTrace) -> int:
    num_experts = trace.num_layers * trace.num_experts
    try:
        slots = round(num_experts * float(text[:-1]) / 100) if text.endswith("%") else int(text)
    except ValueError:
        slots = 0
    if not 1 <= slots <= num_experts:
        raise UsageError(f"--slots {text!r} is neither a share such as 25% nor a number from 1 to {num_experts}")
    return slots


def _counted(trace: RoutingTrace, row: Row, slots: int, timing: Timing, max_tokens: int) -> dict[str, Any]:
    passes = ScheduledPasses(trace, row.make(), row.knows, max_tokens)
    replayed = replay(passes, Setting(POLICY, slots), timing)
    return {
        "group": row.group,
        "window": row.window,
        "scheduler": "fifo" if row.quantum is None else "route_overlap",
        "quantum": row.quantum,
        "knows": row.knows,
        "batch": passes.batch,
        "distinct_experts": passes.distinct_experts,
        "loads_per_token": replayed.num_loads / passes.num_tokens,
        "tokens_per_virtual_s": passes.num_tokens / replayed.elapsed_s,
    }


def _table(found: Sequence[dict[str, Any]]) -> str:
    table = pd.DataFrame(found)
    fifo = table[table["scheduler"] == "fifo"].set_index(["group", "window"])
    base = fifo.loc[list(zip(table["group"], table["window"], strict=True))].reset_index(drop=True)
    shown = pd.DataFrame(
        {
            "shape": [f"{group}x{window}" for group, window in zip(table["group"], table["window"], strict=True)],
            "scheduler": table["scheduler"],
            "quantum": ["" if pd.isna(quantum) else f"{quantum:.0f}" for quantum in table["quantum"]],
            "knows routes": table["knows"],
            "experts/layer step": table["distinct_experts"].map("{:.2f}".format),
            "ratio": (base["distinct_experts"] / table["distinct_experts"]).map("{:.3f}".format),
            "loads/token": table["loads_per_token"].map("{:.1f}".format),
            "ratio ": (base["loads_per_token"] / table["loads_per_token"]).map("{:.3f}".format),
            "tokens/virtual s": table["tokens_per_virtual_s"].map("{:.1f}".format),
        }
    )
    text: str = shown.to_string(index=False)
    return text
