"""Counters of the engine and of the simulator, and their summary. Values only: no clock, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

from runtime.transfer.base import TransferStats

LATENCY_BUCKETS_S = (
    *(float(f"{step}e{power}") for power in range(-3, 2) for step in (1, 1.5, 2, 3, 5, 7.5)),
    100.0,
    300.0,
)
"""From a token of a small model on a GPU to a long prompt from a slow disk."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram.

    Attributes:
        bounds: inclusive upper bounds of the buckets, ascending; the last bucket has none.
        counts: observations in each bucket, one more than there are bounds.
        sum: of what was observed.
    """

    bounds: tuple[float, ...] = LATENCY_BUCKETS_S
    counts: tuple[int, ...] = (0,) * (len(LATENCY_BUCKETS_S) + 1)
    sum: float = 0.0

    @property
    def num(self) -> int:
        """Observations."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """Exact; None without observations."""
        return self.sum / self.num if self.num else None

    def quantile(self, share: float) -> float | None:
        """What `share` of the observations do not exceed, interpolated in its bucket as Prometheus does; the last bound
        where it is beyond. None without observations."""
        wanted, below = share * self.num, 0
        for i, count in enumerate(self.counts):
            if count and below + count >= wanted:
                low = self.bounds[i - 1] if i else 0.0
                high = self.bounds[min(i, len(self.bounds) - 1)]
                return low + (high - low) * (wanted - below) / count
            below += count
        return None

    def __add__(self, other: Distribution) -> Distribution:
        """Both together; their bounds are equal."""
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Distribution(self.bounds, counts, self.sum + other.sum)


@dataclass(frozen=True, slots=True)
class LatencyStats:
    """Times since the counters were last reset.

    Attributes:
        pass_s: in forward passes, from the beginning of each to its end.
        ttft: seconds to the first token of each sequence.
        tpot: seconds of each further token, from the one before it.
    """

    pass_s: float = 0.0
    ttft: Distribution = field(default_factory=Distribution)
    tpot: Distribution = field(default_factory=Distribution)

    def __add__(self, other: LatencyStats) -> LatencyStats:
        """Both together."""
        return LatencyStats(self.pass_s + other.pass_s, self.ttft + other.ttft, self.tpot + other.tpot)


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What the cache decided since the counters were last reset.

    A lookup is one demanded expert in one layer step, however many tokens demand it: a hit, in flight or a miss.

    Attributes:
        num_lookups: num_hits + num_in_flight + num_misses.
        num_hits: the expert was in its slot.
        num_in_flight: it was on its way, brought by a prefetch.
        num_misses: it had to be loaded on demand, or computed where it rests.
        num_evictions: residents that lost their slot.
        num_prefetch_issued: loads decided ahead of demand.
        num_prefetch_used: of these, demanded (arrived or in flight) before they were evicted; counted at the first use.
        num_prefetch_wasted: of these, evicted without having been demanded.
        num_layer_steps: MoE layers executed.
        num_waves: rounds of slots that the layer steps took; equal to num_layer_steps when every step fitted in one.
        num_passes: forward passes.
        num_tokens: tokens in them.
        num_computed: of the misses, those that were computed where they rest instead of being loaded.
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
    num_computed: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Hits per lookup; in flight is no hit. None without lookups."""
        return self.num_hits / self.num_lookups if self.num_lookups else None

    @property
    def num_prefetch_late(self) -> int:
        """Prefetches that were still on their way when they were demanded; they are among the used ones."""
        return self.num_in_flight

    @property
    def num_prefetch_pending(self) -> int:
        """Prefetches that are resident or on their way and not demanded so far: neither used nor wasted.

        num_prefetch_wasted = num_prefetch_issued - num_prefetch_used - num_prefetch_pending, at every moment. Those
        dropped because a read failed stay pending. Right after a reset, prefetches of before it are used or wasted
        without having been issued; never below 0 for that.
        """
        return max(0, self.num_prefetch_issued - self.num_prefetch_used - self.num_prefetch_wasted)

    def __add__(self, other: CacheStats) -> Self:
        """Both together."""
        return type(self)(*(getattr(self, of.name) + getattr(other, of.name) for of in fields(self)))


