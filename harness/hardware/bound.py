"""What physics allows: the bound of a decode step, the misses that no cache could avoid, and the ladder from there.

    T >= max( (D + L (k - m) s) / B_memory,  misses s / B_link,  L m s / B_host_compute,  host bytes / B_host )

batch 1, exact routing; D dense bytes per token, s bytes per expert, k active per layer, L layers, m experts per layer
computed where they are rather than moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from harness.measure.stats import Ratio
from runtime.cache.residency import next_demands


@dataclass(frozen=True)
class DecodeWork:
    """What one decoded token has to touch, and the rates at which this machine can.

    `computed_in_place` is m; the two host rates are needed only where experts are computed on or moved through a host.
    """

    dense_bytes: int
    expert_bytes: int
    num_layers: int
    top_k: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    computed_in_place: float = 0.0
    host_compute_bytes_per_s: float | None = None
    host_bytes: float = 0.0
    host_bytes_per_s: float | None = None

    def seconds_per_token(self, misses_per_token: float) -> float:
        """The bound for a token that misses `misses_per_token` experts."""
        s, in_place = self.expert_bytes, self.num_layers * self.computed_in_place
        terms = [
            (self.dense_bytes + (self.num_layers * self.top_k - in_place) * s) / self.memory_bytes_per_s,
            misses_per_token * s / self.link_bytes_per_s,
        ]
        if self.host_compute_bytes_per_s is not None:
            terms.append(in_place * s / self.host_compute_bytes_per_s)
        if self.host_bytes_per_s is not None:
            terms.append(self.host_bytes / self.host_bytes_per_s)
        return max(terms)


def oracle_misses(demands: Sequence[Sequence[int]], num_slots: int) -> int:
    """Fewest loads with which `num_slots` pooled slots could have served `demands`, by Belady's rule.

    The oracle starts with the best contents (an empty slot is filled for free): the count bounds an engine that was
    warm already. A layer step's experts stay during that step, as long as there are other candidates. With steps that
    need more experts than there are slots it is near the fewest only, and not what the cache's own oracle, which goes
    in waves, counts.

    Args:
        demands: per layer step, the distinct experts (ids over all layers) that it needs, in the order of execution.
        num_slots: at least 1.
    """
    starts = np.cumsum([0, *map(len, demands)])
    flat = np.fromiter((expert for step in demands for expert in step), np.int64, int(starts[-1]))
    if not flat.size:
        return 0
    step_of = np.repeat(np.arange(len(demands)), np.diff(starts))
    return int(_belady(flat, step_of, next_demands(starts, flat), int(flat.max()) + 1, num_slots))


@njit(cache=True)
def _belady(flat, step_of, next_use, num_experts, num_slots):  # type: ignore[no-untyped-def]
    """Loads that replaced something. `until[e]` is the next step that needs resident e, -1 for an absent one."""
    until = np.full(num_experts, -1, np.int64)
    used_in = np.full(num_experts, -1, np.int64)
    misses, free, start = 0, num_slots, 0
    while start < flat.size:
        step, end = step_of[start], start
        while end < flat.size and step_of[end] == step:
            if until[flat[end]] >= 0:  # what is here is used before anything is evicted
                used_in[flat[end]], until[flat[end]] = step, next_use[end]
            end += 1
        for i in range(start, end):
            if used_in[flat[i]] == step:
                continue
            if free > 0:
                free -= 1
            else:
                victim, farthest = 0, -1
                for other in range(num_experts):
                    # Experts used in this step rank below all others; they go only when nothing else is left.
                    rank = until[other] if used_in[other] == step else until[other] + step_of.size + flat.size
                    if until[other] >= 0 and rank > farthest:
                        victim, farthest = other, rank
                until[victim] = -1
                misses += 1
            until[flat[i]], used_in[flat[i]] = next_use[i], step
        start = end
    return misses


@dataclass(frozen=True)
class Ladder:
    """Decode rates in tokens/s from what no cache could beat down to what was measured.

    `attainable` is 1 / max(resident model through the same kernels, replay of the run's own needed loads), seconds per
    token measured in the same run. `fraction` is measured / attainable over the run's paired blocks.
    """

    bound_oracle: float | None
    bound_own: float
    attainable: float
    measured: float
    fraction: Ratio

    @property
    def flag(self) -> str | None:
        """A warning when the fraction is above 1 by more than its interval: the measurement is wrong, not physics."""
        if self.fraction.low <= 1:
            return None
        return f"a fraction of attainable above 1 by more than its interval, {self.fraction}: the measurement is wrong"

    def table(self) -> str:
        """Four rows, each with its share of the attainable."""
        rows = [
            ("bound with oracle misses", self.bound_oracle),
            ("bound with own misses", self.bound_own),
            ("attainable", self.attainable),
            ("measured", self.measured),
        ]
        lines = [f"{'decode tokens/s, batch 1':<28}{'tokens/s':>10}{'of attainable':>16}"]
        for name, rate in rows:
            known = "not measured" if rate is None else f"{rate:.2f}"
            share = "" if rate is None else f"{rate / self.attainable:.2f}"
            lines.append(f"{name:<28}{known:>10}{share:>16}")
        lines.append(f"fraction of attainable (paired blocks): {self.fraction}")
        return "\n".join(lines + ([f"WARNING: {self.flag}"] if self.flag else []))
