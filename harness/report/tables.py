"""Tables of a search: every trial, the Pareto front, and the front as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from harness.search.outcome import Kind, Limits, Outcome, Record, Tried
from harness.search.space import Params, Space, Value, params_key

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
_MOST_ROWS = 15


def trials_table(
    records: Sequence[Record], space: Space, limits: Limits, simulated: Sequence[tuple[Params, float]] = ()
) -> pd.DataFrame:
    """One row per trial: number, source, every knob (its default where left out), outcome, figures where measured.

    Args:
        simulated: latency in ms that was expected of a configuration.
    """
    expected = {params_key(params): latency_ms for params, latency_ms in simulated}
    return pd.DataFrame([_trial_row(record, space, limits, expected) for record in records])


def front_table(
    shown: Sequence[Tried],
    default: Tried | None,
    chosen: Params | None,
    complete: Callable[[Params], Mapping[str, Value]],
) -> pd.DataFrame:
    """One row per configuration; `latency_ratio` is that to the default of the search.

    Args:
        complete: every knob of a configuration, such as `Space.complete`.
    """
    return pd.DataFrame([_front_row(one, default, chosen, complete) for one in shown])


def with_marked(front: Sequence[Tried], *marked: Tried | None) -> list[Tried]:
    """A front, and after it those of `marked` that are not on it."""
    shown = list(front)
    for one in marked:
        if one is not None and all(one.params != other.params for other in shown):
            shown.append(one)
    return shown


def front_text(table: pd.DataFrame, default: Mapping[str, Value], num_experts: int, *, memory: str = "memory") -> str:
    """The table for people, at most 15 lines of it, the chosen configuration with an asterisk.

    Args:
        default: every knob of the default; those in which no row differs from it are left out.
        memory: which it is.
    """
    if table.empty:
        return ""
    table = _most_telling(table)
    shown = pd.DataFrame(
        {
            "": [_mark(*marks) for marks in zip(table["chosen"], table["is_default"], strict=True)],
            "ms/token p50": [f"{value:.1f}" for value in table["latency_ms_p50"]],
            "vs default": ["" if pd.isna(value) else f"{value:.2f}x" for value in table["latency_ratio"]],
            "tokens/s": [f"{value:.1f}" for value in table["tokens_per_s"]],
            f"peak {memory}": [f"{value / 1e6:.0f} MB" for value in table["peak_memory_bytes"]],
            "experts kept": [f"{slots} ({slots / num_experts:.0%})" for slots in table["slots"]],
        }
        | {
            name: list(table[name])
            for name, value in default.items()
            if name != "slots" and not (table[name] == value).all()
        }
    )
    text: str = shown.to_string(index=False)
    return text


def _most_telling(table: pd.DataFrame) -> pd.DataFrame:
    """The first rows, and the chosen one and the default wherever they stand."""
    marked = table["chosen"] | table["is_default"]
    unmarked = table.index[~marked][: max(0, _MOST_ROWS - int(marked.sum()))]
    return table[marked | table.index.isin(unmarked)]


def _mark(chosen: bool, is_default: bool) -> str:
    return f"{'*' if chosen else ' '} {'default' if is_default else ''}".rstrip()


def _trial_row(record: Record, space: Space, limits: Limits, expected: Mapping[str, float]) -> dict[str, Any]:
    outcome = record.outcome
    return {
        "number": record.number,
        "source": record.source,
        **space.complete(record.params),
        "outcome": str(outcome.kind),
        "reused": record.reused,
        "message": outcome.message,
        "wall_s": outcome.wall_s,
        "simulated_latency_ms": expected.get(params_key(record.params)),
        **_figures(record.params, outcome, limits),
        **{f"environment_{name}": value for name, value in outcome.environment.items()},
    }


def _figures(params: Params, outcome: Outcome, limits: Limits) -> dict[str, Any]:
    if outcome.kind is not Kind.OK:
        return dict.fromkeys((*_MEASURED, *_COUNTED))
    measured = outcome.measurement
    excess = limits.excess(Tried(params, (measured,)))
    return (
        {name: getattr(measured, name) for name in _MEASURED}
        | {name: measured.stats.get(name) for name in _COUNTED}
        | {f"{name}_excess": value for name, value in excess.items()}
    )


def _front_row(
    one: Tried, default: Tried | None, chosen: Params | None, complete: Callable[[Params], Mapping[str, Value]]
) -> dict[str, Any]:
    return {
        "chosen": one.params == chosen,
        "is_default": default is not None and one.params == default.params,
        **complete(one.params),
        "latency_ms_p50": one.latency_ms_p50,
        "latency_ratio": None if default is None else one.latency_ms_p50 / default.latency_ms_p50,
        "ttft_ms_p50": one.ttft_ms_p50,
        "tpot_ms_p50": one.tpot_ms_p50,
        "tokens_per_s": one.tokens_per_s,
        "peak_memory_bytes": one.peak_memory_bytes,
        "num_runs": len(one.runs),
    }
