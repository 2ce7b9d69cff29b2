"""The experts implementation that is registered with transformers, and its kernels.

A transformers experts module calls `forward(hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]`.
Here the experts come from a source, in any order, as they are ready; each kernel accumulates in the order and dtype
in which its resident counterpart does, so that the result is the same to the bit:

    eager        the loop of the class's own forward: `index_add_` in ascending order of experts
    grouped_mm   transformers' grouped_mm: rows by (token, rank), weighted and summed over the ranks
    gemv         like grouped_mm, with our own matrix-vector kernel
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, _grouped_linear

from runtime.gemv import gemv_linear

IMPLEMENTATION = "expertflow"

Weights = Mapping[str, torch.Tensor]
"""The parameters of one expert by their name in the experts module, without the leading expert dimension."""


class Arrival(NamedTuple):
    """Experts (indices in the layer) with their weights, ready to compute."""

    expert: int
    weights: Weights


class ExpertSource(Protocol):
    """Where a layer's experts come from."""

    def serve(
        self, experts: Sequence[int], tokens: Sequence[int], choice: npt.NDArray[np.int64]
    ) -> Iterator[Sequence[Arrival]]:
        """Yield the distinct `experts` in groups as they are ready, in any order.

        `tokens[i]` tokens chose `experts[i]`; `choice` is the router's [T, K].
        Weights may be used until the next group is asked for.
        """
        ...


class _Numerics(NamedTuple):
    """How a class's own forward differs from the common one."""

    accumulate: Callable[[torch.Tensor, torch.Tensor], torch.dtype] = lambda hidden, weights: hidden.dtype
    compute: torch.dtype | None = None


# Read off the classes' forward methods; each row is proven by the exactness test of its family.
_EAGER_NUMERICS: dict[str, _Numerics] = {
    "NemotronHExperts": _Numerics(accumulate=lambda hidden, weights: weights.dtype),
    "Inkling2Experts": _Numerics(accumulate=lambda hidden, weights: torch.float32),
    "OpenAIPrivacyFilterExperts": _Numerics(accumulate=lambda hidden, weights: torch.float32, compute=torch.float32),
}


