"""What `harness.batching` found: as JSON, and as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from harness.measure.batch_runs import Arm, Sample
from harness.measure.blocks import paired
from harness.measure.kv_room import Room
from harness.measure.limits import ModelBytes
from harness.measure.slo import Idle, Kind, share_in_time
from harness.measure.stats import Ratio, median, paired_difference
from runtime.machine import format_bytes
from runtime.prompts import PromptRequest

HIGHER_IS_BETTER = ("tokens_per_s",)
LOWER_IS_BETTER = ("distinct_experts", "loads_per_token", "latency_ms_p50")
KV_SHARES = (1.0, 0.5, 0.25)
"""Of the experts in slots, for which the memory sum is shown."""


def arms_json(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Every sample of every arm."""
    return [{**asdict(arm), "samples": [{"block": b, **s} for b, s in arm.samples.items()]} for arm in arms]


def overlap_summary(arms: Sequence[Arm]) -> dict[str, Any]:
    """Medians over the blocks; how many times better each arm is than the fifo of its shape, with 95 % intervals."""
    fifo = {_shape(arm): arm for arm in arms if arm.scheduler["kind"] == "fifo"}
    return {"arms": [_overlap_row(arm, fifo[_shape(arm)]) for arm in arms]}


def _shape(arm: Arm) -> tuple[int, int]:
    return arm.scheduler["group"], arm.scheduler["window"]


def _overlap_row(arm: Arm, fifo: Arm) -> dict[str, Any]:
    names = (*HIGHER_IS_BETTER, *LOWER_IS_BETTER, "decode_batch", "planning_s", "hidden_planning_s")
    row: dict[str, Any] = {"name": arm.name, "blocks": len(arm.samples)}
    row |= {name: median(list(arm.figures(name).values())) for name in names}
    for name in (*HIGHER_IS_BETTER, *LOWER_IS_BETTER) if arm is not fifo else ():
        own, other = arm.figures(name), fifo.figures(name)
        ratio = paired(own, other) if name in HIGHER_IS_BETTER else paired(other, own)
        row[f"{name}_gain"] = None if ratio is None else ratio.as_dict()
    return row


def overlap_table(summary: Mapping[str, Any]) -> str:
    """For people."""
    rows = [
        {
            "": row["name"],
            "requests/pass": f"{row['decode_batch']:.2f}",
            "experts/layer step": f"{row['distinct_experts']:.2f}{_gain(row, 'distinct_experts')}",
            "loads/token": f"{row['loads_per_token']:.1f}{_gain(row, 'loads_per_token')}",
            "tokens/s": f"{row['tokens_per_s']:.1f}{_gain(row, 'tokens_per_s')}",
            "latency p50, ms/token": f"{row['latency_ms_p50']:.0f}{_gain(row, 'latency_ms_p50')}",
            "planning, hidden": f"{1e3 * row['planning_s']:.0f}, {1e3 * row['hidden_planning_s']:.0f} ms",
        }
        for row in summary["arms"]
    ]
    return f"{_text(rows)}\nin brackets: how many times better than fifo of the same shape, 95 % interval"


def _gain(row: Mapping[str, Any], name: str) -> str:
    ratio = row.get(f"{name}_gain")
    return "" if ratio is None else f" ({Ratio(**ratio)})"


def idle_line(idle: Mapping[Kind, Idle], requests_per_s: float) -> str:
    """What was measured before the open loop."""
    kinds = ", ".join(
        f"{kind.prompt_tokens}+{kind.output_tokens} tokens {one.latency_s(kind.output_tokens):.2f} s"
        for kind, one in idle.items()
    )
    return f"alone: {kinds}; fifo serves {requests_per_s:.2f} requests/s"


def deadline_summary(arms: Sequence[Arm], blocks: Sequence[Sequence[PromptRequest]]) -> dict[str, Any]:
    """Share of requests within SLO, of all and block by block; by how much `deadline` has more, with its interval."""
    shares = {arm.name: [share_in_time(blocks[block], sample) for block, sample in arm.samples.items()] for arm in arms}
    difference = paired_difference(shares["deadline"], shares["fifo"])
    return {
        "requests": sum(len(block) for block in blocks),
        "arms": [
            {
                "name": arm.name,
                "share_in_time": sum(shares[arm.name]) / len(shares[arm.name]),
                "shares": shares[arm.name],
                "latency_ms_p50": median(list(arm.figures("latency_ms_p50").values())),
                "tokens_per_s": median(list(arm.figures("tokens_per_s").values())),
            }
            for arm in arms
        ],
        "more_in_time": difference.as_dict(),
    }


