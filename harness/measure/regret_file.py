"""What `harness.regret` found, on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from harness.measure.provenance import provenance
from harness.measure.resumable import reopened
from harness.report.regret import figures
from runtime.files import write_named

if TYPE_CHECKING:
    from harness.measure.regret_runs import Variant


@dataclass
class Results:
    """A JSON file with a table beside it, written again after each task.

    Attributes:
        about: what figures depend on beside the seed; JSON.
        optima: by seed. searches: with `seed`, the fields of `Variant` and those of `Searched`.
    """

    path: Path
    about: Mapping[str, Any]
    optima: dict[int, dict[str, Any]] = field(default_factory=dict)
    searches: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, about: Mapping[str, Any]) -> Results:
        """A new one, or what is there. Raises UsageError where that is something else."""

        def read(content: dict[str, Any]) -> Results:
            optima = {int(seed): optimum for seed, optimum in content["optima"].items()}
            return cls(path, about, optima, list(content["searches"]))

        return reopened(path, "harness.regret", about, read) or cls(path, about)

    def has(self, seed: int, variant: Variant) -> bool:
        """Whether that search is done."""
        key = {"seed": seed, **asdict(variant)}
        return any(key.items() <= row.items() for row in self.searches)

    def add(self, seed: int, variant: Variant | None, found: Mapping[str, Any]) -> None:
        """Take in a search or, where `variant` is None, an optimum."""
        if variant is None:
            self.optima[seed] = dict(found)
        else:
            self.searches.append({"seed": seed, **asdict(variant), **found})
        self.save()

    def save(self) -> None:
        """Write both files. Raises UsageError where they cannot be written."""
        content = {
            **provenance("harness.regret", datetime.now(UTC)),
            "about": self.about,
            "optima": dict(sorted(self.optima.items())),
            "searches": self.searches,
        }
        table = self.table()
        if len(table):
            by_variant = figures(table).replace(float("inf"), None)  # which JSON does not have
            content["figures"] = by_variant.to_dict("records")
            write_named("--out", self.path.with_suffix(".csv"), table.to_csv(index=False))
        write_named("--out", self.path, json.dumps(content, indent=1) + "\n")

    def regret(self, seed: int, latency_ms: float | None) -> float | None:
        """Latency over the least possible, minus 1: infinite where nothing was found, None while that is not known."""
        if seed not in self.optima:
            return None
        return float("inf") if latency_ms is None else latency_ms / float(self.optima[seed]["latency_ms"]) - 1

    def table(self) -> pd.DataFrame:
        """A row for each search whose `regret` is known."""
        rows = []
        for row in sorted(self.searches, key=lambda row: (row["sampler"], row["is_guided"], row["seed"])):
            regret = self.regret(row["seed"], row["latency_ms"])
            if regret is not None:
                optimum_ms = self.optima[row["seed"]]["latency_ms"]
                rows.append({**row, "params": json.dumps(row["params"]), "optimum_ms": optimum_ms, "regret": regret})
        return pd.DataFrame(rows)
