"""The result of a measurement of batching on disk: figures with what is needed to read them later."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from harness.measure.provenance import provenance
from runtime.files import write_atomic


@dataclass
class ResultFile:
    """Written again whenever something was measured; `complete` in it says whether the measurement got to its end."""

    path: Path
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, folder: Path, what: str, **about: Any) -> Self:
        """A file named by date and command; nothing is written yet."""
        now = datetime.now(UTC)
        head = {**provenance("harness.batching", now), "what": what, **about}
        return cls(folder / f"{now:%Y-%m-%d-%H%M%S}-{what}.json", head)

    def save(self, *, complete: bool = False, **measured: Any) -> None:
        """Write what is known so far."""
        self.content |= measured
        write_atomic(self.path, json.dumps({**self.content, "complete": complete}, indent=1) + "\n")
