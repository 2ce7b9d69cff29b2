"""Experts of a model on a GPU, computed on the CPU from the host memory that they rest in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from runtime.errors import UnsupportedModelError
from runtime.kernels import Arrival, GemvKernel

FEW_ROWS = 2
"""Rows of an expert up to which `gemv` can be faster than torch's matrix products: on CPUs without instructions for
bfloat16."""
_GEMV_DTYPES = (torch.bfloat16, torch.float32)
_GEMV_TOKENS = 32  # it makes room for the rows of a whole call


class HostLayer:
    """An experts module as the host computes it: the same gate, activation and norm, on the CPU.

    Args:
        module: its experts are elsewhere; nothing that has to do with the engine is attached to it yet.

    Attributes:
        may_compute: whether any expert would be computed here of a layer step with so many (token, rank) pairs.
        gemv_rows: up to so many rows of an expert go through `gemv`, more of them through torch.

    Raises:
        UnsupportedModelError: it holds tensors that are neither parameters nor buffers, on another device.
    """

    def __init__(self, module: nn.Module, may_compute: Callable[[int], bool]) -> None:
        self.module, self.may_compute = copy.deepcopy(module).cpu(), may_compute
        self.gemv_rows = FEW_ROWS
        for part in self.module.modules():
            for name, value in vars(part).items():
                if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                    raise UnsupportedModelError(
                        f"experts of {type(module).__name__} cannot be computed on the CPU: {name} of "
                        f"{type(part).__name__} is on {value.device} and no parameter; set miss: copy"
                    )

    def experts(
        self, hidden: torch.Tensor, choice: npt.NDArray[np.int64], compute: torch.dtype | None = None
    ) -> HostExperts:
        """For one call of the module. See `HostExperts`."""
        return HostExperts(self.module, hidden, choice, compute, self.gemv_rows)


class HostExperts(GemvKernel):
    """Rows of one call of an experts module, before they are weighted.

    Args:
        module: on the CPU. hidden: [T, H] on the CPU. choice: the router's, [T, K].
        compute: what is computed in; None: the dtype of the weights. gemv_rows: see `HostLayer`.
    """

    def __init__(
        self,
        module: Any,
        hidden: torch.Tensor,
        choice: npt.NDArray[np.int64],
        compute: torch.dtype | None,
        gemv_rows: int,
    ) -> None:
        super().__init__(module, hidden, torch.from_numpy(choice), hidden.new_empty(0), (), choice)
        self._compute, self._gemv_rows = compute, gemv_rows

    def rows_of(self, arrivals: Sequence[Arrival]) -> tuple[list[list[int]], torch.Tensor]:
        """For each expert the places of its rows, token * K + rank, ascending; and the rows [n, H] in that order."""
        places = [self._places[arrival.expert] for arrival in arrivals]
        has_gemv = self._compute is None and self._dtype(arrivals) in _GEMV_DTYPES
        if has_gemv and len(self.hidden) <= _GEMV_TOKENS and max(map(len, places)) <= self._gemv_rows:
            self.add(arrivals)
            assert self._rows is not None
            return places, self._rows[[place for own in places for place in own]]
        return places, torch.cat([self._with_torch(*one) for one in zip(arrivals, places, strict=True)])

    def _dtype(self, arrivals: Sequence[Arrival]) -> torch.dtype:
        return arrivals[0].weights[self._up].dtype

    def _with_torch(self, arrival: Arrival, places: list[int]) -> torch.Tensor:
        top_k, dtype = self.index.shape[-1], self._compute or self._dtype([arrival])
        x = self.hidden[[place // top_k for place in places]].to(dtype)
        return self._feed_forward(x, arrival.weights, self._linear, self._activate)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        dtype = self._compute or weight.dtype
        x, weight = x.to(dtype), weight.to(dtype)
        out = x @ weight if self.module.is_transposed else nn.functional.linear(x, weight)
        return out if bias is None else out + bias.to(dtype)
