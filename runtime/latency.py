"""How long passes and tokens take: the clock beside the forward passes, and the histograms that it fills.

One token per sequence is out when a pass ends. In ordinary `generate` TTFT is the time from the beginning of a
sequence's first pass to the end of its prefill, and each later token is timed from the one before it, whatever the
caller did in between. Continuous batching tells what its clients saw, waiting included, and times nothing here but the
passes. On CUDA the last kernels of a pass may still run when it ends.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runtime.telemetry import LATENCY_BUCKETS_S, Distribution, LatencyStats
from runtime.vocabulary import Pass, Phase


class Histogram:
    """Counts observations by size. Any thread may observe and read.

    Args:
        bounds: inclusive upper bounds of the buckets, ascending; a last one without a bound is added.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._lock = bounds, threading.Lock()
        self.reset()

    def observe(self, value: float, num: int = 1) -> None:
        """`num` observations of `value`, which is not negative."""
        bucket = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[bucket] += num
            self._sum += num * value

    def reset(self) -> None:
        """Forget all."""
        with self._lock:
            self._counts, self._sum = [0] * (len(self._bounds) + 1), 0.0

    def value(self) -> Distribution:
        """What was observed since the last `reset`."""
        with self._lock:
            return Distribution(self._bounds, tuple(self._counts), self._sum)


class _Text:
    """Where the sequences of one batch stand."""

    def __init__(self) -> None:
        self.phase: Phase | None = None  # of their last pass; None: their prompt has had none
        self.first_began_s = self.ended_s = 0.0
        self.prefill_s: float | None = None  # so far, of a prompt that may go on in further passes
        self.num_sequences = 0


class LatencyWatch:
    """Times every forward pass, and the tokens that come of them. Passes come one at a time; any thread may ask.

    Args:
        now_s: the clock, in seconds.
    """

    def __init__(self, now_s: Callable[[], float] = time.perf_counter) -> None:
        self._now_s, self._began_s, self._lock = now_s, 0.0, threading.Lock()
        self._texts: dict[int, _Text] = {}  # by the number of the first sequence; the one that ran last comes last
        self._running: _Text | None = None
        self._is_told = False  # the tokens of the passes are told by who serves them
        self._ttft, self._tpot = Histogram(LATENCY_BUCKETS_S), Histogram(LATENCY_BUCKETS_S)
        self._passes = Histogram(())

    def begin(self, passing: Pass) -> None:
        """A pass begins; to be told before it is prepared."""
        self._began_s, self._running = self._now_s(), None
        if self._is_told:
            return
        with self._lock:
            of = self._running = self._text(passing.requests[0] if passing.requests else -1)
        begins = of.phase is None or (of.phase is Phase.DECODE and passing.phase is Phase.PREFILL)
        if begins or passing.phase is Phase.DECODE:
            self._end_prefill(of)
        if begins:
            of.first_began_s, of.phase = self._began_s, None

    def end(self, passing: Pass) -> None:
        """The pass that began last ended well."""
        now_s = self._now_s()
        self._passes.observe(now_s - self._began_s)
        of, self._running = self._running, None
        if of is None:
            return
        if passing.phase is Phase.PREFILL or of.phase is None:
            of.num_sequences = len(set(passing.requests)) or 1
            of.prefill_s = now_s - of.first_began_s
        else:
            self._tpot.observe(now_s - of.ended_s, passing.num_tokens)
        of.phase, of.ended_s = passing.phase, now_s

    def first_token(self, seconds: float) -> None:
        """A client had its first token so long after it asked."""
        self._ttft.observe(seconds)

    def further_token(self, seconds: float) -> None:
        """A client had a token so long after the one before."""
        self._tpot.observe(seconds)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Within, passes are timed, but their tokens are told."""
        before, self._is_told = self._is_told, True
        try:
            yield
        finally:
            self._is_told = before

    def stats(self) -> LatencyStats:
        """What was seen since the last `reset`.

        A prompt is taken to be at its end where no pass of it runs now, until one does: then its time grows.
        """
        ended = Histogram(LATENCY_BUCKETS_S)
        with self._lock:
            for of in self._texts.values():
                if of.prefill_s is not None and of is not self._running:
                    ended.observe(of.prefill_s, of.num_sequences)
            ttft = self._ttft.value() + ended.value()
        return LatencyStats(self._passes.value().sum, ttft, self._tpot.value())

    def reset(self) -> None:
        """Forget what was seen."""
        with self._lock:
            for of in self._texts.values():
                of.prefill_s = None
        for histogram in (self._ttft, self._tpot, self._passes):
            histogram.reset()

    def _text(self, number: int) -> _Text:
        of = self._texts.pop(number, None) or _Text()
        self._texts[number] = of
        if len(self._texts) > _MOST_TEXTS:
            self._end_prefill_locked(self._texts.pop(next(iter(self._texts))))
        return of

    def _end_prefill(self, of: _Text) -> None:
        """Nothing is left of a prompt: its first token was out when its last pass ended."""
        with self._lock:
            self._end_prefill_locked(of)

    def _end_prefill_locked(self, of: _Text) -> None:
        prefill_s, of.prefill_s = of.prefill_s, None
        if prefill_s is not None:
            self._ttft.observe(prefill_s, of.num_sequences)


_MOST_TEXTS = 256  # under way at a time; nobody says when one is complete
