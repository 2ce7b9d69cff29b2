"""How far ahead to prefetch, and whether at all: learned while the engine runs, from what its passes took.

Pure bookkeeping over readings of somebody else's clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from runtime.vocabulary import Phase

BLOCK = 16  # decode passes between two decisions
WARM_UP = 32  # decode passes before a trial begins
PAIRS = 6  # of blocks with and without prefetch in a trial
NEEDED = 5  # of them must be faster without prefetch to switch it off


@dataclass(frozen=True, slots=True)
class Reading:
    """Where the clock and the counters stand when a pass begins.

    Attributes:
        num_needed: experts that were missing or prefetched so far. num_wasted: of these, evicted unused.
        num_loads, busy_s: loads done, and the time in which at least one was under way.
        stall_s: time waited for experts. num_layer_steps: layers executed.
    """

    now_s: float
    num_needed: int
    num_wasted: int
    num_loads: int
    busy_s: float
    stall_s: float
    num_layer_steps: int


class Governor:
    """Decides, before each pass, for how many layers ahead experts are prefetched in it.

    Args:
        depth: layers ahead; with `adaptive` the most, and how it begins.
        adaptive: every 16 decode passes set the depth to S = ceil(N_e E_s / (C_s T_l)), experts missing per layer times
            what a load takes over what a layer takes without waiting; one more while loads are waited for, one less
            while half of the prefetches are wasted ("ExpertFlow: Adaptive Expert Scheduling", arXiv 2510.26730).
        on_trial: after a warm-up compare blocks of decode passes with and without prefetch, in turn, and leave it off
            where it does not pay.
    Attributes:
        deepest: `depth` as given.
        verdict: what a trial that switched prefetching off has found; None otherwise.
    """

    def __init__(self, depth: int, *, adaptive: bool = False, on_trial: bool = False) -> None:
        self.verdict: str | None = None
        self.deepest, self._depth, self._adaptive = depth, depth, adaptive
        self._trial = _Trial() if on_trial and depth else None
        self._last: tuple[Phase, int, Reading] | None = None
        self._since: Reading | None = None
        self._passes = 0

    def depth(self, phase: Phase, num_tokens: int, reading: Reading) -> int:
        """Layers ahead to prefetch for in the pass of `num_tokens` tokens that begins now; 0: none."""
        if self._last is not None and (self._last[0], phase) == (Phase.DECODE, Phase.DECODE):
            self._passes += 1
            if self._trial is not None:
                _, tokens, began = self._last
                self._judge((reading.now_s - began.now_s) / max(tokens, 1))
            if self._adaptive and self._passes % BLOCK == 0:
                self._adapt(reading)
        self._last = (phase, num_tokens, reading)
        self._since = self._since or reading
        if self.verdict is not None or (self._trial is not None and self._trial.is_without):
            return 0
        return self._depth

    def _judge(self, pass_s: float) -> None:
        assert self._trial is not None
        self._trial.add(pass_s)
        if self._trial.is_over:
            self.verdict = self._trial.verdict()
            self._trial = None

    def _adapt(self, reading: Reading) -> None:
        since, self._since = self._since, reading
        assert since is not None
        layers = reading.num_layer_steps - since.num_layer_steps
        loads, needed = reading.num_loads - since.num_loads, reading.num_needed - since.num_needed
        if layers <= 0 or loads <= 0 or not self._depth:
            return
        stall_s = reading.stall_s - since.stall_s
        layer_s = max((reading.now_s - since.now_s - stall_s) / layers, 1e-9)
        load_s = (reading.busy_s - since.busy_s) / loads
        distance = math.ceil(needed / layers * load_s / layer_s)
        distance += 1 if stall_s > 0.05 * (reading.now_s - since.now_s) else 0
        distance -= 1 if reading.num_wasted - since.num_wasted > 0.5 * needed else 0
        self._depth = min(max(distance, 1), self.deepest)


class _Trial:
    """Blocks of decode passes with and without prefetch: with, without, without, with, … after a warm-up."""

    def __init__(self) -> None:
        self._num_passes = 0
        self._blocks: tuple[list[float], list[float]] = ([], [])  # median pass of each block: with, without
        self._block: list[float] = []

    @property
    def is_without(self) -> bool:
        block = (self._num_passes - WARM_UP) // BLOCK
        return self._num_passes >= WARM_UP and block % 4 in (1, 2)

    @property
    def is_over(self) -> bool:
        return len(self._blocks[0]) == len(self._blocks[1]) == PAIRS

    def add(self, pass_s: float) -> None:
        was_without, self._num_passes = self.is_without, self._num_passes + 1
        if self._num_passes <= WARM_UP:
            return
        self._block.append(pass_s)
        if len(self._block) == BLOCK:
            # Its first passes still live on what the block before it brought.
            self._blocks[was_without].append(median(self._block[BLOCK // 4 :]))
            self._block = []

    def verdict(self) -> str | None:
        """Why prefetching stops, or None where it goes on."""
        with_s, without_s = self._blocks
        faster = sum(without < by for by, without in zip(with_s, without_s, strict=True))
        if faster < NEEDED:
            return None
        return (
            f"prefetching does not pay here and is off: {median(with_s) * 1e3:.2f} ms per token with it, "
            f"{median(without_s) * 1e3:.2f} without ({faster} of {PAIRS} pairs of {BLOCK} passes)"
        )
