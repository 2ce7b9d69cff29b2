"""The file that says whether offloaded logits are the resident model's: what it finds equal, and what not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.measure import exactness

KERNELS = (("grouped_mm", "eager"),)
CACHES = ({"cache.slots": 4, **exactness.ON_DEMAND}, {"cache.slots": "25%", **exactness.AHEAD})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = exactness.compare
    monkeypatch.setattr(exactness, "compare", lambda device: compare(device, KERNELS, CACHES))
    monkeypatch.setattr(exactness, "PROMPT_TOKENS", 12)
    monkeypatch.setattr(exactness, "OUTPUT_TOKENS", 4)


def run(out: Path, code: int) -> dict[str, Any]:
    assert exactness.main(["--device", "cpu", "--out", str(out)]) == code
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.usefixtures("small")
def test_the_engine_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path / "e.json", 0)["rows"]
    assert [row["num_slots"] for row in rows] == [4, 64] and all(row["is_exact"] for row in rows)
    assert all(row["num_equal"] == row["num_logits"] == 2 * 4 * 4096 and row["num_loads"] > 0 for row in rows)
    assert "2 of 2 configurations equal" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_one_bit_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logits, calls = exactness._logits, list[int]()

    def flipped(model: Any, request: Any) -> torch.Tensor:
        found = logits(model, request)
        calls.append(1)
        if len(calls) == 3:  # after the reference and the first run
            found.view(torch.int16)[1, 7] ^= 1
        return found

    monkeypatch.setattr(exactness, "_logits", flipped)
    wrong, right = run(tmp_path / "e.json", 1)["rows"]
    assert not wrong["is_exact"] and wrong["num_equal"] == wrong["num_logits"] - 1 and wrong["largest_difference"] > 0
    assert right["is_exact"] and "not exact" in capsys.readouterr().out