def deadline_table(summary: Mapping[str, Any]) -> str:
    """For people."""
    rows = [
        {
            "": row["name"],
            "within SLO": f"{row['share_in_time']:.1%}",
            "blocks": f"{min(row['shares']):.0%} to {max(row['shares']):.0%}",
            "latency p50, ms/token": f"{row['latency_ms_p50']:.0f}",
            "tokens/s": f"{row['tokens_per_s']:.1f}",
        }
        for row in summary["arms"]
    ]
    more = summary["more_in_time"]
    interval = f" [{100 * more['low']:+.1f}, {100 * more['high']:+.1f}]" if more["num_pairs"] > 1 else ""
    over = "median over blocks" if interval else "one block"
    return (
        f"{_text(rows)}\ndeadline: {100 * more['estimate']:+.1f} points{interval} of {summary['requests']} requests, "
        f"{over}"
    )


def memory_row(name: str, room: Room, limit_bytes: int, number: int, sample: Sample | None) -> dict[str, Any]:
    """One contender at one limit."""
    slots = None if sample is None else sample["slots"]
    kv_tokens = room.resident_kv_tokens(limit_bytes) if name == "resident" else room.kv_tokens(limit_bytes, slots or 1)
    decoding_s = 0.0 if sample is None else _decoding_s(sample)
    decoded = 0 if sample is None else sum(one["num_tokens"] - 1 for one in sample["requests"])
    return {
        "name": name,
        "slots": slots if name == "offloaded" else None,
        "kv_tokens": kv_tokens,
        "batch": number,
        "tokens_per_s": None if sample is None else sample["tokens_per_s"],
        "decode_tokens_per_s": decoded / decoding_s if decoding_s else None,
        "cgroup_peak_bytes": None if sample is None else sample["cgroup_peak_bytes"],
    }


def _decoding_s(sample: Sample) -> float:
    """From the last prompt's end to the end: all requests are decoded together then."""
    requests = sample["requests"]
    return float(max(one["finish_s"] for one in requests) - max(one["first_token_s"] for one in requests))


def memory_table(room: Room, rows: Sequence[Mapping[str, Any]], sizes: ModelBytes) -> str:
    """For people: what ran, and below it the sum for other divisions between slots and KV cache."""
    ran = [
        {
            "limit": f"{format_bytes(row['limit_bytes'])} (peak + {row['percent']} %)",
            "": row["name"],
            "slots": "" if row["slots"] is None else f"{row['slots']} of {sizes.num_experts}",
            "KV tokens by the sum": row["kv_tokens"],
            "largest batch": row["batch"],
            "tokens/s": _figure(row["tokens_per_s"]),
            "decoding": _figure(row["decode_tokens_per_s"]),
        }
        for row in rows
    ]
    limits = sorted({row["limit_bytes"] for row in rows})
    slots = {f"{share:.0%} of the experts": max(1, round(share * sizes.num_experts)) for share in KV_SHARES}
    sums = [
        {
            "KV tokens that fit": format_bytes(limit),
            "resident": room.resident_kv_tokens(limit),
            **{name: room.kv_tokens(limit, number) for name, number in slots.items()},
        }
        for limit in limits
    ]
    return f"resident model's peak: {format_bytes(room.resident_peak_bytes)}\n{_text(ran)}\n\n{_text(sums)}"


def equality_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For people."""
    shown = [
        {
            "scheduler": row["scheduler"],
            "equal": f"{row['requests'] - len(row['differences'])} of {row['requests']}",
            "first differences (margin of the top two logits)": ", ".join(
                f"{one['request']} at token {one['position']} ({one['margin']:.1e})" for one in row["differences"]
            ),
        }
        for row in rows
    ]
    return _text(shown)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _text(rows: Sequence[Mapping[str, Any]]) -> str:
    text: str = pd.DataFrame(rows).to_string(index=False)
    return text
