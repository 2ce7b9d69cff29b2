"""The experts implementation that is registered with transformers.

A transformers experts module calls `forward(hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]`.
Here the experts come from a source, in any order, as they are ready, and a kernel computes them (`runtime.kernels`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from runtime.kernels import Arrival, HostArrival, Kernel
from runtime.kernels.base import count
from runtime.readback import HostReader, Reader

if TYPE_CHECKING:
    from runtime.host_experts import HostLayer

IMPLEMENTATION = "expertflow"


class ExpertSource(Protocol):
    """Where a layer's experts come from."""

    def ask(self) -> Sequence[torch.Tensor]:
        """Tensors that `serve` wants to see on the host, beside the router's choice; they need not be computed yet."""
        ...

    def serve(
        self,
        experts: Sequence[int],
        tokens: Sequence[int],
        choice: npt.NDArray[np.int64],
        answers: Sequence[torch.Tensor],
    ) -> Generator[Sequence[Arrival], None, None]:
        """Yield the distinct `experts` in groups as they are ready, in any order.

        `tokens[i]` tokens chose `experts[i]`; `choice` is the router's [T, K]; `answers` are what `ask` named. No group
        mixes the two kinds of arrival. Weights may be used until the next group is asked for.
        """
        ...


Reroute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Another choice [T, K] and weights [T, K] for what a router gave: (hidden [T, H], index [T, K], weights [T, K])."""


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """What a layer's tokens chose: index and weights [T, K], and `choice`, the index on the host."""

    index: torch.Tensor
    weights: torch.Tensor
    choice: npt.NDArray[np.int64]


class Substitution(Protocol):
    """Sends tokens whose experts are absent elsewhere; see `runtime.substitute`."""

    def ask(self) -> Sequence[torch.Tensor]:
        """Tensors that it wants to see on the host."""
        ...

    def __call__(self, routed: Routed, answers: Sequence[torch.Tensor]) -> Routed:
        """What the tokens get for what they chose; `answers` are what `ask` named."""
        ...


class LayerRunner:
    """One experts module served from a source. `kernel` says which kernel the running pass uses.

    Whatever the host wants to know of the layer is read at once: a GPU is waited for once per layer.

    `observers` are told each router's choice [T, K] and weights [T, K]. `reroute`, where there is one, replaces both
    before anything else, and `substitution` what then names absent experts. `host`, where there is one, computes
    experts that the source leaves on the host.
    """

    def __init__(
        self, module: Any, source: ExpertSource, kernel: Callable[[], type[Kernel]], read: Reader | None = None
    ) -> None:
        self.module, self.source, self.kernel, self._read = module, source, kernel, read or HostReader()
        self.observers: list[Callable[[npt.NDArray[np.int64], torch.Tensor], None]] = []
        self.reroute: Reroute | None = None
        self.substitution: Substitution | None = None
        self.host: HostLayer | None = None

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.reroute is not None:
            index, weights = self.reroute(hidden, index, weights)
        logits = () if self.substitution is None else self.substitution.ask()
        rows = [hidden.detach()] if self.host is not None and self.host.may_compute(index.numel()) else []
        read, *answers = self._read([index, *rows, *logits, *self.source.ask()])
        choice, host_hidden, answers = read.numpy(), answers[: len(rows)], answers[len(rows) :]
        if self.substitution is not None:
            routed = self.substitution(Routed(index, weights, choice), answers[: len(logits)])
            index, weights, choice = routed.index, routed.weights, routed.choice
        for observer in self.observers:
            observer(choice, weights)
        experts, tokens = _distinct(choice, self.module.num_experts)
        kernel = self.kernel()(self.module, hidden, index, weights, experts, choice)
        kernel.host = self.host
        if host_hidden:
            kernel.host_hidden = host_hidden[0]
        if experts:
            # Closed at once when computing fails: whoever keeps the error would keep the leases with it.
            with closing(self.source.serve(experts, tokens, choice, answers[len(logits) :])) as groups:
                for group in groups:
                    if on_host := [one for one in group if isinstance(one, HostArrival)]:
                        kernel.add_from_host(on_host)
                    else:
                        kernel.add(group)
        return kernel.result()


_FEW = 32  # routes that are counted faster without numpy


def _distinct(choice: npt.NDArray[np.int64], num_experts: int) -> tuple[list[int], list[int]]:
    """Experts chosen, ascending, and how many tokens chose each; indices past the last expert mean "none"."""
    if choice.size <= _FEW:
        few: dict[int, int] = {}
        for expert in sorted(choice.reshape(-1).tolist()):
            if expert < num_experts:
                few[expert] = few.get(expert, 0) + 1
        assert min(few, default=0) >= 0, f"there is no expert {min(few)}"
        return list(few), list(few.values())
    experts, counts = count(choice.reshape(-1))
    num_chosen = bisect_left(experts, num_experts)
    return experts[:num_chosen], counts[:num_chosen]


class ResidentSource:
    """The experts of a module that holds them all: the reference that offloading must equal."""

    def __init__(self, module: Any, parameters: Sequence[str]) -> None:
        self._module, self._parameters = module, parameters

    def ask(self) -> Sequence[torch.Tensor]:
        """Nothing."""
        return ()

    def serve(
        self,
        experts: Sequence[int],
        tokens: Sequence[int],
        choice: npt.NDArray[np.int64],
        answers: Sequence[torch.Tensor],
    ) -> Generator[Sequence[Arrival], None, None]:
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
