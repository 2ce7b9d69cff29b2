"""No mangled file gives a traceback, a hang or a load of something unsafe; a failure prints how to repeat it.

`EXPERTFLOW_FUZZ_SECONDS` sets how long the slow test goes on, `EXPERTFLOW_FUZZ_SEED` with which inputs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
READERS = {"profile", "trace", "predictor", "prompts", "checkpoint"}


def _fuzz(folder: Path, *arguments: str, seconds: float) -> dict[str, Any]:
    """In a process of its own: limits of memory and watchers are for good, and so is a crash."""
    run = subprocess.run(
        [sys.executable, "tests/fuzz/fuzzer.py", "--folder", str(folder), "--seconds", str(seconds), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300 + 10 * seconds,
    )
    left = sorted(path.name for path in folder.iterdir())
    assert run.returncode == 0, f"{run.stderr[-6000:]}\nreturn code {run.returncode}; inputs in {folder}: {left}"
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def _check(found: dict[str, Any]) -> None:
    assert found["readers"].keys() == READERS and found["failures"] == 0
    for name, count in found["readers"].items():
        assert count["refused"] > 0 and count["accepted"] + count["refused"] == count["inputs"], name


@pytest.mark.slow
def test_mangled_files(tmp_path: Path) -> None:
    seconds = float(os.environ.get("EXPERTFLOW_FUZZ_SECONDS", "60"))
    found = _fuzz(tmp_path, "--seed", os.environ.get("EXPERTFLOW_FUZZ_SEED", "0"), seconds=seconds)
    _check(found)
    assert all(count["accepted"] for count in found["readers"].values())


_BROKEN = """
import json, os, pickle, sys
from pathlib import Path
import fuzzer
from readers import Reader
from runtime.errors import PromptError, TraceError

def refuse_too_late(path):
    try:
        raise MemoryError
    except MemoryError as error:
        raise TraceError("too large") from error

def fail(error):
    raise error

file = Path(sys.argv[1])
fuzzer.watch()
fuzzer.signal.signal(fuzzer.signal.SIGPROF, fuzzer._expire)
print(json.dumps([fuzzer.judge(Reader("", None, None, read, lambda value, path: None), file, 0.5) for read in (
    lambda path: fail(KeyError("x")),
    lambda path: pickle.loads(b"N."),
    lambda path: os.system("true"),
    lambda path: path.with_name("elsewhere").open("w"),
    lambda path: bytearray(b"x") * (300 << 20),
    lambda path: [0 for _ in iter(int, 1)],
    lambda path: fail(PromptError("")),
    refuse_too_late,
    lambda path: fail(PromptError("a way out")),
    lambda path: 1,
)]))
"""


@pytest.mark.slow
def test_the_fuzzer_sees_what_must_not_be(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _BROKEN, str(tmp_path / "file")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/fuzz")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    *found, refused, accepted = json.loads(run.stdout)
    wanted = ("KeyError", "unsafe", "unsafe", "unsafe", "of memory", "processor time", "without a word", "ran out")
    assert all(words in verdict for words, verdict in zip(wanted, found, strict=True)), found
    assert refused == "" and accepted is None and not (tmp_path / "elsewhere").exists()
