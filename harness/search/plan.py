"""How long a trial may be and how much there is time for: pure arithmetic on a first short run of the default."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from harness.search.confirm import MIN_PAIRS, NUM_PAIRS, screening_rounds
from harness.search.outcome import Measurement
from runtime.errors import UsageError

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_TRIALS_WANTED = 20
_MIN_TIMEOUT_S = 120.0
_CONFIRM_SHARE, _SCREENING_SHARE = 0.6, 0.4
MAX_FINALISTS = 5


@dataclass(frozen=True)
class Sizes:
    """How much of a workload one run takes."""

    prompt_tokens: int
    output_tokens: int
    num_requests: int

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens + self.output_tokens

    def __str__(self) -> str:
        return f"{self.num_requests} requests of {self.prompt_tokens} + {self.output_tokens} tokens"


PILOT = Sizes(prompt_tokens=64, output_tokens=8, num_requests=1)


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "6m" or "1h".

    Raises:
        UsageError: not a duration, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"{text!r} is not a duration; write it like 90s, 6m or 1h")
    return float(match[1]) * _UNITS[match[2]]


def largest_sizes(concurrency: int) -> Sizes:
    """The most that a run may take."""
    return next(_ladder(concurrency))


def choose_sizes(pilot: Measurement, concurrency: int, budget_s: float) -> tuple[Sizes, float]:
    """The largest sizes at which the default leaves time for some twenty trials, or the smallest; and its seconds.

    Args:
        pilot: a run of `PILOT` with the default configuration.
    """
    estimate_s = 0.0
    for sizes in _ladder(concurrency):
        estimate_s = _estimate_s(pilot, sizes)
        if estimate_s <= budget_s / _TRIALS_WANTED:
            break
    return sizes, estimate_s


def timeout_s(default_wall_s: float) -> float:
    """After how long a trial is given up, from the time that the default takes."""
    return max(_MIN_TIMEOUT_S, 5 * default_wall_s)


def num_pairs(pair_s: float, budget_s: float) -> int:
    """Interleaved pairs of turns that the time for confirming holds: as many as find a gain of 10 %, if it does."""
    return max(MIN_PAIRS, min(NUM_PAIRS, int(_CONFIRM_SHARE * budget_s / pair_s)))


def num_finalists(turn_s: float, budget_s: float) -> int:
    """How many configurations there is time to choose among beside the default; one needs no choosing."""
    rounds = screening_rounds(num_pairs(2 * turn_s, budget_s))
    return max(1, min(MAX_FINALISTS, int(_SCREENING_SHARE * budget_s / turn_s / rounds) - 1))


def confirm_s(turn_s: float, budget_s: float) -> float:
    """About how long confirming takes where every turn takes as long as the default's: at most."""
    pairs, finalists = num_pairs(2 * turn_s, budget_s), num_finalists(turn_s, budget_s)
    screening = (finalists + 1) * screening_rounds(pairs) if finalists > 1 else 0
    return turn_s * (2 * pairs + screening)


def _ladder(concurrency: int) -> Iterator[Sizes]:
    # Twice as many requests as are outstanding: in the first round nobody has waited for a full queue.
    num_requests = max(2 * concurrency, 6)
    yield Sizes(64, 32, num_requests)
    yield Sizes(48, 16, num_requests)
    yield Sizes(32, 8, num_requests)


def _estimate_s(pilot: Measurement, sizes: Sizes) -> float:
    tpot_ms = pilot.tpot_ms_p50 or pilot.ttft_ms_p50
    prefill_ms = pilot.ttft_ms_p50 * sizes.prompt_tokens / PILOT.prompt_tokens
    return pilot.load_s + sizes.num_requests * (prefill_ms + sizes.output_tokens * tpot_ms) / 1e3
