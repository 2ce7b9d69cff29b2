"""Ctrl-C at a chosen line: what it breaks off can be broken off anywhere, between any two lines."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import runtime

ROOT = Path(runtime.__file__).parent


@dataclass
class Interrupt:
    """Attributes: has_come: it came before everything was done."""

    has_come: bool = False


@contextmanager
def interrupted_at(line: int, files: Collection[str]) -> Iterator[Interrupt]:
    """Within: KeyboardInterrupt at the `line`-th line, from 1, that is run of these files of `runtime`; it ends here.

    Python itself never interrupts between taking a lock and the block that frees it; this would.
    """
    names, interrupt = {str(ROOT / file) for file in files}, Interrupt()

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        return step if frame.f_code.co_filename in names and "_lock" not in frame.f_code.co_names else None

    def step(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal line
        line -= event == "line"
        if line == 0:
            interrupt.has_come = True
            raise KeyboardInterrupt
        return step

    former = sys.gettrace()
    sys.settrace(enter)
    try:
        yield interrupt
    except KeyboardInterrupt:
        assert interrupt.has_come, "somebody else's"
    finally:
        sys.settrace(former)
