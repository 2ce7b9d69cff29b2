"""What every kernel shares: how experts arrive, how one is computed, and rows that the host has computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from runtime.readback import upload

if TYPE_CHECKING:
    from runtime.host_experts import HostExperts, HostLayer

Weights = Mapping[str, torch.Tensor]
"""The parameters of one expert by their name in the experts module, without the leading expert dimension."""


class Arrival(NamedTuple):
    """Experts (indices in the layer) with their weights, ready to compute."""

    expert: int
    weights: Weights


class HostArrival(Arrival):
    """An expert that is not on the device: computed on the host, where these weights rest."""

    __slots__ = ()


class ComputedRows(NamedTuple):
    """What the host has computed, on the device.

    Attributes:
        experts: their rows are `rows[ends[i] : ends[i + 1]]`.
        positions: token * K + rank of each row, [n]. tokens: [n].
        rows: [n, H], before any weighting.
    """

    experts: Sequence[int]
    ends: Sequence[int]
    positions: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor


_Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
_Activate = Callable[[torch.Tensor], torch.Tensor]


class Kernel(ABC):
    """Computes one call of an experts module, expert by expert as they arrive.

    `choice` is `index` [T, K] on the host: on a GPU nothing here waits for the device to tell it again.

    Attributes:
        host: computes experts on the host; None: none will be.
    """

    host: HostLayer | None = None
    _compute: torch.dtype | None = None  # that a class computes in, where that is not the weights'

    def __init__(
        self,
        module: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        experts: Sequence[int],
        choice: npt.NDArray[np.int64],
    ) -> None:
        self.module, self.hidden, self.index, self.weights = module, hidden, index, weights
        self.experts, self._choice = experts, choice
        self._begin()

    def _begin(self) -> None:  # noqa: B027
        """What a kernel prepares for the call."""

    @abstractmethod
    def add(self, arrivals: Sequence[Arrival]) -> None:
        """Compute experts for their tokens. Each of `experts` once, in any order and in any groups."""

    @torch.no_grad()
    def add_from_host(self, arrivals: Sequence[HostArrival]) -> None:
        """The same on the host, while the device goes on; then its rows are sent to the device."""
        places, rows = self._on_host.rows_of(arrivals)
        ends = np.cumsum([0, *map(len, places)]).tolist()
        flat = np.concatenate(places)
        positions, tokens = upload(np.stack([flat, flat // self.index.shape[-1]]), self.hidden.device)
        experts = [arrival.expert for arrival in arrivals]
        self._accept(ComputedRows(experts, ends, positions, tokens, upload(rows, self.hidden.device)))

    @abstractmethod
    def _accept(self, computed: ComputedRows) -> None:
        """Take in what the host has computed."""

    @cached_property
    def host_hidden(self) -> torch.Tensor:
        """`hidden` on the host. Asking for it waits for all that the device was given, unless it was set before."""
        return self.hidden.detach().cpu()

    @cached_property
    def _on_host(self) -> HostExperts:
        assert self.host is not None, "this layer computes nothing on the host"
        return self.host.experts(self.host_hidden, self._choice, self._compute)

    @abstractmethod
    def result(self) -> torch.Tensor:
        """[T, H] in the dtype of `hidden`, once every expert has been added."""

    def _feed_forward(self, x: torch.Tensor, weights: Weights, linear: _Linear, activate: _Activate) -> torch.Tensor:
        """up (-> gate) -> down (-> norm) of one expert for rows `x` [n, H]."""
        x = activate(linear(x, weights[self._up], weights.get(f"{self._up}_bias")))
        return self._normalise(linear(x, weights["down_proj"], weights.get("down_proj_bias")))

    @property
    def _up(self) -> str:
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    def _activate(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.module._apply_gate(x) if self.module.has_gate else self.module.act_fn(x)
        return out

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        # The flag is younger than transformers 5.17.
        has_norm = getattr(self.module, "has_post_expert_norm", False)
        out: torch.Tensor = self.module.post_expert_norm(x) if has_norm else x
        return out


def may_gather_at_once(hidden: torch.Tensor, num_rows: int) -> bool:
    """Whether parts of a tensor of so many rows like those of `hidden` do for tensors of their own: not too many bytes,
    and aligned like what torch allocates, as MKL's results and cuBLAS's choice of kernels depend on that."""
    row_bytes = hidden.shape[-1] * hidden.element_size()
    alignment_bytes = 64 if hidden.device.type == "cpu" else 256
    return row_bytes % alignment_bytes == 0 and num_rows * row_bytes <= AT_ONCE_BYTES


def ascending(experts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each place of the sorted `experts` was before; equal ones keep their order."""
    return np.argsort(experts.astype(np.uint16), kind="stable")  # short integers are sorted by their digits


def count(experts: npt.NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """The distinct ones of `experts`, ascending, and how many there are of each."""
    counts = np.bincount(experts)
    distinct = np.flatnonzero(counts)
    return distinct.tolist(), counts[distinct].tolist()


AT_ONCE_BYTES = 128 << 20
"""Rows are copied in another order for so many bytes at a time: all at once they would need twice their memory."""
