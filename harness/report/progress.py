"""What a user sees while the tuner measures: a bar on a terminal, a line for each run elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

from harness.report.messages import configuration_text, duration_text, outcome_text
from harness.search.outcome import Kind, Outcome, Tried
from harness.search.space import Params


class Progress:
    """A `Watcher`. The bar counts seconds of the budget, or trials where their number is given.

    Args:
        default: configurations are told by what they change in it, and its latency is what the best is compared with.
        default_ms: that latency, where it was measured before a resume.
    """

    def __init__(
        self,
        budget_s: float,
        num_trials: int | None,
        default: Params,
        default_ms: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Its own lock would be a semaphore that the trials' resource tracker reports as leaked.
        tqdm.set_lock(threading.RLock())
        self._budget_s, self._num_trials, self._clock = budget_s, num_trials, clock
        self._default, self._default_ms = default, default_ms
        self._start = self._last = clock()
        self._num_seen = 0
        self._bar = tqdm(
            total=num_trials if num_trials is not None else round(budget_s),
            unit="s" if num_trials is None else "trial",
            desc="searching",
            disable=not sys.stderr.isatty(),
            bar_format="{desc} {bar:20} {n_fmt}/{total_fmt} {unit}{postfix}",
        )

    def simulated(self, num_configurations: int) -> None:
        """A round on the simulator has ended; it began when the last trial did."""
        took_s, self._last = self._clock() - self._last, self._clock()
        self._bar.set_postfix_str(f"simulated {num_configurations} configurations")
        self._say(f"simulated {num_configurations} configurations, {took_s:.0f} s")

    def trial(self, number: int, params: Params, outcome: Outcome, best: Tried | None, source: str) -> None:
        """See `Watcher.trial`.

        Args:
            source: who proposed it.
        """
        self._last = self._clock()
        self._num_seen += 1
        if params == self._default and outcome.kind is Kind.OK:
            self._default_ms = outcome.measurement.latency_ms_p50
        gone_s = self._last - self._start
        spent = round(gone_s) if self._num_trials is None else number
        self._bar.set_postfix_str(f"trial {number}, best {self._best(best)}", refresh=False)
        self._bar.update(min(spent, self._bar.total) - self._bar.n if self._bar.total else 0)
        counted = f"{number:3}" if self._num_trials is None else f"{number:3}/{self._num_trials}"
        which = counted if outcome.was_launched else f"{'-':>{len(counted)}}"
        self._say(
            f"trial {which}  {source:9}  {outcome_text(outcome):21}  best {self._best(best)}  "
            f"{duration_text(self._left_s(number, gone_s))} left  {configuration_text(params, self._default)}",
            outcome.message,
        )

    def finalists(self, finalists: Sequence[Params]) -> None:
        """These are confirmed, by the numbers in this order."""
        for number, params in enumerate(finalists, 1):
            self._say(f"finalist {number}  {configuration_text(params, self._default)}")

    def confirmation(self, name: str, outcome: Outcome) -> None:
        """See `Watcher.confirmation`."""
        self._bar.set_description_str("confirming", refresh=False)
        self._bar.set_postfix_str(f"{name} {outcome_text(outcome)}")
        self._say(f"confirming {name:10}  {outcome_text(outcome)}", outcome.message)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _best(self, best: Tried | None) -> str:
        if best is None:
            return "none within the limits"
        share = "" if self._default_ms is None else f" ({best.latency_ms_p50 / self._default_ms:.2f}x default)"
        return f"{best.latency_ms_p50:.1f} ms, {best.peak_memory_bytes / 1e6:.0f} MB{share}"

    def _left_s(self, number: int, gone_s: float) -> float:
        """Of the budget, or less where the trials that are left need less by the mean so far."""
        left_s = self._budget_s - gone_s
        if self._num_trials is None:
            return left_s
        return min(left_s, (self._num_trials - number) * gone_s / self._num_seen)

    def _say(self, line: str, reason: str = "") -> None:
        """A line, and below it why there is no figure in it."""
        if self._bar.disable:
            print(f"{line}\n           {reason}" if reason else line, flush=True)
