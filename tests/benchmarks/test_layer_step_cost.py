"""What a layer step of decode costs the host beside computing: a GPU's engine on streams that do nothing.

From the router's choice to the last expert handed to a kernel that computes nothing. Time of this CPU, and none of a
GPU's. `--benchmark-enable` measures; else each runs once. No time is asserted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from runtime.cache.coordinator import Coordinator
from runtime.cache.governor import Governor
from runtime.cache.residency import Residency
from runtime.experts import LayerRunner
from runtime.kernels import Arrival, ComputedRows, Kernel
from runtime.pool import OffloadedSource, Pool
from runtime.predictors.base import NoPredictor, Predictor
from runtime.transfer.cuda import CudaTransfer
from runtime.transfer.device_slots import DeviceSlots
from runtime.transfer.slots import TensorPlace
from runtime.vocabulary import Pass, Phase

pytestmark = [pytest.mark.slow, pytest.mark.paired]

LAYERS, EXPERTS, TOP_K, HIDDEN, PASSES = 24, 32, 4, 8, 40
SLOTS = LAYERS * EXPERTS // 4

Rate = Callable[..., Any]
Choice = Callable[[int, int], list[int]]
"""The experts of a pass's token in a layer."""


class FreeStreams:
    """See `runtime.transfer.cuda.Streams`. What was recorded is done two layer steps later."""

    num_bytes = 12 << 20  # in pieces, as prefetches go

    def __init__(self) -> None:
        self.step = 0

    def new_event(self) -> list[int]:
        return [-2]

    def record(self, event: list[int], lane: int) -> None:
        event[0] = self.step

    def wait(self, event: list[int], lane: int) -> None: ...

    def copy(self, lane: int, expert: int, slot: int, start: int, num_bytes: int) -> None: ...

    def is_done(self, event: list[int]) -> bool:
        return self.step - event[0] >= 2

    def synchronize(self, event: list[int]) -> None:
        event[0] = self.step - 2

    def finish(self) -> None: ...

    def elapsed_s(self, begin: list[int], end: list[int]) -> float:
        return 1e-5

    def close(self) -> None: ...


class Places:
    """See `runtime.pool.ExpertPlaces`: two matrices an expert."""

    num_experts = EXPERTS
    _tensors = tuple(TensorPlace(name, 512 * i, (HIDDEN, HIDDEN), torch.bfloat16) for i, name in enumerate("ab"))

    def tensors(self, expert: int) -> tuple[TensorPlace, ...]:
        return self._tensors


class NoKernel(Kernel):
    """Computes nothing."""

    def add(self, arrivals: Sequence[Arrival]) -> None: ...

    def _accept(self, computed: ComputedRows) -> None: ...

    def result(self) -> torch.Tensor:
        return self.hidden


class Foretold(Predictor):
    """Forecasts what `choice` will be."""

    def __init__(self, choice: Choice) -> None:
        self._choice, self._step, self._rows = choice, 0, np.zeros((LAYERS, EXPERTS), np.float32)

    def begin(self, passing: Pass) -> None:
        self._step = passing.step
        self._rows[:] = 0.0
        for layer in range(LAYERS):
            self._rows[layer, self._choice(passing.step, layer)] = 1.0

    def observe(self, layer: int, observation: Any) -> None: ...

    def forecast(self, layer: int) -> Any:
        return self._rows if layer >= 0 else None


class Steps:
    """Layer steps of batch-1 decode, each layer's own tokens chosen by `choice`."""

    def __init__(self, choice: Choice, predictor: Predictor, policy: str, depth: int) -> None:
        self.streams = FreeStreams()
        slots = DeviceSlots(SLOTS, 1024, torch.device("cpu"))
        self.residency = Residency(LAYERS, EXPERTS, SLOTS, TOP_K, policy)
        transfer = CudaTransfer(self.streams, SLOTS)
        self._coordinator = Coordinator(
            self.residency, transfer, predictor, governor=Governor(depth), prefetch_count=TOP_K
        )
        pool = Pool(Places(), slots, self._coordinator)
        module, self._passing = SimpleNamespace(num_experts=EXPERTS), Pass(Phase.DECODE, 1, 0)
        self._runners = [
            LayerRunner(module, OffloadedSource(pool, layer, lambda: self._passing), lambda: NoKernel)
            for layer in range(LAYERS)
        ]
        self._choice, self._number = choice, 0
        self._hidden, self._weights = torch.zeros(1, HIDDEN), torch.full((1, TOP_K), 0.25)

    def draw(self) -> tuple[list[list[torch.Tensor]]]:
        """What the next passes choose, by layer; the argument of `run`."""
        passes = range(self._number + 1, self._number + 1 + PASSES)
        return ([[torch.tensor([self._choice(number, layer)]) for layer in range(LAYERS)] for number in passes],)

    def run(self, chosen: list[list[torch.Tensor]]) -> None:
        """Passes, one after the other."""
        for indices in chosen:
            self._number += 1
            self._passing = Pass(Phase.DECODE, 1, self._number)
            self._coordinator.begin(self._passing)
            for runner, index in zip(self._runners, indices, strict=True):
                self.streams.step += 1
                runner(self._hidden, index, self._weights)


def always(number: int, layer: int) -> list[int]:
    return [layer % 8, 8 + layer % 8, 17, 23]


def half_new(number: int, layer: int) -> list[int]:
    """Two experts that stay, and two of the others in turn."""
    return [0, 1, 2 + 2 * (number % 15), 3 + 2 * (number % 15)]


def steps_of(kind: str) -> Steps:
    if kind == "hits":
        return Steps(always, NoPredictor(), "td_next_use", depth=0)
    foretold = kind == "prefetched"
    return Steps(half_new, Foretold(half_new) if foretold else NoPredictor(), "lru", depth=int(foretold))


@pytest.mark.parametrize("kind", ["hits", "half_missed", "prefetched"])
def test_layer_step_cost(rate: Rate, kind: str) -> None:
    """Four hits; two hits and two misses; these two prefetched one layer ahead."""
    steps = steps_of(kind)
    steps.run(*steps.draw())
    steps.residency.reset_counts()
    steps.run(*steps.draw())
    counts = {count.name: value for count, value in steps.residency.counts().items()}
    num_steps = PASSES * LAYERS
    rate("layer_steps", num_steps, steps.run, steps.draw)
    assert (counts["LAYER_STEPS"], counts["LOOKUPS"]) == (num_steps, TOP_K * num_steps)
    if kind == "hits":
        assert counts["HITS"] == TOP_K * num_steps
    elif kind == "half_missed":
        assert counts["HITS"] == counts["MISSES"] == 2 * num_steps
    else:
        assert counts["PREFETCH_USED"] == 2 * (num_steps - PASSES) and counts["MISSES"] == 2 * PASSES
