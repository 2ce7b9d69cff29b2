"""A run as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from harness.report.plots import svg

CAPTIONS = {
    "pareto": "Latency against peak memory. The front holds the configurations that no other beats in both.",
    "history": "Every trial in order. Those along the upper edge ended without a measurement.",
    "importance": "How much each knob tells of whether a configuration is among the best, by PED-ANOVA over the trials "
    "that were measured; of a few dozen no more than a hint.",
    "simulated": "Latency that the simulator foretold before each configuration ran, against what was then measured.",
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
pre { background: #f4f4f4; padding: .75rem; overflow-x: auto; white-space: pre-wrap }
figure { margin: 1.5rem 0 } figcaption { color: #555 } svg { max-width: 100%; height: auto }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
"""


def page(
    *,
    title: str,
    verdict: str,
    command: str,
    figures: Mapping[str, Figure],
    front: pd.DataFrame,
    trials: pd.DataFrame,
    environment: Mapping[str, Any],
) -> str:
    """The page.

    Args:
        verdict: text of a few lines. command: that reproduces the run.
        figures: by name; those of `CAPTIONS` are explained.
        front, trials: tables; columns without a value are left out.
        environment: JSON.
    """
    drawn = "\n".join(
        f"<figure>\n{svg(figure, name)}\n<figcaption>{escape(CAPTIONS.get(name, name))}</figcaption>\n</figure>"
        for name, figure in figures.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<pre>{escape(verdict)}</pre>
<h2>Command</h2>
<pre>{escape(command)}</pre>
<h2>Pareto front of the search, and the default</h2>
{_table(front)}
<h2>Figures</h2>
{drawn}
<h2>Trials</h2>
{_table(trials)}
<h2>Environment</h2>
<pre>{escape(json.dumps(environment, indent=2))}</pre>
</body>
</html>
"""


def _table(table: pd.DataFrame) -> str:
    if table.empty:
        return "<p>none</p>"
    told = table.dropna(axis="columns", how="all")
    html = told.to_html(index=False, border=False, na_rep="", float_format=_number, justify="right")
    return f'<div class="wide">\n{html}\n</div>'


def _number(value: float) -> str:
    """Four digits; bytes, which are floats where some are missing, in full."""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