class SlotStats(NamedTuple):
    """The slots of a pool as they are now."""

    num_slots: int
    num_occupied: int
    slot_bytes: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters of an engine since the last reset, over all its pools.

    Attributes:
        cache: what was decided.
        num_loads: expert loads that were done.
        num_bytes: bytes that they asked of the medium, alignment included.
        num_loads_cancelled: loads dropped before they began.
        num_retries: reads that were tried again. num_failed_loads: loads that failed for all that.
        num_disk_loads, num_disk_bytes, disk_busy_s: where a GPU's loads come from host memory that does not hold all
            experts, what the disk brought there for them; else 0.
        busy_s: time in which at least one load was under way (pools added up).
        stall_s: time that the compute thread waited for experts.
        peak_resident_bytes: highest resident memory of the process, since its start or the last `machine.reset_peak`;
            where a GPU computes, the experts that rest in host memory are in it.
        peak_gpu_bytes: most that tensors took of the GPU at once, in this process; 0 where the CPU computes.
        latency: of passes and tokens.
        num_slots: slots in use now. num_slots_occupied: of these, with an expert or one that is on its way.
        expert_bytes: bytes of the slots that are occupied now.
    """

    cache: CacheStats = CacheStats()
    num_loads: int = 0
    num_bytes: int = 0
    num_loads_cancelled: int = 0
    busy_s: float = 0.0
    stall_s: float = 0.0
    peak_resident_bytes: int = 0
    latency: LatencyStats = LatencyStats()
    num_slots: int = 0
    num_slots_occupied: int = 0
    expert_bytes: int = 0
    num_retries: int = 0
    num_failed_loads: int = 0
    peak_gpu_bytes: int = 0
    num_disk_loads: int = 0
    num_disk_bytes: int = 0
    disk_busy_s: float = 0.0

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes brought in per token that was computed, prompt tokens among them. None without tokens."""
        return self.num_bytes / self.cache.num_tokens if self.cache.num_tokens else None

    @property
    def stall_share(self) -> float | None:
        """Of the time in forward passes, what went by waiting for experts. None without passes."""
        return self.stall_s / self.latency.pass_s if self.latency.pass_s else None

    def __add__(self, other: EngineStats) -> EngineStats:
        """What was counted before `other` and in it; what is a state rather than a count is that of `other`."""
        return replace(other, **{name: getattr(self, name) + getattr(other, name) for name in _COUNTED})

    def as_dict(self) -> dict[str, int | float | None]:
        """Every counter and derived figure in one flat JSON object."""
        own = {name: value for name, value in asdict(self).items() if name not in ("cache", "latency")}
        derived = {
            "hit_rate": self.cache.hit_rate,
            "num_prefetch_late": self.cache.num_prefetch_late,
            "num_prefetch_pending": self.cache.num_prefetch_pending,
            "bytes_per_token": self.bytes_per_token,
            "pass_s": self.latency.pass_s,
            "stall_share": self.stall_share,
            **_times("ttft", self.latency.ttft),
            **_times("tpot", self.latency.tpot),
        }
        return {**asdict(self.cache), **own, **derived}

    def summary(self) -> str:
        """A block for people, at most ten lines."""
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
            f"memory     {', '.join(self._peaks())} at the peak",
        ]
        if self.num_disk_loads:
            lines.insert(
                5,
                f"from disk  {self.num_disk_loads} of the loads, {self.num_disk_bytes / 1e9:.3f} GB, "
                f"{self.disk_busy_s:.2f} s reading",
            )
        if cache.num_substituted:
            lines.insert(2, f"substituted {cache.num_substituted} choices of absent experts: results are not exact")
        if cache.num_computed:
            lines.insert(2, f"computed   {cache.num_computed} of the misses on the CPU: results are not exact")
        if self.num_retries or self.num_failed_loads:
            lines.append(f"trouble    {self.num_retries} reads tried again, {self.num_failed_loads} loads failed")
        return "\n".join(lines)

    def _peaks(self) -> list[str]:
        if not self.peak_gpu_bytes:
            return [f"{self.peak_resident_bytes / 1e9:.2f} GB"]
        gpu, host = self.peak_gpu_bytes / 1e9, self.peak_resident_bytes / 1e9
        return [f"{gpu:.2f} GB of GPU memory in tensors", f"{host:.2f} GB of host memory"]

    def line(self) -> str:
        """One line for logs: what there is nothing to say of is left out."""
        cache, latency = self.cache, self.latency
        parts = [
            cache.hit_rate is not None and f"hits {cache.hit_rate:.1%}",
            self.stall_share is not None and f"stall {self.stall_share:.1%}",
            self.bytes_per_token is not None and f"{self.bytes_per_token / 1e6:.2f} MB/token",
            self.num_disk_loads > 0 and f"{self.num_disk_loads} of {self.num_loads} loads from disk",
            cache.num_prefetch_issued > 0
            and f"prefetch {cache.num_prefetch_used} used ({cache.num_prefetch_late} late), "
            f"{cache.num_prefetch_wasted} wasted",
            *(_told(name, of) for name, of in (("TTFT", latency.ttft), ("TPOT", latency.tpot)) if of.num),
            self.num_slots > 0 and f"slots {self.num_slots_occupied}/{self.num_slots}",
            f"peak {', '.join(self._peaks())}",
            (self.num_retries > 0 or self.num_failed_loads > 0)
            and f"{self.num_retries} reads tried again, {self.num_failed_loads} loads failed",
        ]
        return " | ".join(part for part in parts if part)


