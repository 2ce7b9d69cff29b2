"""Interleaved blocks: every contender decodes the same text in every block, in an order that turns and rotates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from harness.measure.pages import drop_pages, resident_fraction
from harness.measure.process import ContenderFailed
from harness.measure.stats import Ratio, Summary, paired_ratio, summarize
from harness.measure.workload import TokenRequest

_T = TypeVar("_T")

PROBE_TOKENS = 5
CALL_TIMEOUT_S = 300.0


class Asked(Protocol):
    """A contender process, or a stand-in."""

    facts: dict[str, Any]

    @property
    def peak_bytes(self) -> int | None:
        """Most memory that its cgroup was charged."""

    def ask(self, op: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """One request and its answer."""


@dataclass
class Row:
    """One contender's measurements. `samples[b]` is block b's; `failure` says why there are no more of them."""

    name: str
    process: Asked | None
    wanted_tokens: int = 0
    num_tokens: int = 0
    implementation: str | None = None
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    failure: str | None = None
    fits: bool = True
    smallest_bytes: int | None = None
    warm_s_per_token: float | None = None
    peak_bytes: int | None = None

    @property
    def is_measured(self) -> bool:
        """True when there is something to report."""
        return self.failure is None and bool(self.samples)

    def rates(self) -> dict[int, float]:
        """Decode tokens/s per block."""
        return {block: sample["decode_tokens"] / sample["decode_s"] for block, sample in self.samples.items()}

    def rate(self) -> Summary:
        """Over the blocks."""
        return summarize(list(self.rates().values()))

    def mean(self, key: str) -> float | None:
        """Of a figure per decoded token, over all blocks; None where it is unknown."""
        if any(sample.get(key) is None for sample in self.samples.values()):
            return None
        tokens = sum(sample["decode_tokens"] for sample in self.samples.values())
        return float(sum(sample[key] for sample in self.samples.values()) / tokens)

    def hit_rate(self) -> float | None:
        """Of all lookups of all blocks; None for a contender that has no cache."""
        stats = [sample["stats"] for sample in self.samples.values() if "stats" in sample]
        lookups = sum(each["num_lookups"] for each in stats)
        return sum(each["num_hits"] for each in stats) / lookups if lookups else None

    def stalls(self) -> dict[int, float]:
        """Seconds waited for experts per decoded token, by block; empty for a contender that does not say."""
        told = {block: sample for block, sample in self.samples.items() if "stats" in sample}
        return {block: sample["stats"]["stall_s"] / sample["decode_tokens"] for block, sample in told.items()}

    def stall_s(self) -> float | None:
        """Median over the blocks of the seconds waited per token; None for a contender that does not say."""
        stalls = self.stalls()
        return summarize(list(stalls.values())).median if stalls else None

    def stall_share(self) -> float | None:
        """Share of the decode time in which compute waited for experts; None for a contender that does not say."""
        told = [sample for sample in self.samples.values() if "stats" in sample]
        seconds = sum(sample["decode_s"] for sample in told)
        return sum(sample["stats"]["stall_s"] for sample in told) / seconds if seconds else None


def paired(top: dict[int, float], bottom: dict[int, float]) -> Ratio | None:
    """Ratio over the blocks that both have; None when there are none."""
    common = sorted(top.keys() & bottom.keys())
    return paired_ratio([top[b] for b in common], [bottom[b] for b in common]) if common else None


def agreement(row: Row, other: Row) -> tuple[int, int]:
    """Equal predicted tokens and all compared, over the blocks that both have and the tokens that both decoded."""
    pairs = [
        pair
        for block in sorted(row.samples.keys() & other.samples.keys())
        for pair in zip(row.samples[block]["predicted_ids"], other.samples[block]["predicted_ids"], strict=False)
    ]
    return sum(a == b for a, b in pairs), len(pairs)


def warm_up(row: Row, request: TokenRequest, num_tokens: int, cap_s: float) -> None:
    """Decode once without counting, and settle how many tokens of each request this contender decodes.

    A contender that would need more than `cap_s` for all of them decodes as many as fit that, never fewer than
    `PROBE_TOKENS`.

    Raises:
        ContenderFailed: as `ask`.
    """
    assert row.process is not None
    warm = _run(row.process, request, min(PROBE_TOKENS, num_tokens))
    row.wanted_tokens, row.num_tokens = num_tokens, _tokens_within(cap_s, warm, num_tokens)
    if row.num_tokens == num_tokens > PROBE_TOKENS and "slots" in row.process.facts:  # an expert cache to fill
        warm = _run(row.process, request, num_tokens)
    row.warm_s_per_token = warm["decode_s"] / warm["decode_tokens"]


def _tokens_within(cap_s: float, sample: Mapping[str, Any], most: int) -> int:
    return max(min(PROBE_TOKENS, most), min(most, int(cap_s * sample["decode_tokens"] / sample["decode_s"])))


def run_blocks(
    rows: Sequence[Row],
    requests: Sequence[TokenRequest],
    files: Sequence[Path],
    *,
    cap_s: float,
    on_sample: Callable[[Row], None],
    on_block: Callable[[], None],
) -> None:
    """Measure every row on every request. A row that fails is left out of what follows, with the reason.

    Args:
        files: of the checkpoints; their page cache is dropped before each measurement.
        cap_s: a row that decoded longer than this decodes fewer tokens from then on.
        on_sample, on_block: called after each measurement and after each block.
    """
    for block, request in enumerate(requests):
        for row in block_order([row for row in rows if row.process is not None and row.failure is None], block):
            try:
                row.samples[block] = _measure(row, request, files)
                row.num_tokens = _tokens_within(cap_s, row.samples[block], row.num_tokens)
            except ContenderFailed as error:
                row.failure, row.fits = f"block {block}: {error}", not error.out_of_memory
            on_sample(row)
        on_block()


def block_order(rows: Sequence[_T], block: int) -> list[_T]:
    """Rotated by half the block number, turned round in every other block: each pair of blocks is an ABBA."""
    turn = block // 2 % max(len(rows), 1)
    order = [*rows[turn:], *rows[:turn]]
    return order[::-1] if block % 2 else order


def _measure(row: Row, request: TokenRequest, files: Sequence[Path]) -> dict[str, Any]:
    assert row.process is not None
    drop_pages(files)
    cached = resident_fraction(files)
    sample = _run(row.process, request, row.num_tokens)
    if "needed_loads" in sample:
        sample |= row.process.ask("replay_loads", timeout_s=CALL_TIMEOUT_S)
    row.peak_bytes = max(filter(None, (row.peak_bytes, row.process.peak_bytes)), default=None)
    kept = {"slots": row.process.facts["slots"]} if "slots" in row.process.facts else {}
    return {"request": request.id, "cached_before": cached, "cgroup_peak_bytes": row.peak_bytes, **kept, **sample}


def _run(process: Asked, request: TokenRequest, num_tokens: int) -> dict[str, Any]:
    output = list(request.output_ids[:num_tokens])
    return process.ask("run", timeout_s=CALL_TIMEOUT_S, prompt_ids=list(request.prompt_ids), output_ids=output)
