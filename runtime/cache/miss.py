"""What is done about the experts that a layer step misses: copied to the device, or computed on the host where they
rest, both at the same time.

The split is that of FreeToken (arXiv 2608.16157) and HybriMoE (arXiv 2504.05897): as many are copied as make the slower
of the two ways end first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class MissRates(NamedTuple):
    """What a missed expert takes either way while the other way is busy too, in seconds.

    Attributes:
        copy_s: copying it to the device.
        expert_s, token_s: computing it on the host takes expert_s + token_s * tokens, until its rows are back.
    """

    copy_s: float
    expert_s: float
    token_s: float

    def compute_s(self, num_tokens: float) -> float:
        """Computing one expert for so many tokens."""
        return self.expert_s + self.token_s * num_tokens


@dataclass(frozen=True, slots=True)
class MissSplit:
    """How many of the missing experts are copied.

    Attributes:
        rates: of this machine.
        host_share: of the missing experts, the share that is computed, as far as that is for few tokens each: with more
            than one, computing an expert must not take longer than copying it. None: whatever the rates say.
    """

    rates: MissRates
    host_share: float | None = None

    def num_copies(self, tokens: Sequence[int]) -> int:
        """How many to copy of missing experts that `tokens[i]` tokens chose; between equal times, more copies."""
        if not tokens:
            return 0
        count, each = len(tokens), sum(tokens) / len(tokens)
        if self.host_share is None:
            return _balance(count, self.rates.copy_s, self.rates.compute_s(each))
        is_too_much = each > 1 and self.rates.compute_s(each) > self.rates.copy_s
        return count if is_too_much else count - math.floor(self.host_share * count + 0.5)

    def may_compute(self, num_experts: int, tokens_each: float) -> bool:
        """Whether any of up to `num_experts` missing experts of `tokens_each` tokens would be computed."""
        if self.host_share is not None:
            is_little = tokens_each <= 1 or self.rates.compute_s(tokens_each) <= self.rates.copy_s
            return self.host_share > 0 and is_little
        return self.rates.compute_s(tokens_each) < num_experts * self.rates.copy_s


def _balance(count: int, copy_s: float, compute_s: float) -> int:
    """The q that makes max(q * copy_s, (count - q) * compute_s) least; the largest of several."""
    if copy_s <= 0:
        return count
    even = math.floor(count * compute_s / (copy_s + compute_s))
    around = range(max(0, even - 1), min(count, even + 2) + 1)
    return min(around, key=lambda q: (max(q * copy_s, (count - q) * compute_s), -q))


class Resting(Protocol):
    """Where experts rest that can be computed there."""

    def has(self, expert: int) -> bool:
        """Whether an expert is there now."""

    def hold(self, experts: Collection[int]) -> None:
        """Keep experts of one layer that are there until they are released, whatever is loaded meanwhile."""

    def release(self, experts: Collection[int]) -> None:
        """Let them go."""


class Misses:
    """What a coordinator asks about missing experts, and what keeps those that are computed where they rest.

    Args:
        split: how many are copied. host: where others are computed. num_experts: of a layer.
    """

    def __init__(self, split: MissSplit, host: Resting, num_experts: int) -> None:
        self.split, self._host, self._num_experts = split, host, num_experts
        self._held: Collection[int] = ()

    def may_compute(self, num_routes: int) -> bool:
        """Whether any would be computed of a layer step with so many (token, rank) pairs."""
        return self.split.may_compute(self._num_experts, max(1.0, num_routes / self._num_experts))

    def choose(self, missing: Mapping[int, int], num_free: int) -> tuple[int, Collection[int]]:
        """How many of the missing experts to load at most, and which of them may be computed instead.

        Args:
            missing: how many tokens chose each. num_free: slots that are worth nothing as they are: misses fill them,
                whatever that takes.
        """
        at_hand = {expert: count for expert, count in missing.items() if self._host.has(expert)}
        num_copies = len(missing) - len(at_hand) + self.split.num_copies(list(at_hand.values()))
        return max(num_copies, num_free), at_hand.keys()

    def hold(self, experts: Collection[int]) -> None:
        """Keep what will be computed until `let_go`, in place of what a layer step that was broken off has left."""
        self.let_go()
        if experts:
            self._host.hold(experts)
            self._held = experts

    def let_go(self) -> None:
        """What was held has been computed, or will not be."""
        held, self._held = self._held, ()
        if held:
            self._host.release(held)
