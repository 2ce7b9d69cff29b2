"""`eager`: the loop of an experts class's own forward, `index_add_` in ascending order of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from runtime.kernels.base import Arrival, ComputedRows, Kernel, ascending, count, may_gather_at_once
from runtime.readback import upload


class _Numerics(NamedTuple):
    """How a class's own forward differs from the common one."""

    accumulate: Callable[[torch.Tensor, torch.Tensor], torch.dtype] = lambda hidden, weights: hidden.dtype
    compute: torch.dtype | None = None


# Read off the classes' forward methods; each row is proven by the exactness test of its family.
_EAGER_NUMERICS: dict[str, _Numerics] = {
    "NemotronHExperts": _Numerics(accumulate=lambda hidden, weights: weights.dtype),
    "Inkling2Experts": _Numerics(accumulate=lambda hidden, weights: torch.float32),
    "Inkling2LoopExperts": _Numerics(accumulate=lambda hidden, weights: torch.float32),
    "OpenAIPrivacyFilterExperts": _Numerics(accumulate=lambda hidden, weights: torch.float32, compute=torch.float32),
}


class EagerKernel(Kernel):
    """The loop that experts classes carry themselves."""

    def _begin(self) -> None:
        self._numerics = _EAGER_NUMERICS.get(type(self.module).__name__, _Numerics())
        self._compute = self._numerics.compute
        self._final = torch.zeros_like(self.hidden, dtype=self._numerics.accumulate(self.hidden, self.weights))
        self._order = iter(sorted(self.experts))
        self._next = next(self._order, None)
        self._waiting: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}

    def add(self, arrivals: Sequence[Arrival]) -> None:
        for expert, weights in arrivals:
            token, hidden, share = self._chosen_by(expert)
            rows = self._feed_forward(self._cast(hidden), weights, self._linear, self._activate)
            rows = rows * self._cast(share)
            self._waiting[expert] = (token, rows if rows.dtype == self._final.dtype else rows.to(self._final.dtype))
        self._accumulate()

    def _accept(self, computed: ComputedRows) -> None:
        share = self._cast(self.weights.reshape(-1, 1)[computed.positions])
        rows = (computed.rows * share).to(self._final.dtype)
        for expert, (start, end) in zip(computed.experts, pairwise(computed.ends), strict=True):
            is_one = len(self.hidden) == end - start == 1
            self._waiting[expert] = (None if is_one else computed.tokens[start:end], rows[start:end])
        self._accumulate()

    def _accumulate(self) -> None:
        """Add what waits for no expert before it."""
        while self._next in self._waiting:
            token, rows = self._waiting.pop(self._next)
            if token is None:
                self._final += rows
            else:
                self._final.index_add_(0, token, rows)
            self._next = next(self._order, None)

    def _chosen_by(self, expert: int) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The tokens [n] that chose an expert, by the rank that they gave it, their hidden states [n, H] and weights
        [n, 1]. A single token is None: it needs no gathering, each step of which is a kernel of its own on a GPU."""
        if self._shares is not None:
            return None, self.hidden, self._shares[expert]
        token, hidden, share = self._by_expert[expert]
        return token, self.hidden[token] if hidden is None else hidden, share

    @cached_property
    def _shares(self) -> dict[int, torch.Tensor] | None:
        """The weight [1, 1] of each expert of a single token; None for several, or where it chose one twice."""
        chosen = self._choice[0].tolist() if len(self._choice) == 1 else []
        if not chosen or len(set(chosen)) < len(chosen):
            return None
        return dict(zip(chosen, self.weights.split(1, dim=1), strict=True))

    @cached_property
    def _by_expert(self) -> dict[int, tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """What `_chosen_by` says of each expert, as views of what is gathered for all at once. The hidden states are
        None where they have to be gathered alone, to be aligned as the class's own are."""
        by_rank = self._choice.T.reshape(-1)
        ranks, tokens = np.divmod(ascending(by_rank), len(self._choice))
        experts, sizes = count(by_rank)
        token, rank = upload(np.stack([tokens, ranks]), self.hidden.device)
        hidden: Sequence[torch.Tensor | None] = [None] * len(sizes)
        if may_gather_at_once(self.hidden, len(by_rank)):
            hidden = self.hidden[token].split(sizes)
        views = zip(token.split(sizes), hidden, self.weights[token, rank, None].split(sizes), strict=True)
        return dict(zip(experts, views, strict=True))

    def result(self) -> torch.Tensor:
        assert self._next is None, f"expert {self._next} was never added"
        return self._final.to(self.hidden.dtype)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._numerics.compute is None else tensor.to(self._numerics.compute)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight, x = self._cast(weight), self._cast(x)
        out = x @ weight if self.module.is_transposed else nn.functional.linear(x, weight)
        return out if bias is None else out + self._cast(bias)
