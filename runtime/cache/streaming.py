"""Passes that stream: that load all experts of a layer before that layer's router has spoken.

A long prompt activates nearly every expert of every layer. Waiting for each router then only leaves the link idle while
attention, router and host work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from runtime.predictors.base import BEFORE_FIRST_LAYER
from runtime.transfer.base import Transfer
from runtime.vocabulary import LoadReason

if TYPE_CHECKING:
    from runtime.cache.residency import Residency  # whose replay goes by what stands here

STREAM_SHARE = 0.75
"""Of the experts that are loaded ahead, the least share that must be needed.

Not streaming, an H200's link idled for a third of the time of a prompt (2,048 tokens, experts of 12 MiB: 86 ms, of
which 50 to 58 ms of copies): to load up to half as much again would have cost no more, 2 needed of 3. The rest is
margin, for larger experts, whose links idle less.
"""


TOKENS_PER_CHOICE = 16
"""Tokens of a text choose alike: of gpt-oss-20b's 32 experts, 4 a token, about 180 tokens activate three quarters of a
layer, which 11 that choose at random would. So many of them count as one."""


def expected_share(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Of a layer's `num_experts` experts, the share that a pass of `num_tokens` tokens is expected to need."""
    left_out = 1.0 - min(1.0, top_k / num_experts)  # by one choice at random
    return 1.0 - float(left_out ** (num_tokens / TOKENS_PER_CHOICE))


class Streaming:
    """Follows a pass layer by layer: how many of the experts that a layer lacked before its router spoke were needed.

    Args:
        num_experts: of a layer. top_k: of them per token.
    """

    def __init__(self, num_experts: int, top_k: int) -> None:
        self._num_experts, self._top_k = num_experts, top_k
        self._expected, self._is_allowed = 0.0, True
        self._num_lacked = self._num_needed = 0  # by the pass's layers so far

    def begin(self, num_tokens: int, *, is_allowed: bool = True) -> None:
        """A pass of `num_tokens` tokens starts; it may stream where `is_allowed`."""
        self._is_allowed = is_allowed
        self._expected = expected_share(self._num_experts, self._top_k, num_tokens)
        self._num_lacked = self._num_needed = 0

    def saw(self, num_lacked: int, num_needed: int) -> None:
        """A layer lacked `num_lacked` experts, and its router chose `num_needed` of them."""
        self._num_lacked += num_lacked
        self._num_needed += num_needed

    @property
    def share(self) -> float:
        """Of the experts that the next layer lacks, the share that is expected to be needed: as of those that the
        layers before it lacked, or else by the number of tokens."""
        return self._num_needed / self._num_lacked if self._num_lacked else self._expected

    @property
    def is_on(self) -> bool:
        """Whether to load what the next layer lacks.

        A pass loads in vain, at most, 1 - `STREAM_SHARE` of what its layers lacked, and what one layer lacked.
        """
        return self._is_allowed and self.share >= STREAM_SHARE


class LayerStream:
    """Loads what the next layer lacks ahead of its router, in passes of which `Streaming` says so.

    Args:
        residency: decides. transfer: acts.

    Attributes:
        has_run: the running pass has streamed so far.
    """

    def __init__(self, residency: Residency, transfer: Transfer) -> None:
        self._residency, self._transfer = residency, transfer
        self._streaming = Streaming(residency.num_experts, residency.top_k)
        self.has_run = False
        self._waiting: list[int] = []  # experts of the next layer that have no slot yet
        self._lacked: tuple[int, npt.NDArray[np.bool_]] | None = None  # that layer, and what it lacked: [experts]

    @property
    def is_on(self) -> bool:
        """The next layer is to be loaded whole."""
        return self._streaming.is_on

    @property
    def has_waiting(self) -> bool:
        """Experts of the next layer wait for a slot."""
        return bool(self._waiting)

    def begin(self, num_tokens: int, *, is_allowed: bool) -> None:
        """A pass starts; see `Streaming.begin`."""
        self._waiting, self._lacked = [], None
        self._streaming.begin(num_tokens, is_allowed=is_allowed)
        self.has_run = self.is_on
        if self.is_on:
            self._residency.keep_for_pass(BEFORE_FIRST_LAYER)

    def routed(self, layer: int, demand: Sequence[int]) -> None:
        """The router of `layer` chose `demand`, which is to be planned now."""
        streamed, lacked = self._lacked or (BEFORE_FIRST_LAYER, None)
        if lacked is None or streamed != layer:
            lacked = ~self._residency.present(layer)
        needed = lacked[np.array(demand) - layer * self._residency.num_experts]
        self._streaming.saw(int(lacked.sum()), int(needed.sum()))
        self._waiting, self._lacked = [], None
        self.has_run |= self.is_on
        if self.is_on:
            self._residency.keep_for_pass(layer)

    def load_next(self, layer: int, *, is_full: bool) -> None:
        """Load what the layer after `layer` lacks, ascending, as it will be computed. What finds no slot waits for
        those that `layer` frees; with `is_full` everything does."""
        if layer + 1 == self._residency.num_layers:
            return
        first, lacked = (layer + 1) * self._residency.num_experts, ~self._residency.present(layer + 1)
        self._lacked = layer + 1, lacked
        if not is_full and lacked.any():
            self._waiting = list(range(first, first + lacked.size))  # all: none of them goes for another one
            self.load(layer, lacked.size)
        self._waiting = [
            expert for expert in (np.flatnonzero(lacked) + first).tolist() if self._residency.slot_of(expert) < 0
        ]

    def load(self, layer: int, most: int) -> None:
        """Load at most so many of the experts that wait for a slot. They are loaded like demand: all are expected to be
        needed, and in this order."""
        wanted = self._waiting[:most]
        loads = self._residency.plan_prefetch(layer, wanted, [1] * len(wanted))
        self._transfer.submit([load._replace(reason=LoadReason.DEMAND) for load in loads])
        placed = {load.expert for load in loads}
        self._waiting = [expert for expert in wanted if expert not in placed] + self._waiting[most:]
