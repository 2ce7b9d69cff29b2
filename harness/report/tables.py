"""Tables of a search: every trial, the Pareto front, and the front as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from harness.search.outcome import Kind, Record, Tried
from harness.search.space import Params, Space

_MEASURED = (
    "latency_ms_p50",
    "ttft_ms_p50",
    "tpot_ms_p50",
    "tokens_per_s",
    "peak_memory_bytes",
    "load_s",
    "run_s",
    "tokens_sha256",
)
_COUNTED = ("hit_rate", "bytes_per_token", "stall_s", "num_prefetch_issued", "num_prefetch_used")


def trials_table(records: Sequence[Record], space: Space) -> pd.DataFrame:
    """One row per trial: number, every knob (its default where left out), outcome, figures where measured."""
    return pd.DataFrame([_trial_row(record, space) for record in records])


def front_table(front: Sequence[Tried], space: Space, default: Tried | None, chosen: Params) -> pd.DataFrame:
    """One row per configuration of the front, fastest first; `latency_ratio` is that to the default of the search."""
    return pd.DataFrame([_front_row(one, space, default, chosen) for one in front])


def front_text(table: pd.DataFrame, num_experts: int) -> str:
    """The table for people, at most 15 lines of it; the chosen configuration is marked with an asterisk."""
    shown = pd.DataFrame(
        {
            "": [_mark(*marks) for marks in zip(table["chosen"], table["is_default"], strict=True)],
            "latency p50": [f"{value:.1f} ms" for value in table["latency_ms_p50"]],
            "vs default": ["" if pd.isna(value) else f"{value:.2f}x" for value in table["latency_ratio"]],
            "tokens/s": [f"{value:.1f}" for value in table["tokens_per_s"]],
            "peak memory": [f"{value / 1e6:.0f} MB" for value in table["peak_memory_bytes"]],
            "experts kept": [f"{slots} ({slots / num_experts:.0%})" for slots in table["slots"]],
        }
        | {name: table[name] for name in ("group", "policy", "depth", "count", "every")}
    )
    text: str = shown.head(15).to_string(index=False)
    return text


def _mark(chosen: bool, is_default: bool) -> str:
    return f"{'*' if chosen else ' '} {'default' if is_default else ''}".rstrip()


def _trial_row(record: Record, space: Space) -> dict[str, Any]:
    outcome = record.outcome
    row: dict[str, Any] = {"number": record.number, **space.complete(record.params)}
    row |= {"outcome": str(outcome.kind), "reused": record.reused, "message": outcome.message, "wall_s": outcome.wall_s}
    if outcome.kind is Kind.OK:
        measured = outcome.measurement.as_dict()
        row |= {name: measured[name] for name in _MEASURED} | {name: measured["stats"].get(name) for name in _COUNTED}
    return row


def _front_row(one: Tried, space: Space, default: Tried | None, chosen: Params) -> dict[str, Any]:
    return {
        "chosen": one.params == chosen,
        "is_default": one.params == space.default,
        **space.complete(one.params),
        "latency_ms_p50": one.latency_ms_p50,
        "latency_ratio": None if default is None else one.latency_ms_p50 / default.latency_ms_p50,
        "tokens_per_s": one.tokens_per_s,
        "peak_memory_bytes": one.peak_memory_bytes,
        "num_runs": len(one.runs),
    }
