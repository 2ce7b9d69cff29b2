"""The total memory limit that the contenders share, and the smallest with which one of them works."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from runtime.errors import BudgetError, UsageError
from runtime.facts import BUFFER_BYTES
from runtime.machine import format_bytes

# The reserve that the engine itself keeps: with less it would take fewer slots than asked for.
MARGIN_BYTES = BUFFER_BYTES
MAX_TRIES = 5


@dataclass(frozen=True)
class ModelBytes:
    """What a model needs: everything but the experts, one expert slot, and how many experts there are."""

    dense_bytes: int
    slot_bytes: int
    num_experts: int

    @property
    def total_bytes(self) -> int:
        """The whole model."""
        return self.dense_bytes + self.num_experts * self.slot_bytes

    def slots_of(self, share: str) -> int:
        """Slots of "64" or "25%", between one and all.

        Raises:
            UsageError: neither.
        """
        if not re.fullmatch(r"\d+(\.\d+)?%|\d+", share):
            raise UsageError(f"{share!r} is neither a number of slots nor a share of all experts such as 25%")
        wanted = round(self.num_experts * float(share[:-1]) / 100) if share.endswith("%") else int(share)
        return min(max(wanted, 1), self.num_experts)


@dataclass(frozen=True)
class Limit:
    """A total limit and how many of our slots fill it.

    `process_bytes` is what our process needs beside weights and slots: measured at one slot, Python, torch, the other
    libraries and the activations of the prompt included.
    """

    name: str
    total_bytes: int
    process_bytes: int
    num_slots: int

    def describe(self, model: ModelBytes) -> str:
        """The sum, in one line."""
        return (
            f"{self.name} limit {format_bytes(self.total_bytes)}: process {format_bytes(self.process_bytes)} (measured)"
            f" + dense {format_bytes(model.dense_bytes)} + {self.num_slots} of {model.num_experts} experts "
            f"{format_bytes(self.num_slots * model.slot_bytes)} + margin {format_bytes(self._margin(model))}"
        )

    def _margin(self, model: ModelBytes) -> int:
        return self.total_bytes - self.process_bytes - model.dense_bytes - self.num_slots * model.slot_bytes


def make_limit(wanted: str | int, model: ModelBytes, process_bytes: int, tight_slots: int) -> Limit:
    """`tight`: dense weights, `tight_slots` slots and the process; `half`: half the model and the process; or bytes.

    Raises:
        BudgetError: not even one slot fits.
    """
    if wanted == "tight":
        total = process_bytes + model.dense_bytes + tight_slots * model.slot_bytes + MARGIN_BYTES
        return Limit("tight", total, process_bytes, tight_slots)
    total = model.total_bytes // 2 + process_bytes if wanted == "half" else int(wanted)
    free = total - process_bytes - model.dense_bytes - MARGIN_BYTES
    if free < model.slot_bytes:
        least = total - free + model.slot_bytes
        raise BudgetError(
            f"a limit of {format_bytes(total)} leaves no room for one expert; --limit {least} or more does"
        )
    return Limit(str(wanted), total, process_bytes, min(free // model.slot_bytes, model.num_experts))


def smallest_working(
    works: Callable[[int], bool], failing_bytes: int, largest_bytes: int, max_tries: int = MAX_TRIES
) -> int | None:
    """Smallest limit that was seen to work, by bisection in at most `max_tries` tries; None when none did.

    Args:
        works: tries a limit. failing_bytes: known not to work. largest_bytes: the first that is tried.
    """
    low, high, found = failing_bytes, largest_bytes, None
    for _ in range(max_tries):
        tried = high if found is None else (low + high) // 2
        if works(tried):
            found = high = tried
        elif found is None:
            return None
        else:
            low = tried
    return found
