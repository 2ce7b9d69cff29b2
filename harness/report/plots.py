"""Figures of a search and of replays, and how they become PNG or inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

from harness.search.agreement import Agreement
from harness.search.outcome import Kind, Limits, Record, Tried, feasible, front

_RED, _BLUE, _GREY = "tab:red", "tab:blue", "0.6"
_LATENCY = "latency, p50 per output token (ms)"
_FAILED = {
    Kind.TOO_LARGE: ("v", "predicted too large"),
    Kind.OUT_OF_MEMORY: ("X", "out of memory"),
    Kind.TIMEOUT: ("P", "timeout"),
    Kind.CRASH: ("*", "crash"),
    Kind.WRONG_TOKENS: ("D", "wrong tokens"),
    Kind.ERROR: ("p", "error"),
    Kind.HOPELESS: ("1", "stopped early"),
    Kind.ENVIRONMENT: ("2", "machine was disturbed"),
}
"""Marker and name of the outcomes that have no latency."""


def pareto(
    tried: Sequence[Tried], limits: Limits, default: Tried | None, chosen: Tried | None, *, memory: str = "memory"
) -> Figure:
    """Latency against peak memory: what was tried, what exceeds a limit, the front, the default, the chosen one."""
    figure, axes = _one(9)
    within = feasible(tried, limits)
    outside = [one for one in tried if not limits.allow(one)]
    axes.scatter(*_points(within), s=18, color=_GREY, label="tried")
    if outside:
        axes.scatter(*_points(outside), s=28, marker="x", color="tab:orange", label="exceeds a limit")
    axes.step(*_points(front(within)), where="post", color=_BLUE, marker="o", label="Pareto front")
    for one, marker, name in ((default, "s", "default"), (chosen, "*", "chosen")):
        if one is not None:
            style: dict[str, Any] = {
                "marker": marker,
                "facecolors": "none",
                "edgecolors": _RED,
                "linewidths": 1.5,
                "zorder": 3,
            }
            axes.scatter(*_points([one]), s=220 if marker == "*" else 110, label=name, **style)
    if limits.max_memory_bytes is not None:
        label = f"memory limit, {limits.max_memory_bytes / 1e6:.0f} MB"
        axes.axhline(limits.max_memory_bytes / 1e6, linestyle="--", color=_RED, label=label)
    axes.set(xlabel=_LATENCY, ylabel=f"peak {memory} (MB)")
    log_axis(axes.xaxis, [one.latency_ms_p50 for one in tried])
    figure.legend(loc="outside right upper")
    return figure


def importance(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """A panel per objective; the bars of its knobs, the most important on top."""
    figure = Figure(figsize=(9, 1 + 0.3 * max(len(knobs) for knobs in shares.values())), layout="constrained")
    for axes, (objective, knobs) in zip(figure.subplots(1, len(shares), squeeze=False)[0], shares.items(), strict=True):
        rising = sorted(knobs.items(), key=lambda item: item[1])
        axes.barh([name for name, _ in rising], [100 * share for _, share in rising], color=_BLUE)
        axes.set(title=f"{objective}", xlabel="share of the importance (%)")
    return figure


def simulated(agreement: Agreement) -> Figure:
    """Simulated against measured latency, a point per configuration, and the line where they are equal."""
    figure, axes = _one()
    expected, measured = zip(*agreement.pairs, strict=True)
    ends = [min(*expected, *measured), max(*expected, *measured)]
    axes.plot(ends, ends, linestyle="--", color=_GREY, label="equal")
    axes.scatter(measured, expected, s=24, color=_BLUE, label="a configuration")
    axes.set(xlabel=f"measured {_LATENCY}", ylabel="simulated latency (ms)", title=str(agreement))
    log_axis(axes.xaxis, ends)
    log_axis(axes.yaxis, ends)
    axes.legend()
    return figure


def history(records: Sequence[Record], limits: Limits) -> Figure:
    """Every trial in order by how it ended, and the lowest latency within the limits so far."""
    figure, axes = _one(9)
    run = [record for record in records if not record.reused]
    measured = [
        (one.number, Tried(one.params, (one.outcome.measurement,))) for one in run if one.outcome.kind is Kind.OK
    ]
    for allowed, marker, color, name in ((True, "o", _BLUE, "measured"), (False, "x", "tab:orange", "exceeds a limit")):
        shown = [(number, one.latency_ms_p50) for number, one in measured if limits.allow(one) is allowed]
        if shown:
            numbers, latencies = zip(*shown, strict=True)
            axes.scatter(numbers, latencies, s=24, marker=marker, color=color, label=name)
    within = [(number, one.latency_ms_p50) for number, one in measured if limits.allow(one)]
    if within:
        numbers, latencies = zip(*within, strict=True)
        end = max(record.number for record in run)
        best = [*accumulate(latencies, min)]
        axes.step([*numbers, end], [*best, best[-1]], where="post", color=_BLUE, label="best so far")
    _failures(axes, run)
    axes.set(xlabel="trial", ylabel=_LATENCY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    log_axis(axes.yaxis, [one.latency_ms_p50 for _, one in measured])
    figure.legend(loc="outside right upper")
    return figure


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
    return png(figure)


def png(figure: Figure) -> bytes:
    """The file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """An element to put into a page.

    Args:
        name: what every id in it begins with; another one for every figure of a page.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    whole = buffer.getvalue()
    element = re.sub(r"<metadata>.*?</metadata>", "", whole[whole.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", element)


def log_axis(axis: Axis, values: Sequence[float]) -> None:
    """A logarithmic axis whose ticks are plain numbers, however narrow its range."""
    set_scale = axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale
    set_scale("log")
    is_wide = bool(values) and max(values) > 5 * min(values)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if is_wide else MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _one(width: float = 7) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 4.5), layout="constrained")
    return figure, figure.subplots()


def _failures(axes: Axes, run: Sequence[Record]) -> None:
    """Trials without a latency stand along the upper edge."""
    edge = axes.get_xaxis_transform()
    for kind, (marker, name) in _FAILED.items():
        numbers = [record.number for record in run if record.outcome.kind is kind]
        if numbers:
            style: dict[str, Any] = {"marker": marker, "s": 36, "color": _RED, "clip_on": False, "zorder": 3}
            axes.scatter(numbers, [1.0] * len(numbers), label=name, transform=edge, **style)


def _points(tried: Sequence[Tried]) -> tuple[list[float], list[float]]:
    return [one.latency_ms_p50 for one in tried], [one.peak_memory_bytes / 1e6 for one in tried]
