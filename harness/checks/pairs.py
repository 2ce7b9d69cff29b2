"""Pairs of runs of two sides, in turns: what the paired check measures, and in which order.

Each side is a long-lived process. A pair is one run of a benchmark on each, never at the same time, in the order
A B B A …; after a few pairs both processes are started anew, since one may be faster or slower for all its life. The
number of pairs is fixed beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from harness.checks.decision import MIN_RESTARTS, NUM_PAIRS, NUM_RESTARTS, Samples
from harness.checks.report import Finding, Verdict
from harness.checks.side import Ended, Sample, SideFailed
from harness.measure.environment import Surroundings, SurroundingsWatch
from runtime.errors import UsageError

SIDES = ("base", "head")


class Asked(Protocol):
    """One side's process, or a stand-in; see `Side`."""

    collected: tuple[str, ...]
    uncollected: dict[str, str]

    def ready(self) -> None: ...

    def begin(self, name: str) -> None: ...

    def sample(self) -> Sample: ...

    def end(self) -> Ended: ...


Opener = Callable[[str], AbstractContextManager[Asked]]
"""Starts the process of "base" or "head"."""


@dataclass(frozen=True)
class Pair:
    """One run of each side, one right after the other.

    Attributes:
        couple: of processes, from 0. number: of the pair among those of its couple, from 0.
        disturbed: what changed around it; empty where nothing did.
        conditions: what went on beside it, for JSON.
    """

    base_s: float
    head_s: float
    couple: int
    number: int
    disturbed: str
    conditions: dict[str, Any]


