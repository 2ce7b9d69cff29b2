"""Plots of a search and of replays, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from harness.search.outcome import Tried, front
from harness.search.space import Params


def pareto_png(tried: Sequence[Tried], default: Params, chosen: Params, max_memory_bytes: int | None) -> bytes:
    """Latency against peak memory: every configuration, the front, the default, the chosen one, the limit."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.scatter(*_points(tried), s=18, color="0.6", label="tried")
    axes.step(*_points(front(tried)), where="post", color="tab:blue", marker="o", label="Pareto front")
    for params, marker, name in ((default, "s", "default"), (chosen, "*", "chosen")):
        marked = [one for one in tried if one.params == params]
        axes.scatter(*_points(marked), s=130, marker=marker, facecolors="none", edgecolors="tab:red", label=name)
    if max_memory_bytes is not None:
        axes.axhline(max_memory_bytes / 1e6, linestyle="--", color="tab:red", label="limit")
    axes.set(xlabel="latency, p50 per output token (ms)", ylabel="peak memory (MB)", xscale="log")
    axes.legend()
    return _png(figure)


def replays_png(table: pd.DataFrame, num_experts: int) -> bytes:
    """Hit rate and share of the time spent waiting against the share of the experts in slots, a line per policy."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (policy, predictor), rows in table.groupby(["policy", "predictor"], sort=False):
        rows = rows.sort_values("slots")
        name = policy if predictor == "none" else f"{policy}, {predictor}"
        style = "--" if policy in ("lru", "belady") else "-"
        share = 100 * rows["slots"] / num_experts
        left.plot(share, 100 * rows["hit_rate"], style, marker=".", label=name)
        right.plot(share, 100 * rows["stall_s"] / rows["elapsed_s"], style, marker=".", label=name)
    left.set(xlabel="experts in slots (%)", ylabel="hit rate (%)")
    right.set(xlabel="experts in slots (%)", ylabel="time spent waiting (%)")
    left.legend()
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _points(tried: Sequence[Tried]) -> tuple[list[float], list[float]]:
    return [one.latency_ms_p50 for one in tried], [one.peak_memory_bytes / 1e6 for one in tried]