_COUNTED = (
    "cache",
    "latency",
    "num_loads",
    "num_bytes",
    "num_loads_cancelled",
    "num_retries",
    "num_failed_loads",
    "num_disk_loads",
    "num_disk_bytes",
    "disk_busy_s",
    "busy_s",
    "stall_s",
)
"""What adds up of `EngineStats`; the rest is a state."""


def _times(name: str, of: Distribution) -> dict[str, float | None]:
    figures = {"mean": of.mean, "p50": of.quantile(0.5), "p95": of.quantile(0.95)}
    return {f"{name}_{which}_ms": None if value is None else 1e3 * value for which, value in figures.items()}


def _told(name: str, of: Distribution) -> str:
    """The mean; where there are several observations, the 95th percentile, too."""
    text = f"{name} {1e3 * of.sum / of.num:.1f} ms"
    return text if of.num == 1 else f"{text} (p95 {1e3 * (of.quantile(0.95) or 0.0):.1f})"


def engine_stats(
    residencies: Sequence[Mapping[Any, int]],
    transfers: Sequence[TransferStats],
    num_passes: int,
    num_tokens: int,
    peak_resident_bytes: int,
    latency: LatencyStats = LatencyStats(),
    slots: Sequence[SlotStats] = (),
    peak_gpu_bytes: int = 0,
) -> EngineStats:
    """The sum over pools.

    Args:
        residencies: `Residency.counts()` of each pool; its members are named as the counters here, less `num_`.
        transfers: `Transfer.stats()` of each pool.
        slots: of each pool.
    """
    names = {count: f"num_{count.name.lower()}" for counts in residencies for count in counts}
    cache = {name: sum(counts[count] for counts in residencies) for count, name in names.items()}
    return EngineStats(
        cache=CacheStats(num_passes=num_passes, num_tokens=num_tokens, **cache),
        num_loads=sum(stats.num_loads for stats in transfers),
        num_bytes=sum(stats.num_bytes for stats in transfers),
        num_loads_cancelled=sum(stats.num_cancelled for stats in transfers),
        num_retries=sum(stats.num_retries for stats in transfers),
        num_failed_loads=sum(stats.num_failed_loads for stats in transfers),
        num_disk_loads=sum(stats.num_disk_loads for stats in transfers),
        num_disk_bytes=sum(stats.num_disk_bytes for stats in transfers),
        disk_busy_s=sum(stats.disk_busy_s for stats in transfers),
        busy_s=sum(stats.busy_s for stats in transfers),
        stall_s=sum(stats.stall_s for stats in transfers),
        peak_resident_bytes=peak_resident_bytes,
        latency=latency,
        num_slots=sum(of.num_slots for of in slots),
        num_slots_occupied=sum(of.num_occupied for of in slots),
        expert_bytes=sum(of.num_occupied * of.slot_bytes for of in slots),
        peak_gpu_bytes=peak_gpu_bytes,
    )