class Kernel(ABC):
    """Computes one call of an experts module, one expert at a time."""

    def __init__(
        self,
        module: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        experts: Sequence[int],
    ) -> None:
        self.module, self.hidden, self.index, self.weights = module, hidden, index, weights
        self.experts = experts

    @abstractmethod
    def add(self, expert: int, weights: Weights) -> None:
        """Compute `expert` for its tokens. Each of `experts` once, in any order."""

    @abstractmethod
    def result(self) -> torch.Tensor:
        """[T, H] in the dtype of `hidden`, once every expert has been added."""

    def _feed_forward(self, expert: int, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        """up (-> gate) -> down (-> norm) of one expert for rows `x` [n, H]."""
        module = self.module
        name = "gate_up_proj" if module.has_gate else "up_proj"
        x = self._activate(expert, self._linear(x, weights[name], weights.get(f"{name}_bias")))
        x = self._linear(x, weights["down_proj"], weights.get("down_proj_bias"))
        # The flag is younger than transformers 5.17.
        out: torch.Tensor = module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x
        return out

    def _activate(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.module._apply_gate(x) if self.module.has_gate else self.module.act_fn(x)
        return out

    @abstractmethod
    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor: ...


class EagerKernel(Kernel):
    """The loop that experts classes carry themselves."""

    def __init__(
        self,
        module: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        experts: Sequence[int],
    ) -> None:
        super().__init__(module, hidden, index, weights, experts)
        self._numerics = _EAGER_NUMERICS.get(type(module).__name__, _Numerics())
        self._final = torch.zeros_like(hidden, dtype=self._numerics.accumulate(hidden, weights))
        self._order = iter(sorted(experts))
        self._next = next(self._order, None)
        self._waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, expert: int, weights: Weights) -> None:
        rank, token = torch.nonzero(torch.eq(self.index.T, expert), as_tuple=True)
        rows = self._feed_forward(expert, self._cast(self.hidden[token]), weights)
        rows = rows * self._cast(self.weights[token, rank, None])
        self._waiting[expert] = (token, rows.to(self._final.dtype))
        while self._next in self._waiting:
            self._final.index_add_(0, *self._waiting.pop(self._next))
            self._next = next(self._order, None)

    def result(self) -> torch.Tensor:
        assert self._next is None, f"expert {self._next} was never added"
        return self._final.to(self.hidden.dtype)

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._numerics.compute is None else tensor.to(self._numerics.compute)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight, x = self._cast(weight), self._cast(x)
        out = x @ weight if self.module.is_transposed else nn.functional.linear(x, weight)
        return out if bias is None else out + self._cast(bias)


class RowKernel(Kernel):
    """One row per (token, rank); the ranks of a token are weighted and summed at the end, whatever arrived first."""

    def __init__(
        self,
        module: Any,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        experts: Sequence[int],
    ) -> None:
        super().__init__(module, hidden, index, weights, experts)
        self._flat = index.reshape(-1).cpu().numpy()
        self._rows: torch.Tensor | None = None

    def add(self, expert: int, weights: Weights) -> None:
        position = torch.from_numpy(np.flatnonzero(self._flat == expert)).to(self.hidden.device)
        computed = self._feed_forward(expert, self.hidden[position // self.index.shape[-1]], weights)
        if self._rows is None:
            self._rows = computed.new_zeros(self._flat.size, computed.shape[-1])
        self._rows[position] = computed

    def result(self) -> torch.Tensor:
        if self._rows is None:
            return torch.zeros_like(self.hidden)
        weights = self.weights.reshape(-1, 1)
        # In place where the product has the rows' dtype: a long prompt's rows are the largest activation there is.
        weighted = self._rows.mul_(weights) if weights.dtype == self._rows.dtype else self._rows * weights
        return weighted.view(*self.index.shape, -1).sum(dim=1).to(self.hidden.dtype)


# torch's CPU loops compute whole blocks of two vectors with vector code and what is left with scalar code, whose
# transcendental functions round differently. No block of any dtype and instruction set is longer than this.
_VECTOR_BLOCK = 64


class GroupedKernel(RowKernel):
    """transformers' grouped_mm, called with one group at a time.

    transformers activates the rows of all experts in one call. Where an element would then be computed by other code
    than in a call of its own rows, it is put at its place among the others first.
    """

    def _activate(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        is_own = type(self.module)._apply_gate is not _default_apply_gate
        num_columns = x.shape[-1] // (2 if self.module.has_gate else 1)
        if not is_own or num_columns % (_VECTOR_BLOCK * torch.get_num_threads()) == 0 or x.device.type != "cpu":
            return super()._activate(expert, x)
        start = int((self._flat < expert).sum())
        among = x.new_zeros(self._flat.size, x.shape[-1])
        among[start : start + len(x)] = x
        return super()._activate(expert, among)[start : start + len(x)]

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        end = torch.tensor([x.shape[0]], dtype=torch.int32, device=x.device)
        rows = None if bias is None else bias.expand(x.shape[0], -1)
        return _grouped_linear(x, weight.unsqueeze(0), end, bias=rows, is_transposed=self.module.is_transposed)


class GemvKernel(RowKernel):
    """Matrix-vector products of our own; see `gemv.py`."""

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = gemv_linear(x, weight, is_transposed=self.module.is_transposed)
        return out if bias is None else out.add_(bias)


KERNELS: dict[str, type[Kernel]] = {"eager": EagerKernel, "grouped_mm": GroupedKernel, "gemv": GemvKernel}


class LayerRunner:
    """One experts module served from a source. `kernel` says which kernel the running pass uses.

    `observers` are told each router's choice [T, K] and weights [T, K].
    """

    def __init__(self, module: Any, source: ExpertSource, kernel: Callable[[], type[Kernel]]) -> None:
        self.module, self.source, self.kernel = module, source, kernel
        self.observers: list[Callable[[npt.NDArray[np.int64], torch.Tensor], None]] = []

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        choice = index.cpu().numpy()
        for observer in self.observers:
            observer(choice, weights)
        experts, tokens = _distinct(choice, self.module.num_experts)
        kernel = self.kernel()(self.module, hidden, index, weights, experts)
        for group in self.source.serve(experts, tokens, choice) if experts else ():
            for expert, parameters in group:
                kernel.add(expert, parameters)
        return kernel.result()


def _distinct(choice: npt.NDArray[np.int64], num_experts: int) -> tuple[list[int], list[int]]:
    """Experts chosen, ascending, and how many tokens chose each; indices past the last expert mean "none"."""
    counts = np.bincount(choice.reshape(-1), minlength=num_experts)[:num_experts]
    experts = np.flatnonzero(counts)
    return experts.tolist(), counts[experts].tolist()


class ResidentSource:
    """The experts of a module that holds them all: the reference that offloading must equal."""

    def __init__(self, module: Any, parameters: Sequence[str]) -> None:
        self._module, self._parameters = module, parameters

    def serve(
        self, experts: Sequence[int], tokens: Sequence[int], choice: npt.NDArray[np.int64]
    ) -> Iterator[Sequence[Arrival]]:
        """All at once."""
        yield [
            Arrival(expert, {name: getattr(self._module, name)[expert] for name in self._parameters})
            for expert in experts
        ]


def _forward(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    runner: LayerRunner = module._expertflow
    return runner(hidden, index, weights)


def register() -> None:
    """Make the implementation known to transformers; must precede `set_experts_implementation`."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
