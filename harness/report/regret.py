"""How far searches ended from the optimum: figures, a table and verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

MOST_MEDIAN, MOST_P90, MOST_INFEASIBLE = 0.02, 0.05, 0.10
VARIANT = ["sampler", "is_guided"]


def figures(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each variant, the one with the least median regret first.

    Args:
        rows: one for each search: `sampler`, `is_guided`, `regret` (noise-free latency of the chosen configuration over
            the least possible, minus 1; infinite where nothing was found), `num_launched`, `num_infeasible` of these,
            `sampler_s` of processor time.
    """
    groups = rows.groupby(VARIANT, sort=False)
    table = pd.DataFrame(
        {
            "num_seeds": groups.size(),
            "median_regret": groups["regret"].median(),
            # With infinite values interpolation gives nan; the higher of the two neighbours is a number, and no kinder.
            "p90_regret": groups["regret"].agg(lambda regrets: float(np.quantile(regrets, 0.9, method="higher"))),
            "infeasible_share": groups["num_infeasible"].sum() / groups["num_launched"].sum(),
            "most_launched": groups["num_launched"].max(),
            "sampler_s": groups["sampler_s"].median(),
        }
    )
    return table.sort_values(["median_regret", "p90_regret"]).reset_index()


def table_text(table: pd.DataFrame) -> str:
    """For people."""
    shown = pd.DataFrame(
        {
            "sampler": table["sampler"],
            "simulator": table["is_guided"].map({True: "guides", False: "unused"}),
            "seeds": table["num_seeds"],
            "median regret": table["median_regret"].map("{:.2%}".format),
            "90th percentile": table["p90_regret"].map("{:.2%}".format),
            "infeasible": table["infeasible_share"].map("{:.1%}".format),
            "sampler, s of a core": table["sampler_s"].map("{:.1f}".format),
        }
    )
    return shown.to_string(index=False)


def verdict(row: Mapping[str, Any]) -> str:
    """A line for each bound, for people."""
    return "\n".join(_verdict_lines(row))


def _verdict_lines(row: Mapping[str, Any]) -> Iterator[str]:
    launched, seeds = row["most_launched"], row["num_seeds"]
    yield f"{row['sampler']}, at most {launched} launched trials, {seeds} seeds"
    for words, name, bound in (
        ("median regret", "median_regret", MOST_MEDIAN),
        ("90th percentile", "p90_regret", MOST_P90),
        ("infeasible", "infeasible_share", MOST_INFEASIBLE),
    ):
        holds = "holds:" if row[name] <= bound else "FAILS:"
        yield f"{words:<16}{row[name]:7.2%} ({holds} {bound:.0%} or less)"
