"""Many requests of random lengths through one engine: does it keep its promise of memory, and does it grow?

The engine runs in a process of its own (`harness.measure.soak_worker`), so that the figures are its own, and so does
the resident model that its tokens are held against. Here: which requests run, and what the samples say.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import theilslopes

from runtime.errors import ExpertFlowError
from runtime.machine import format_bytes

WARM_UP = 0.25
"""Share of the requests before which growth is not judged: caches of compiled kernels, one per shape, still fill."""

LEAST_JUDGED = 400
"""Requests before whose end growth is not judged: in a shorter run the caches fill after a quarter of it, too."""

MOST_BYTES_PER_REQUEST = 16 << 10
MOST_STEP_BYTES = 16 << 20
"""What the last third may take beyond the first: a forgotten KV cache of one request would be more than that in all."""

_ROOT = Path(__file__).parents[2]


class SoakFailed(ExpertFlowError):
    """The engine, or its reference, did not come to the end."""


@dataclass(frozen=True)
class Soak:
    """What runs.

    Attributes:
        profile: its file; None: the default one.
        overrides: dotted profile keys and their values.
        max_memory_bytes: the promise where the profile makes none; None: the sum that the configuration needs.
        prompt_tokens, output_tokens: shortest and longest; lengths between are equally likely.
        batch: requests that are served together at most; a half of the requests run alone.
        sample_every: requests between two looks at the process.
    """

    model: str
    profile: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    max_memory_bytes: int | None = None
    num_requests: int = 1000
    seed: int = 0
    prompt_tokens: tuple[int, int] = (4, 96)
    output_tokens: tuple[int, int] = (1, 8)
    batch: int = 6
    sample_every: int = 50


class Piece(NamedTuple):
    """One request: where in the text its prompt begins, a share of 1, and its tokens."""

    start: float
    prompt_tokens: int
    output_tokens: int


def rounds(soak: Soak) -> Iterator[list[Piece]]:
    """The requests that run together, one round after the other; a function of the seed."""
    rng, left = np.random.default_rng(soak.seed), soak.num_requests
    while left:
        count = 1 if soak.batch == 1 or rng.random() < 0.75 else int(rng.integers(2, soak.batch + 1))
        count = min(count, left)
        left -= count
        yield [
            Piece(
                float(rng.random()),
                int(rng.integers(soak.prompt_tokens[0], soak.prompt_tokens[1] + 1)),
                int(rng.integers(soak.output_tokens[0], soak.output_tokens[1] + 1)),
            )
            for _ in range(count)
        ]


class Sample(NamedTuple):
    """The process after so many requests."""

    num_requests: int
    resident_bytes: int
    peak_bytes: int
    num_files: int
    num_threads: int


@dataclass(frozen=True)
class Trend:
    """Resident memory over requests, after the warm-up.

    Attributes:
        bytes_per_request: Theil-Sen slope; low, high: its 95 % interval.
        step_bytes: median of the last third less that of the first.
    """

    bytes_per_request: float
    low: float
    high: float
    step_bytes: float

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Trend:
        """Raises ValueError with fewer than six samples after the warm-up."""
        settled = [one for one in samples if one.num_requests >= WARM_UP * samples[-1].num_requests]
        if len(settled) < 6:
            raise ValueError(f"{len(settled)} samples after the warm-up say nothing about growth; take 6 or more")
        resident = np.array([one.resident_bytes for one in settled], np.float64)
        slope, _, low, high = theilslopes(resident, [one.num_requests for one in settled])
        third = len(resident) // 3
        step = np.median(resident[-third:]) - np.median(resident[:third])
        return cls(float(slope), float(low), float(high), float(step))

    @property
    def is_level(self) -> bool:
        """False: the process grows."""
        return self.bytes_per_request <= MOST_BYTES_PER_REQUEST and self.step_bytes <= MOST_STEP_BYTES


@dataclass(frozen=True)
class SoakResult:
    """What a soak found.

    Attributes:
        promise_bytes: `limits.max_memory_bytes` that the engine ran with.
        different: ids of requests whose tokens are not those of the resident model; None: not compared.
        integrity: what the cache's bookkeeping complains of; empty: nothing.
    """

    promise_bytes: int
    samples: tuple[Sample, ...]
    different: tuple[str, ...] | None
    integrity: str
    facts: Mapping[str, Any]

    @property
    def trend(self) -> Trend:
        """Of resident memory."""
        return Trend.of(self.samples)

    @property
    def is_long(self) -> bool:
        """False: too few requests to tell growth from caches that fill."""
        return self.samples[-1].num_requests >= LEAST_JUDGED

    @property
    def peak_bytes(self) -> int:
        """Highest resident memory since the process began, loading included."""
        return self.samples[-1].peak_bytes

    @property
    def failures(self) -> list[str]:
        """What did not hold, one line each."""
        trend, settled = self.trend, self.samples[1:]
        found = []
        if self.peak_bytes > self.promise_bytes:
            promised = format_bytes(self.promise_bytes)
            found.append(f"a peak of {format_bytes(self.peak_bytes)} where {promised} were promised")
        if self.is_long and not trend.is_level:
            found.append(
                f"resident memory grows by {format_bytes(max(trend.bytes_per_request, 0))} per request, and "
                f"{format_bytes(max(trend.step_bytes, 0))} from the first third to the last"
            )
        for name, most in (("files", "num_files"), ("threads", "num_threads")):
            counts = [getattr(one, most) for one in settled]
            if counts[-1] > counts[0]:
                found.append(f"{counts[-1]} {name} are open at the end, {counts[0]} were after the first requests")
        if self.different:
            found.append(f"{len(self.different)} requests differ from the resident model, {self.different[0]} first")
        if self.integrity:
            found.append(f"the cache contradicts itself: {self.integrity}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "passed": not self.failures,
            "failures": self.failures,
            "promise_bytes": self.promise_bytes,
            "peak_bytes": self.peak_bytes,
            "bytes_per_request": round(self.trend.bytes_per_request, 1),
            "bytes_per_request_95": [round(self.trend.low, 1), round(self.trend.high, 1)],
            "most_bytes_per_request": MOST_BYTES_PER_REQUEST,
            "growth_is_judged": self.is_long,
            "last_less_first_third_bytes": int(self.trend.step_bytes),
            "num_different": None if self.different is None else len(self.different),
            "files": [self.samples[1].num_files, self.samples[-1].num_files],
            "threads": [self.samples[1].num_threads, self.samples[-1].num_threads],
            **self.facts,
        }

    def csv(self) -> str:
        """The samples."""
        return "\n".join([",".join(Sample._fields), *(",".join(map(str, one)) for one in self.samples)]) + "\n"

    def describe(self) -> str:
        """For people."""
        trend = self.trend
        tokens = "not compared" if self.different is None else f"{len(self.different)} differ from the resident model"
        judged = f"at most {MOST_BYTES_PER_REQUEST}" if self.is_long else f"judged from {LEAST_JUDGED} requests on"
        lines = [
            f"memory     peak {format_bytes(self.peak_bytes)} of {format_bytes(self.promise_bytes)} promised",
            f"growth     {trend.bytes_per_request:+.0f} bytes per request "
            f"(95 %: {trend.low:+.0f} to {trend.high:+.0f}; {judged})",
            f"tokens     {self.samples[-1].num_requests} requests, {tokens}",
            f"process    {self.samples[-1].num_files} files, {self.samples[-1].num_threads} threads at the end",
        ]
        return "\n".join([*lines, *(f"FAILED     {failure}" for failure in self.failures)])


Kind = Literal["offloaded", "resident"]


def run_soak(soak: Soak, *, compare: bool, on_requests: Callable[[int], None] = lambda count: None) -> SoakResult:
    """Run it, and with `compare` the resident model through the same rounds.

    Args:
        on_requests: told how many requests have run since it was last called, of either.

    Raises:
        SoakFailed: a process did not come to its end.
    """
    ran = _run(soak, "offloaded", on_requests)
    different = None
    if compare:
        wanted = _run(soak, "resident", on_requests).answers
        different = tuple(name for name in wanted if ran.answers[name] != wanted[name])
    return SoakResult(ran.end["promise_bytes"], ran.samples, different, ran.end["integrity"], ran.end["facts"])


class _Ran(NamedTuple):
    """What a process told: the tokens of every request by its id, its samples, and what became of it."""

    answers: dict[str, list[int]]
    samples: tuple[Sample, ...]
    end: dict[str, Any]


def _run(soak: Soak, kind: Kind, on_requests: Callable[[int], None]) -> _Ran:
    answers: dict[str, list[int]] = {}
    samples: list[Sample] = []
    command = [sys.executable, "-m", "harness.measure.soak_worker", json.dumps({"kind": kind, **asdict(soak)})]
    search = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "PYTHONPATH": search}
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                told = json.loads(line)
                if "error" in told:
                    raise SoakFailed(told["error"])
                if "end" in told:
                    return _Ran(answers, tuple(samples), told["end"])
                if "sample" in told:
                    samples.append(Sample(*told["sample"]))
                    continue
                answers.update(told["tokens"])
                on_requests(len(told["tokens"]))
        finally:
            process.kill()
        errors.seek(0)
        last = errors.read().strip().splitlines()
        raise SoakFailed(f"the {kind} model ended after {len(answers)} requests: {last[-1] if last else 'no word'}")
