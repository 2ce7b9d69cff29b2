"""Contenders that only pretend to run, for the tests of confirming and checking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from harness.checks.monte_carlo import Noise
from harness.measure.workload import TokenRequest
from harness.search.confirm import Confirmation, Contender, Segment, confirm
from harness.search.objective import Objective
from harness.search.outcome import Kind, Limits, Measurement, Outcome
from harness.search.space import Params

PEAK_BYTES = 1 << 30


def measurement(latency_ms: float, peak_memory_bytes: int = PEAK_BYTES, ttft_ms: float = 1.0) -> Measurement:
    """Of a made-up run."""
    return Measurement(latency_ms, ttft_ms, 1.0, 1e3 / latency_ms, "sha", peak_memory_bytes, 1, 0.1, 1.0, 10)


def ok(latency_ms: float, peak_memory_bytes: int = PEAK_BYTES, ttft_ms: float = 1.0) -> Outcome:
    """Of a run that went well."""
    return Outcome(Kind.OK, result=measurement(latency_ms, peak_memory_bytes, ttft_ms).as_dict())


def segments(count: int) -> list[Segment]:
    """As many different ones; the prompt of the nth is the token n."""
    return [(TokenRequest(f"r{n}", "task", (n,), (1, 2)),) for n in range(count)]


@dataclass
class Scripted:
    """Contenders, by the `name` among their params; `answer` is of (name, segment). Keeps what happened, in order."""

    answer: Callable[[str, int], Outcome]
    events: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)

    @contextmanager
    def open(self, params: Params) -> Iterator[Contender]:
        """Start and, on leaving, end one."""
        name, owner = str(params["name"]), self
        self.events.append(f"+{name}")

        class One:
            def run(self, requests: Segment, /) -> Outcome:
                segment = requests[0].prompt_ids[0]
                owner.events.append(f"{name}{segment}")
                return owner.answer(name, segment)

        try:
            yield One()
        finally:
            self.events.append(f"-{name}")

    def confirm(
        self,
        finalists: str,
        *,
        num_segments: int = 40,
        num_pairs: int = 6,
        objective: Objective = Objective.LATENCY,
        limits: Limits | None = None,
        num_open: int = 9,
    ) -> Confirmation:
        """Finalists have names of one letter; the default is "D"."""
        return confirm(
            [{"name": name} for name in finalists],
            {"name": "D"},
            segments(num_segments),
            open_contender=self.open,
            fit_together=lambda all_of_them: len(all_of_them) <= num_open,
            num_pairs=num_pairs,
            objective=objective,
            limits=limits or Limits(),
            on_run=lambda name, outcome: self.heard.append(name),
        )


class NoisyMachine:
    """One job on a machine as the tuning notes describe it: a factor of its own, a slow drift, scatter, spikes.

    Args:
        within: scatter of single runs, as a share. gains: of each configuration, 0.1 is 10 % faster than the default.
        peaks: of memory, as shares of the default's. between: scatter of processes, the same as long as each lives.
    """

    def __init__(
        self, seed: int, within: float, gains: Sequence[float], peaks: Sequence[float] = (), between: float = 0.0
    ) -> None:
        self._random = np.random.default_rng(seed)
        self._noise = Noise()
        self._level = self._random.normal(0, self._noise.between_jobs)
        self._text = self._random.normal(0, 0.1, 1000)
        self._within = within
        self._latency = {"D": 1.0, **{str(n): 1 - gain for n, gain in enumerate(gains)}}
        self._process = {name: self._random.normal(0, (between, 0.003)) for name in self._latency}
        self._peak = {"D": 1.0, **{str(n): 1.0 for n in range(len(gains))}}
        self._peak |= {str(n): peak for n, peak in enumerate(peaks)}

    def answer(self, name: str, segment: int) -> Outcome:
        """One run: 6 % of them are hit by something else, by a quarter on average."""
        draw, noise = self._random, self._noise
        self._level += draw.normal(0, noise.drift)
        spike = draw.exponential(noise.spike) if draw.random() < noise.spike_share else 0.0
        log = self._level + self._text[segment] + draw.normal(0, self._within) + spike + self._process[name][0]
        peak = PEAK_BYTES * self._peak[name] * (1 + self._process[name][1])
        return ok(100 * self._latency[name] * float(np.exp(log)), round(peak))

    def contenders(self) -> Scripted:
        """What `confirm` opens."""
        return Scripted(self.answer)
