"""What a user sees while the tuner measures: a bar on a terminal, a line for each run elsewhere."""

from __future__ import annotations

import sys
import threading
import time

from tqdm import tqdm

from harness.search.outcome import Kind, Outcome, Tried
from harness.search.space import Params


class Progress:
    """A `Watcher`. The bar counts seconds of the budget, or trials where their number is given."""

    def __init__(self, budget_s: float, num_trials: int | None) -> None:
        # Its own lock would be a semaphore that the trials' resource tracker reports as leaked.
        tqdm.set_lock(threading.RLock())
        self._start, self._by_trials = time.monotonic(), num_trials is not None
        self._bar = tqdm(
            total=num_trials if num_trials is not None else round(budget_s),
            unit="trial" if self._by_trials else "s",
            desc="searching",
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {bar:20} {n_fmt}/{total_fmt} {unit}{postfix}",
        )

    def trial(self, number: int, params: Params, outcome: Outcome, best: Tried | None) -> None:
        """See `Watcher.trial`."""
        spent = number if self._by_trials else round(time.monotonic() - self._start)
        best_ms = "" if best is None else f"{best.latency_ms_p50:.1f} ms"
        self._bar.set_postfix_str(f"trial {number}, best {best_ms}", refresh=False)
        self._bar.update(min(spent, self._bar.total) - self._bar.n if self._bar.total else 0)
        chosen = ", ".join(f"{name} {value}" for name, value in params.items())
        self._say(f"trial {number:3}  {_figures(outcome)}  best {best_ms}  ({chosen})")

    def confirmation(self, name: str, outcome: Outcome) -> None:
        """See `Watcher.confirmation`."""
        self._bar.set_description_str("confirming", refresh=False)
        self._bar.set_postfix_str(f"{name} {_figures(outcome)}")
        self._say(f"confirming {name:8}  {_figures(outcome)}")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _say(self, line: str) -> None:
        if self._bar.disable:
            print(line, flush=True)


def _figures(outcome: Outcome) -> str:
    if outcome.kind is not Kind.OK:
        return f"{outcome.kind}: {outcome.message}"
    measured = outcome.measurement
    return f"{measured.latency_ms_p50:7.1f} ms  {measured.peak_memory_bytes / 1e6:6.0f} MB"
