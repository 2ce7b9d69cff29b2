"""What the bench says: the table of contenders, the ladder of the bound, and the JSON object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from harness.hardware.bound import DecodeWork, Ladder, oracle_misses
from harness.measure.blocks import Row, agreement, paired
from harness.measure.stats import Ratio, median
from runtime.facts import ModelFacts
from runtime.machine import format_bytes

LABELS = {
    "ours": "ours",
    "lru": "ours with LRU, on demand",
    "lru_prefetch": "ours with LRU, same prefetch",
    "on_demand": "ours, on demand, no cache",
    "accelerate_experts": "accelerate, experts on disk",
    "accelerate_layers": "accelerate, layers on disk",
    "resident": "resident, plain transformers",
    "reference": "resident, our kernels",
}
UNLIMITED = ("resident", "reference")
OWN = ("ours", "lru", "lru_prefetch", "on_demand")


def table(rows: Mapping[str, Row], *, page_cache_limited: bool, dense_share: float) -> str:
    """One line per contender: rates, ratio, bytes, hits, peak, tokens equal to the reference; then notes.

    `dense_share` of the checkpoint stays mapped, hence cached, in a process that keeps its dense weights.
    """
    head = f"{'':<29}{'tokens/s median [min, max]':>29}{'ours / it (95 %)':>21}{'read/token':>12}{'hits':>7}{'peak':>9}"
    lines = [f"{head}{'tokens equal':>14}"]
    lines.extend(_line(row, rows) for row in rows.values())
    notes = [
        f"  {LABELS[row.name]}: {note}"
        for row in rows.values()
        for note in _notes(row, page_cache_limited, dense_share)
    ]
    return "\n".join(lines + notes + _ceiling(rows))


def _line(row: Row, rows: Mapping[str, Row]) -> str:
    label = f"{LABELS[row.name]:<29}"
    if not row.is_measured:
        least = (
            "" if row.smallest_bytes is None else f"; the smallest limit that was seen to work: {row.smallest_bytes}"
        )
        return f"{label}{'failed' if row.fits else 'does not fit'}: {row.failure}{least}"
    rate, hits, read = row.rate(), row.hit_rate(), row.mean("read_bytes")
    ratio = None if row.name == "ours" else _ratio(rows, row)
    equal = "" if row.name == "reference" else _equal(row, rows)
    cells = (
        f"{f'{rate.median:.2f} [{rate.min:.2f}, {rate.max:.2f}]':>29}",
        f"{'' if ratio is None else str(ratio):>21}",
        f"{'unknown' if read is None else format_bytes(read):>12}",
        f"{'' if hits is None else f'{hits:.1%}':>7}",
        f"{format_bytes(_peak(row)):>9}",
        f"{equal:>14}",
    )
    return label + "".join(cells)


def _notes(row: Row, page_cache_limited: bool, dense_share: float) -> list[str]:
    if not row.is_measured or row.process is None:
        return []
    notes = [str(note) for note in row.process.facts.get("notes", ())]
    if row.implementation is not None:
        notes.append(f"experts implementation {row.implementation}")
    waited = row.stall_share()
    if waited is not None:
        notes.append(f"waited for experts {waited:.0%} of the time, {1e3 * (row.stall_s() or 0.0):.2f} ms a token")
    if not page_cache_limited and row.name not in UNLIMITED:
        notes.append("page cache not limited")
    fewest = min(len(sample["predicted_ids"]) for sample in row.samples.values())
    if fewest < row.wanted_tokens:
        notes.append(f"only the first {fewest} to {_most_tokens(row)} tokens of each request, for its slowness")
    cached = max(sample["cached_before"] for sample in row.samples.values())
    if cached - dense_share >= 0.01:
        notes.append(f"up to {cached:.1%} of the checkpoints' pages could not be dropped before a block")
    return notes


def _most_tokens(row: Row) -> int:
    return max(len(sample["predicted_ids"]) for sample in row.samples.values())


def _ceiling(rows: Mapping[str, Row]) -> list[str]:
    ours = rows.get("ours")
    hits = ours.hit_rate() if ours is not None and ours.is_measured else None
    if hits is None or hits >= 1 or "on_demand" not in rows:
        return []
    return [f"  ours / on demand: fewer loads alone would give 1 / (1 - hit rate) = {1 / (1 - hits):.2f}"]


def _ratio(rows: Mapping[str, Row], row: Row) -> Ratio | None:
    ours = rows.get("ours")
    return paired(ours.rates(), row.rates()) if ours is not None and ours.is_measured else None


def _stall_ratio(rows: Mapping[str, Row], row: Row) -> Ratio | None:
    """Our waiting over that of a row with a cache, per token of the same block; None where one never waited."""
    ours = rows.get("ours")
    if ours is None or not ours.is_measured or not all((*ours.stalls().values(), *row.stalls().values())):
        return None
    return paired(ours.stalls(), row.stalls())


def _equal(row: Row, rows: Mapping[str, Row]) -> str:
    reference = rows.get("reference")
    if reference is None or not reference.is_measured:
        return "unknown"
    same, compared = agreement(row, reference)
    return f"{same} of {compared}"


def _peak(row: Row) -> int:
    """Of the cgroup where there is one, page cache included; else the process's resident memory."""
    resident = max(sample["peak_resident_bytes"] for sample in row.samples.values())
    return resident if row.peak_bytes is None else row.peak_bytes


