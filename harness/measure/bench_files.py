"""The raw samples of a bench on disk, with what is needed to read them later: machine, commit, command, limit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.measure.blocks import Row
from harness.measure.contest import Contest
from harness.measure.limits import Limit
from harness.measure.provenance import provenance
from runtime.facts import ModelFacts
from runtime.files import write_atomic


@dataclass
class RawFile:
    """One file of samples, written again after every block; `complete` in it says whether the bench got to its end."""

    path: Path
    head: dict[str, Any]
    num_samples: int = 0

    @classmethod
    def create(cls, folder: Path, limit: Limit, facts: ModelFacts, contest: Contest) -> RawFile:
        """A file named by date and limit; nothing is written yet."""
        now = datetime.now(UTC)
        head = {
            **provenance("harness.bench", now),
            "model": {
                "name": Path(contest.model).name,
                **facts.identity.model_dump(),
                "dense_bytes": facts.dense_bytes,
            },
            "limit": asdict(limit),
            "page_cache_limited": contest.use_cgroup,
            "threads": contest.threads,
        }
        return cls(folder / f"{now:%Y-%m-%d-%H%M%S}-{limit.name}.json", head)

    def save(self, rows: Mapping[str, Row], summary: Mapping[str, Any] | None = None) -> None:
        """Write what was measured so far; with `summary` the file is complete."""
        contenders = {name: _row(row) for name, row in rows.items()}
        content = {**self.head, "complete": summary is not None, "summary": summary, "contenders": contenders}
        write_atomic(self.path, json.dumps(content, indent=1) + "\n")
        self.num_samples = sum(len(row.samples) for row in rows.values())

    def kept(self) -> str:
        """What an interrupted bench leaves behind."""
        return (
            f"{self.num_samples} samples kept in {self.path}"
            if self.num_samples
            else "no block was complete, nothing kept"
        )


def _row(row: Row) -> dict[str, Any]:
    """Samples without the record of demands, which is large and follows from the text."""
    samples = [{"block": b, **{k: v for k, v in s.items() if k != "demands"}} for b, s in row.samples.items()]
    told = ("implementation", "num_tokens", "failure", "fits", "smallest_bytes", "peak_bytes")
    return {**{key: getattr(row, key) for key in told}, "samples": samples}
