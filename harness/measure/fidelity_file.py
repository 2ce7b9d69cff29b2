"""What `harness.fidelity` drew and measured, on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.measure.fidelity_runs import Pair
from harness.measure.provenance import provenance
from harness.measure.resumable import reopened
from harness.search.space import Params
from runtime.files import write_named


@dataclass
class Results:
    """A JSON file, written again after each pair.

    Attributes:
        about: what was asked for; JSON.
        declared: `configurations` and how a run of them is made; empty until they are drawn.
    """

    path: Path
    about: Mapping[str, Any]
    declared: dict[str, Any] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, about: Mapping[str, Any]) -> Results:
        """A new one, or what is there. Raises UsageError where that is something else."""

        def read(content: dict[str, Any]) -> Results:
            return cls(path, about, dict(content["declared"]), [Pair.of(pair) for pair in content["pairs"]])

        return reopened(path, "harness.fidelity", about, read) or cls(path, about)

    @property
    def configurations(self) -> list[Params]:
        """In the order in which they are measured."""
        return list(self.declared["configurations"])

    def save(self, **more: Any) -> None:
        """Write what is known so far. Raises UsageError where it cannot be written."""
        content = {
            **provenance("harness.fidelity", datetime.now(UTC)),
            "about": self.about,
            "declared": self.declared,
            "pairs": [pair.as_dict() for pair in self.pairs],
            **more,
        }
        write_named("--out", self.path, json.dumps(content, indent=1) + "\n")