def tokens_equal(rows: Mapping[str, Row]) -> bool | None:
    """Whether our offloaded rows predicted exactly the reference's tokens; None when that was not measured."""
    reference = rows.get("reference")
    own = [rows[name] for name in OWN if name in rows and rows[name].is_measured]
    if reference is None or not reference.is_measured or not own:
        return None
    counts = [agreement(row, reference) for row in own]
    return all(same == compared > 0 for same, compared in counts)


def attainable_rates(rows: Mapping[str, Row]) -> dict[int, float]:
    """Per block, tokens/s of the slower of the reference and the replay of our needed loads; both measured."""
    ours, reference = rows["ours"], rows["reference"]
    resident = reference.rates()
    found = {}
    for block in ours.samples.keys() & resident.keys():
        link_s = _link_s(ours.samples[block])
        if link_s is not None:
            found[block] = min(resident[block], ours.samples[block]["decode_tokens"] / link_s if link_s else math.inf)
    return found


def _link_s(sample: Mapping[str, Any]) -> float | None:
    """Seconds that the needed loads take on the link: the replay, or the run itself where its transfer was faster.

    The run's share is its time with loads under way, wasted loads taken out in proportion. With other load a replay can
    come out slower; taking the faster of the two never flatters the fraction of attainable.
    """
    if sample["replay_s"] is None:
        return None
    stats = sample["stats"]
    in_run_s = stats["busy_s"] * sample["needed_loads"] / stats["num_loads"] if stats["num_loads"] else math.inf
    return float(min(sample["replay_s"], in_run_s))


def ladder(rows: Mapping[str, Row], facts: ModelFacts, memory_bytes_per_s: float) -> Ladder | None:
    """The bound's rungs; None when ours or the reference was not measured."""
    if not all(name in rows and rows[name].is_measured for name in ("ours", "reference")):
        return None
    attainable = attainable_rates(rows)
    ours, reference = rows["ours"], rows["reference"]
    fraction = paired(ours.rates(), attainable)
    if fraction is None:
        return None
    own, oracle = [], []
    for block in sorted(attainable):
        sample = ours.samples[block]
        work = _work(facts, sample, memory_bytes_per_s)
        tokens = sample["decode_tokens"]
        best = oracle_misses(reference.samples[block]["demands"], sample["slots"])
        own.append(1 / work.seconds_per_token(sample["needed_loads"] / tokens))
        oracle.append(1 / work.seconds_per_token(best / tokens))
    return Ladder(median(oracle), median(own), median(list(attainable.values())), ours.rate().median, fraction)


def _work(facts: ModelFacts, sample: Mapping[str, Any], memory_bytes_per_s: float) -> DecodeWork:
    identity = facts.identity
    moved, link_s = sample["needed_loads"] * facts.slot_bytes, _link_s(sample)
    return DecodeWork(
        dense_bytes=facts.dense_bytes,
        expert_bytes=facts.expert_bytes,
        num_layers=identity.layers,
        top_k=identity.top_k,
        memory_bytes_per_s=memory_bytes_per_s,
        link_bytes_per_s=moved / link_s if link_s and moved else math.inf,
    )


def summary(rows: Mapping[str, Row], found: Ladder | None) -> dict[str, Any]:
    """The JSON object: a contender that was not measured is null."""
    names = [name for name in LABELS if name in rows]
    return {
        **{name: _summary(rows[name], rows) if name in rows else None for name in LABELS},
        "attainable_tokens_per_s": None if found is None else found.attainable,
        "fraction_of_attainable": None if found is None else found.fraction.as_dict(),
        "bound_own_tokens_per_s": None if found is None else found.bound_own,
        "bound_oracle_tokens_per_s": None if found is None else found.bound_oracle,
        "tokens_equal": tokens_equal(rows),
        "smallest_working_limit_bytes": {
            n: rows[n].smallest_bytes for n in names if rows[n].smallest_bytes is not None
        },
        "failures": {name: rows[name].failure for name in names if rows[name].failure is not None},
    }


def _summary(row: Row, rows: Mapping[str, Row]) -> dict[str, Any] | None:
    if not row.is_measured:
        return None
    ratio = None if row.name == "ours" else _ratio(rows, row)
    rate = row.rate()
    stall = None if row.name == "ours" else _stall_ratio(rows, row)
    return {
        "tokens_per_s": rate.median,
        "tokens_per_s_min": rate.min,
        "tokens_per_s_max": rate.max,
        "ours_over_it": None if ratio is None else ratio.as_dict(),
        "peak_memory_bytes": _peak(row),
        "peak_resident_bytes": max(sample["peak_resident_bytes"] for sample in row.samples.values()),
        "bytes_per_token": row.mean("read_bytes"),
        "hit_rate": row.hit_rate(),
        "stall_ms_per_token": None if row.stall_s() is None else 1e3 * (row.stall_s() or 0.0),
        "ours_over_its_stall": None if stall is None else stall.as_dict(),
    }
