"""The table of predictors on a trace, as text."""

from __future__ import annotations

import pandas as pd


def predictors_text(figures: pd.DataFrame, top_k: int, more: int) -> str:
    """For people: `figures` are those of `harness.measure.prediction.ratios`, a row per predictor, or per predictor and
    layer; `more` is the number of ranks of the second recall."""
    shown = pd.DataFrame(
        {
            f"recall@{top_k}": _percent(figures["recall_at_k"]),
            f"recall@{more}": _percent(figures["recall_at_k_plus_3"]),
            "precision": _percent(figures["precision"]),
            "coverage": _percent(figures["coverage"]),
            "batch recall": _percent(figures["batch_recall"]),
            "popularity's": _percent(figures["batch_recall_of_popularity"]),
            "batch precision": _percent(figures["batch_precision"]),
            "picked/needed": [
                "" if pd.isna(picked) else f"{picked:.1f}/{needed:.1f}"
                for picked, needed in zip(figures["batch_picked"], figures["batch_needed"], strict=True)
            ],
        },
        index=figures.index,
    )
    text: str = shown.reset_index().to_string(index=False)
    return text


def _percent(shares: pd.Series) -> list[str]:
    return ["" if pd.isna(share) else f"{share:.1%}" for share in shares]
