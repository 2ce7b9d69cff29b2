"""Whether a pass streams: loads all experts of a layer before that layer's router has spoken.

A long prompt activates nearly every expert of every layer. Waiting for each router then only leaves the link idle while
attention, router and host work.
"""

from __future__ import annotations

STREAM_SHARE = 0.75
"""Of the experts that are loaded ahead, the least share that must be needed.

Not streaming, an H200's link idled for a third of the time of a prompt (2,048 tokens, experts of 12 MiB: 86 ms, of
which 50 to 58 ms of copies): to load up to half as much again would have cost no more, 2 needed of 3. The rest is
margin, for larger experts, whose links idle less.
"""


TOKENS_PER_CHOICE = 16
"""Tokens of a text choose alike: of gpt-oss-20b's 32 experts, 4 a token, about 180 tokens activate three quarters of a
layer, which 11 that choose at random would. So many of them count as one."""


class Streaming:
    """Follows a pass layer by layer: how many of the experts that a layer lacked before its router spoke were needed.

    Args:
        num_experts: of a layer. top_k: of them per token.
    """

    def __init__(self, num_experts: int, top_k: int) -> None:
        self._left_out = 1.0 - min(1.0, top_k / num_experts)  # by one choice at random
        self._expected, self._is_allowed = 0.0, True
        self._num_lacked = self._num_needed = 0  # by the pass's layers so far

    def begin(self, num_tokens: int, *, is_allowed: bool = True) -> None:
        """A pass of `num_tokens` tokens starts; it may stream where `is_allowed`."""
        self._is_allowed = is_allowed
        self._expected = 1.0 - self._left_out ** (num_tokens / TOKENS_PER_CHOICE)
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
