"""What is done about the experts that a layer step misses: copied to the device, or computed on the host where they
rest, both at the same time.

The split is that of FreeToken (arXiv 2608.16157) and HybriMoE (arXiv 2504.05897): as many are copied as make the slower
of the two ways end first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple


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


class Misses(NamedTuple):
    """What a coordinator goes by.

    Attributes:
        split: how many are copied.
        is_at_hand: whether an expert can be computed where it rests now. Others are copied.
        hold: keep experts that are at hand there, whatever is loaded meanwhile. release: they have been computed.
    """

    split: MissSplit
    is_at_hand: Callable[[int], bool]
    hold: Callable[[Collection[int]], None]
    release: Callable[[Collection[int]], None]
