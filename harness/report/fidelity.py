"""How close the simulator and the memory model came to what was measured: figures, verdicts and a scatter plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.plots import log_axis, png
from harness.search.agreement import rank_correlation
from runtime.machine import format_bytes

LEAST_TAU = 0.8
MOST_RATIO_ERROR = 0.15
MOST_UNDERPREDICTION = 0.02
MOST_MEMORY_ERROR = 0.03
METRICS = ("tpot", "latency")
"""The columns are `{metric}_ms`, `default_{metric}_ms`, and both with `simulated_` before them."""


def figures(table: pd.DataFrame) -> dict[str, Any]:
    """Figures of all configurations that ran, and of those that the simulator was not calibrated on.

    Args:
        table: a row for each configuration. `is_calibration`; milliseconds as `METRICS` says; `bytes_per_s` of the
            pair's loads; `peak_bytes` and `predicted_peak_bytes`.
    """
    unseen = table[~table["is_calibration"].astype(bool)]
    return {
        "unseen": _simulated(unseen),
        "all": _simulated(table),
        "memory": _memory(table),
        "bytes_per_s": _quartiles(table["bytes_per_s"]),
    }


def _simulated(table: pd.DataFrame) -> dict[str, Any]:
    found: dict[str, Any] = {"num_configurations": len(table)}
    for metric in METRICS:
        rows = table.dropna(subset=[f"{metric}_ms", f"simulated_{metric}_ms"])
        measured, simulated = ratios(rows, metric)
        found[metric] = {
            "kendall_tau": rank_correlation(list(zip(simulated, measured, strict=True)), least=2),
            "median_ratio_error": _median_error(simulated, measured),
            "median_absolute_error": _median_error(rows[f"simulated_{metric}_ms"], rows[f"{metric}_ms"]),
        }
    return found


def ratios(table: pd.DataFrame, metric: str) -> tuple[pd.Series[float], pd.Series[float]]:
    """Measured and simulated ratio of each configuration to the default beside it."""
    measured = table[f"{metric}_ms"] / table[f"default_{metric}_ms"]
    return measured, table[f"simulated_{metric}_ms"] / table[f"simulated_default_{metric}_ms"]


def _median_error(predicted: pd.Series[float], measured: pd.Series[float]) -> float | None:
    return float((predicted / measured - 1).abs().median()) if len(measured) else None


def _memory(table: pd.DataFrame) -> dict[str, float | None]:
    if not len(table):
        return {"largest_underprediction": None, "median_error": None}
    error = table["predicted_peak_bytes"] / table["peak_bytes"] - 1
    return {"largest_underprediction": float(max(0.0, -error.min())), "median_error": float(error.abs().median())}


def _quartiles(values: pd.Series[float]) -> dict[str, float | None]:
    known = values.dropna()
    names = {"low": 0.25, "median": 0.5, "high": 0.75}
    return {name: float(known.quantile(share)) if len(known) else None for name, share in names.items()}


def verdict(found: Mapping[str, Any]) -> str:
    """A line for each figure with its bound, for people."""
    return "\n".join(_verdict_lines(found))


def _verdict_lines(found: Mapping[str, Any]) -> Iterator[str]:
    for name, words in (("unseen", "not calibrated on"), ("all", "in all")):
        one = found[name]
        tpot, latency = one["tpot"], one["latency"]
        number = f"{one['num_configurations']} configurations {words}"
        yield f"order      Kendall's tau of the TPOT ratio {_at_least(tpot['kendall_tau'], LEAST_TAU)}, {number}"
        yield f"           of the latency ratio {_plain(latency['kendall_tau'])}"
        yield f"ratio      median error {_at_most(tpot['median_ratio_error'], MOST_RATIO_ERROR)} of the TPOT ratio"
        yield f"           latency ratio {_share(latency['median_ratio_error'])}"
        yield f"absolute   median error {_share(tpot['median_absolute_error'])} of the TPOT"
    rate, memory = found["bytes_per_s"], found["memory"]
    if rate["median"] is not None:
        spread = f"{format_bytes(rate['low'])}/s to {format_bytes(rate['high'])}/s"
        yield f"bandwidth  {format_bytes(rate['median'])}/s while loading (middle half of the runs: {spread})"
    yield f"memory     under-predicted by at most {_at_most(memory['largest_underprediction'], MOST_UNDERPREDICTION)}"
    yield f"           median error {_at_most(memory['median_error'], MOST_MEMORY_ERROR)}"


def _plain(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _at_least(value: float | None, bound: float) -> str:
    return f"{_plain(value)} ({_holds(value is not None and value >= bound)} {bound:g} or more)"


def _at_most(value: float | None, bound: float) -> str:
    return f"{_share(value)} ({_holds(value is not None and value <= bound)} {bound:.0%} or less)"


def _holds(does: bool) -> str:
    return "holds:" if does else "FAILS:"


def scatter_png(table: pd.DataFrame) -> bytes:
    """Simulated against measured: the ratio to the default, TPOT and latency, and the peak of memory."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 3), (*METRICS, "memory"), strict=True):
        if metric == "memory":
            _scatter(axes, table, table["peak_bytes"] / 1e6, table["predicted_peak_bytes"] / 1e6)
            axes.set(xlabel="measured peak memory (MB)", ylabel="predicted (MB)")
        else:
            measured, simulated = ratios(table, metric)
            _scatter(axes, table, measured, simulated)
            name = "TPOT" if metric == "tpot" else "latency"
            axes.set(xlabel=f"measured {name} over the default's", ylabel="simulated")
            for axis, values in ((axes.xaxis, measured), (axes.yaxis, simulated)):
                log_axis(axis, values.dropna().tolist())
    return png(figure)


def _scatter(axes: Axes, table: pd.DataFrame, measured: pd.Series[float], predicted: pd.Series[float]) -> None:
    calibration = table["is_calibration"].astype(bool)
    for rows, name, marker in ((~calibration, "not calibrated on", "o"), (calibration, "calibrated on", "x")):
        if rows.any():
            axes.scatter(measured[rows], predicted[rows], marker=marker, label=f"{name} ({int(rows.sum())})")
    low, high = (float(f(pd.concat([measured, predicted]))) for f in (np.nanmin, np.nanmax))
    axes.plot([low, high], [low, high], color="0.7", linewidth=1, zorder=0)
    axes.legend()
