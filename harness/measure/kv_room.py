"""How many requests fit under a memory limit: the whole model in memory, against some of it and more KV cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from harness.measure.batch_runs import Sample, serve
from harness.measure.limits import MARGIN_BYTES, ModelBytes, smallest_working
from harness.measure.process import ContenderFailed, Spec
from harness.measure.workload import TokenRequest
from runtime.prompts import PromptRequest

_T = TypeVar("_T")
PEAK_TRIES = 7
FEWER_SLOTS = 16
"""Where as many slots as the sum allows do not fit, a sixteenth less is tried."""
SLOT_TRIES = 5


@dataclass(frozen=True)
class Room:
    """What is known before any limit is tried.

    Attributes:
        kv_bytes_per_token: of all layers.
        kv_tokens_per_request: that a request takes, whole pages.
        process_bytes: what our process needs beside weights, slots and KV cache, one request's activations included.
        resident_peak_bytes: smallest limit with which the whole model in memory answers one request.
    """

    sizes: ModelBytes
    kv_bytes_per_token: int
    kv_tokens_per_request: int
    process_bytes: int
    resident_peak_bytes: int

    def kv_bytes(self, num_requests: int) -> int:
        """KV cache of so many requests."""
        return num_requests * self.kv_tokens_per_request * self.kv_bytes_per_token

    def resident_kv_tokens(self, limit_bytes: int) -> int:
        """That fit beside the whole model: what the limit leaves above its peak, and the request in that."""
        return self.kv_tokens_per_request + max(0, limit_bytes - self.resident_peak_bytes) // self.kv_bytes_per_token

    def kv_tokens(self, limit_bytes: int, num_slots: int) -> int:
        """That fit beside so many slots, by the sum."""
        used = self.process_bytes + self.sizes.dense_bytes + num_slots * self.sizes.slot_bytes
        return max(0, limit_bytes - used - MARGIN_BYTES) // self.kv_bytes_per_token

    def slots(self, limit_bytes: int, num_requests: int) -> int:
        """The most slots that leave room for the KV cache of so many requests; 0: not even one does."""
        free = limit_bytes - self.process_bytes - self.sizes.dense_bytes - self.kv_bytes(num_requests) - MARGIN_BYTES
        return max(0, min(free // self.sizes.slot_bytes, self.sizes.num_experts))


Start = Callable[[str, Spec, int | None], AbstractContextManager[Any]]
"""Starts a contender: name, what it loads, its memory limit."""


def run_batch_of(process: Any, texts: list[TokenRequest]) -> Sample:
    """All of `texts` at once: their prompts, then decoded together.

    Raises:
        ContenderFailed: it did not get to the end.
    """
    requests = [PromptRequest(text.id, text.prompt_ids, output_ids=text.output_ids) for text in texts]
    return serve(process, requests, {"kind": "fifo", "group": len(texts), "window": 1}, len(texts))


def measure_process_bytes(start: Start, spec: Spec, num_slots: int, sizes: ModelBytes, text: TokenRequest) -> int:
    """Peak of our process with few slots and one request, less weights and slots."""
    with start("process", spec, None) as process:
        sample = run_batch_of(process, [text])
        peak = process.peak_bytes or sample["peak_resident_bytes"]
    return int(peak) - sizes.dense_bytes - num_slots * sizes.slot_bytes


def resident_peak(
    start: Start, spec: Spec, sizes: ModelBytes, process_bytes: int, text: TokenRequest, say: Callable[[str], None]
) -> int | None:
    """Smallest limit with which the whole model in memory answers one request; None: no limit tried was enough.

    Found by trying, since the page cache of the checkpoint counts as used memory until the limit is reached.
    """

    def works(limit_bytes: int) -> bool:
        say(f"the resident model with {limit_bytes / 1e6:.0f} MB")
        return _tried(start, "resident", spec, limit_bytes, [text]) is not None

    # The layer that is just being put together is there twice.
    largest = process_bytes + sizes.total_bytes + sizes.total_bytes // 3
    return smallest_working(works, sizes.total_bytes, largest, max_tries=PEAK_TRIES)


def largest_batch(runs: Callable[[int], _T | None], most: int, guess: int) -> tuple[int, _T | None]:
    """Largest number, to an eighth, for which `runs` gives an answer, and that answer; (0, None): none.

    Args:
        runs: tries a number. most: the largest of interest. guess: is tried first.
    """
    low, high, best, number = 0, most + 1, None, min(max(guess, 1), most)
    while low < most and high - low > max(1, low // 8):
        answer = runs(number)
        if answer is None:
            high = number
        else:
            low, best = number, answer
        number = min(most, 2 * low) if high > most else (low + high) // 2
    return low, best


def resident_batch(
    start: Start, spec: Spec, room: Room, limit_bytes: int, texts: list[TokenRequest]
) -> tuple[int, Sample | None]:
    """The largest batch that the whole model in memory serves."""
    guess = room.resident_kv_tokens(limit_bytes) // room.kv_tokens_per_request
    return largest_batch(
        lambda number: _tried(start, "resident", spec, limit_bytes, texts[:number]), len(texts), int(guess)
    )


def our_batch(
    start: Start, spec_of: Callable[[int, int], Spec], room: Room, limit_bytes: int, texts: list[TokenRequest]
) -> tuple[int, Sample | None]:
    """The largest batch that our engine serves, with as many slots as its KV cache leaves room for.

    Args:
        spec_of: what to load for a number of slots and bytes of KV cache.
    """

    def runs(number: int) -> Sample | None:
        slots = room.slots(limit_bytes, number)
        for _ in range(SLOT_TRIES):
            if slots < 1:
                return None
            spec = spec_of(slots, room.kv_bytes(number))
            if (sample := _tried(start, "ours", spec, limit_bytes, texts[:number])) is not None:
                return sample
            slots -= max(1, slots // FEWER_SLOTS)
        return None

    return largest_batch(runs, len(texts), len(texts))


def _tried(start: Start, name: str, spec: Spec, limit_bytes: int, texts: list[TokenRequest]) -> Sample | None:
    """One run under a limit; None where memory did not suffice.

    Raises:
        ContenderFailed: for another reason.
    """
    try:
        with start(name, spec, limit_bytes) as process:
            sample = run_batch_of(process, texts)
            return {**sample, "slots": process.facts["slots"], "cgroup_peak_bytes": process.peak_bytes}
    except ContenderFailed as error:
        if error.out_of_memory:
            return None
        raise
