"""Counters of the engine and of the simulator, and their summary. Values only: no clock, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runtime.transfer.base import TransferStats


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What the cache decided since the counters were last reset.

    A lookup is one demanded expert in one layer step, however many tokens demand it: a hit, in flight or a miss.

    Attributes:
        num_lookups: num_hits + num_in_flight + num_misses.
        num_hits: the expert was in its slot.
        num_in_flight: it was on its way, brought by a prefetch.
        num_misses: it had to be loaded on demand.
        num_evictions: residents that lost their slot.
        num_prefetch_issued: loads decided ahead of demand.
        num_prefetch_used: of these, demanded (arrived or in flight) before they were evicted; counted at the first use.
        num_prefetch_wasted: of these, evicted without having been demanded.
        num_layer_steps: MoE layers executed.
        num_waves: rounds of slots that the layer steps took; equal to num_layer_steps when every step fitted in one.
        num_passes: forward passes.
        num_tokens: tokens in them.
        num_substituted: choices of absent experts, by token and rank, that went to resident ones (`lossy.substitute`).
    """

    num_lookups: int = 0
    num_hits: int = 0
    num_in_flight: int = 0
    num_misses: int = 0
    num_evictions: int = 0
    num_prefetch_issued: int = 0
    num_prefetch_used: int = 0
    num_prefetch_wasted: int = 0
    num_layer_steps: int = 0
    num_waves: int = 0
    num_passes: int = 0
    num_tokens: int = 0
    num_substituted: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Hits per lookup; in flight is no hit. None without lookups."""
        return self.num_hits / self.num_lookups if self.num_lookups else None

    @property
    def num_prefetch_pending(self) -> int:
        """Prefetches that are resident or on their way and not demanded so far: neither used nor wasted.

        num_prefetch_wasted = num_prefetch_issued - num_prefetch_used - num_prefetch_pending, at every moment. Those
        dropped because a read failed stay pending. Right after a reset, prefetches of before it are used or wasted
        without having been issued; never below 0 for that.
        """
        return max(0, self.num_prefetch_issued - self.num_prefetch_used - self.num_prefetch_wasted)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters of an engine since the last reset, over all its pools.

    Attributes:
        cache: what was decided.
        num_loads: expert loads that were done.
        num_bytes: bytes that they asked of the medium, alignment included.
        num_loads_cancelled: loads dropped before they began.
        busy_s: time in which at least one load was under way (pools added up).
        stall_s: time that the compute thread waited for experts.
        peak_resident_bytes: highest resident memory of the process, since its start or the last `machine.reset_peak`.
    """

    cache: CacheStats = CacheStats()
    num_loads: int = 0
    num_bytes: int = 0
    num_loads_cancelled: int = 0
    busy_s: float = 0.0
    stall_s: float = 0.0
    peak_resident_bytes: int = 0

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes brought in per token that was computed, prompt tokens among them. None without tokens."""
        return self.num_bytes / self.cache.num_tokens if self.cache.num_tokens else None

    def as_dict(self) -> dict[str, int | float | None]:
        """Every counter and derived figure in one flat JSON object."""
        own = {name: value for name, value in asdict(self).items() if name != "cache"}
        derived = {
            "hit_rate": self.cache.hit_rate,
            "num_prefetch_pending": self.cache.num_prefetch_pending,
            "bytes_per_token": self.bytes_per_token,
        }
        return {**asdict(self.cache), **own, **derived}

    def summary(self) -> str:
        """A block for people, at most eight lines."""
        cache = self.cache
        rate = "no lookups" if cache.hit_rate is None else f"{cache.hit_rate:.1%} hits"
        per_token = "" if self.bytes_per_token is None else f", {self.bytes_per_token / 1e6:.2f} MB per token"
        lines = [
            f"tokens     {cache.num_tokens} in {cache.num_passes} passes",
            f"lookups    {cache.num_lookups}: {rate}, {cache.num_in_flight} in flight, {cache.num_misses} misses",
            f"waves      {cache.num_waves} in {cache.num_layer_steps} layer steps, {cache.num_evictions} evictions",
            f"prefetch   {cache.num_prefetch_issued} issued, {cache.num_prefetch_used} used, "
            f"{cache.num_prefetch_wasted} wasted, {cache.num_prefetch_pending} pending",
            f"loads      {self.num_loads}, {self.num_loads_cancelled} cancelled, "
            f"{self.num_bytes / 1e9:.3f} GB{per_token}",
            f"stall      {self.stall_s:.2f} s waiting, {self.busy_s:.2f} s loading",
            f"memory     {self.peak_resident_bytes / 1e9:.2f} GB at the peak",
        ]
        if cache.num_substituted:
            lines.insert(2, f"substituted {cache.num_substituted} choices of absent experts: results are not exact")
        return "\n".join(lines)


def engine_stats(
    residencies: Sequence[Mapping[Any, int]],
    transfers: Sequence[TransferStats],
    num_passes: int,
    num_tokens: int,
    peak_resident_bytes: int,
) -> EngineStats:
    """The sum over pools.

    Args:
        residencies: `Residency.counts()` of each pool; its members are named as the counters here, less `num_`.
        transfers: `Transfer.stats()` of each pool.
    """
    names = {count: f"num_{count.name.lower()}" for counts in residencies for count in counts}
    cache = {name: sum(counts[count] for counts in residencies) for count, name in names.items()}
    return EngineStats(
        cache=CacheStats(num_passes=num_passes, num_tokens=num_tokens, **cache),
        num_loads=sum(stats.num_loads for stats in transfers),
        num_bytes=sum(stats.num_bytes for stats in transfers),
        num_loads_cancelled=sum(stats.num_cancelled for stats in transfers),
        busy_s=sum(stats.busy_s for stats in transfers),
        stall_s=sum(stats.stall_s for stats in transfers),
        peak_resident_bytes=peak_resident_bytes,
    )