@dataclass
class Metric:
    """One benchmark: its pairs in order, and what each side said of it in the end."""

    name: str
    surroundings: Surroundings
    pairs: list[Pair] = field(default_factory=list)
    info: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {side: [] for side in SIDES})

    @property
    def kept(self) -> list[Pair]:
        """Pairs that nothing disturbed."""
        return [pair for pair in self.pairs if not pair.disturbed]

    def samples(self) -> Samples:
        """Of the two sides."""
        kept = self.kept
        return Samples([p.base_s for p in kept], [p.head_s for p in kept], [p.couple for p in kept])

    def repeats(self) -> Samples:
        """Pairs of runs of one side that followed each other: they differ by noise alone.

        In A B B A … those are the second of one pair and the first of the next.
        """
        first, second, group = list[float](), list[float](), list[int]()
        for one, other in zip(self.pairs, self.pairs[1:], strict=False):
            if one.couple != other.couple or one.disturbed or other.disturbed:
                continue
            last = _order(one.couple, one.number)[-1]
            found = [one.base_s, other.base_s] if last == "base" else [one.head_s, other.head_s]
            turn = 1 if one.number % 2 else -1  # so that drift cancels, as it does between the sides
            first.append(found[::turn][0])
            second.append(found[::turn][1])
            group.append(one.couple)
        return Samples(first, second, group)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every sample, those of disturbed pairs apart."""
        samples = self.samples()
        told = self.info["head"][-1] if self.info["head"] else {}
        return {
            "base": list(samples.base),
            "head": list(samples.head),
            "group": [pair.couple for pair in self.kept],
            "info": {key: value for key, value in told.items() if key not in ("tokens", "kernels")},
            "disturbed": [asdict(pair) for pair in self.pairs if pair.disturbed],
        }


class PairedRun:
    """Runs the pairs. Failures become findings: the benchmark that they belong to is not run again.

    Args:
        open_side: starts one side's process.
        num_pairs: of each benchmark, shared by as many couples of processes as `decision` counts on.
        on_block: told a line after each pair.
    """

    def __init__(self, open_side: Opener, num_pairs: int, on_block: Callable[[str], None]) -> None:
        self._open, self._on_block = open_side, on_block
        couples = max(MIN_RESTARTS, math.ceil(num_pairs * NUM_RESTARTS / NUM_PAIRS))
        self._num_pairs, self._num_couples = num_pairs, min(num_pairs, couples)
        self.metrics: dict[str, Metric] = {}
        self.peaks: dict[str, dict[int, int]] = {side: {} for side in SIDES}
        """Most resident bytes of the processes of each side, by couple."""
        self.findings: dict[str, Finding] = {}

    def run(self, only: Sequence[str] = ()) -> None:
        """Measure the head's benchmarks, or those of `only`.

        Raises:
            UsageError: one of `only` is none of the head's.
        """
        for couple in range(self._num_couples):
            waiting: list[str] | None = [name for name in self.metrics if name not in self.findings] if couple else None
            while waiting is None or waiting:  # once more, with new processes, after a failure
                try:
                    with ExitStack() as stack:
                        sides = {side: stack.enter_context(self._open(side)) for side in SIDES}
                        for process in sides.values():  # they start together: nothing is measured yet
                            process.ready()
                        if waiting is None:
                            waiting = self._choose(sides["head"], only)
                        self._run_couple(sides, waiting, couple)
                except SideFailed as failure:
                    self.findings["benchmarks"] = _failed("benchmarks", failure)
                    return

    def _choose(self, head: Asked, only: Sequence[str]) -> list[str]:
        """The benchmarks to run; a file of the head's that cannot be read is a regression."""
        for file, reason in head.uncollected.items():
            self.findings[file] = Finding(
                file, Verdict.REGRESSION, f"the head cannot load it: {reason}", {"kind": "missing"}
            )
        if unknown := sorted(set(only) - set(head.collected)):
            known = ", ".join(head.collected) or "none"
            raise UsageError(f"no benchmark {', '.join(unknown)}: there are {known}")
        self.metrics = {name: Metric(name, Surroundings()) for name in head.collected if not only or name in only}
        return list(self.metrics)

    def _run_couple(self, sides: dict[str, Asked], waiting: list[str], couple: int) -> None:
        """Run what is `waiting`, and take it from there, until all is done or a process must not go on."""
        while waiting:
            metric = self.metrics[waiting.pop(0)]
            try:
                self._run_benchmark(sides, metric, couple)
            except SideFailed as failure:
                self.findings[metric.name] = _failed(metric.name, failure)
                return

    def _run_benchmark(self, sides: dict[str, Asked], metric: Metric, couple: int) -> None:
        try:
            sides["base"].begin(metric.name)
        except SideFailed as failure:
            if failure.kind not in ("missing", "skipped"):
                raise
            self.findings[metric.name] = _alone(sides["head"], metric.name, failure)
            return
        sides["head"].begin(metric.name)
        for number in range(self._share(couple)):
            watch = metric.surroundings.watch()
            samples = {side: sides[side].sample() for side in _order(couple, number)}
            metric.pairs.append(self._pair(metric, samples, couple, number, watch))
        for side in SIDES:
            ended = sides[side].end()
            metric.info[side].append(ended.info)
            if ended.peak_bytes is not None:
                self.peaks[side][couple] = max(ended.peak_bytes, self.peaks[side].get(couple, 0))

    def _share(self, couple: int) -> int:
        """Pairs of one couple."""
        return self._num_pairs // self._num_couples + (couple < self._num_pairs % self._num_couples)

    def _pair(
        self, metric: Metric, samples: dict[str, Sample], couple: int, number: int, watch: SurroundingsWatch
    ) -> Pair:
        ran, waited = (sum(getattr(one, key) for one in samples.values()) for key in ("ran_ns", "waited_ns"))
        wait_share = waited / (ran + waited) if ran + waited else None
        now = watch.end(sum(one.cpu_s for one in samples.values()), wait_share)
        base_s, head_s = samples["base"].seconds, samples["head"].seconds
        disturbed = metric.surroundings.changed(now)
        done, of = len(metric.pairs) + 1, self._num_pairs
        told = f"base {base_s:.3f} s, head {head_s:.3f} s{f', disturbed: {disturbed}' if disturbed else ''}"
        self._on_block(f"{metric.name} {done}/{of}: {told}")
        return Pair(base_s, head_s, couple, number, disturbed, now.as_dict())


def _order(couple: int, number: int) -> tuple[str, ...]:
    """Which side goes first: A B B A …, and the other way round in the next couple."""
    return SIDES if (couple + number) % 2 == 0 else SIDES[::-1]


def _alone(head: Asked, name: str, failure: SideFailed) -> Finding:
    """A benchmark that the base cannot run: the head must.

    Raises:
        SideFailed: it cannot either.
    """
    try:
        head.begin(name)
        head.end()
    except SideFailed as own:
        if not own.kind == failure.kind == "skipped":
            raise
        return Finding(name, Verdict.PASS, f"skipped, not compared: {own}")
    why = "skips it" if failure.kind == "skipped" else "lacks what it needs"
    return Finding(name, Verdict.PASS, f"new, not compared: the base {why} ({failure})")


def _failed(name: str, failure: SideFailed) -> Finding:
    """A head that fails is a regression; of a base that does, nothing can be said."""
    if failure.kind == "wrong tree":
        return Finding(name, Verdict.INVALID, f"the {failure.side} {failure}")
    how = {"crash": "crashes", "hang": "hangs", "skipped": "skips it"}.get(failure.kind, "fails")
    verdict = Verdict.REGRESSION if failure.side == "head" else Verdict.INVALID
    return Finding(name, verdict, f"the {failure.side} {how}: {failure}", {"kind": failure.kind})
