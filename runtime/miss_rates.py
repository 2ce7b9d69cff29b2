"""What a missed expert takes on this machine, copied or computed, while the other goes on: both read host memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch

from runtime.cache.miss import MissRates
from runtime.host_experts import FEW_ROWS, HostLayer
from runtime.kernels import HostArrival
from runtime.pool import HostWeights, Pool
from runtime.readback import upload
from runtime.transfer.base import Transfer
from runtime.vocabulary import Load, LoadReason

BUDGET_S = 0.1
MANY_TOKENS = 16
_WINDOW = 16  # copies under way: more than are done while an expert is computed
_LEAST = 3  # experts computed
_EXPERTS = 128  # enough that none stays in a cache


@torch.inference_mode()
def rates_of(pool: Pool, layers: Sequence[HostLayer], device: torch.device) -> MissRates:
    """Rates of a pool that nobody uses yet, its `layers` computing with the faster of their two kernels from now on.

    Takes under a second, but for experts of which a few take that long.
    """
    assert pool.host is not None, "nothing is computed on the host"
    residency, host = pool.coordinator.residency, pool.host
    total = residency.num_layers * residency.num_experts
    experts = [expert for expert in range(total) if host.has(expert)][:_EXPERTS]
    found: dict[int, MissRates] = {}
    for gemv_rows in (FEW_ROWS, 0):
        for layer in layers:
            layer.gemv_rows = gemv_rows
        compute = _computing(host, layers[0], experts[0], device)
        found[gemv_rows] = measure(pool.coordinator.transfer, experts, residency.num_slots, compute)
    best = min(found, key=lambda rows: found[rows].compute_s(1))
    for layer in layers:
        layer.gemv_rows = best
    return found[best]


def _computing(host: HostWeights, layer: HostLayer, example: int, device: torch.device) -> Callable[[int, int], None]:
    """Computes an expert that is in host memory, as `example` is, for so many tokens, up to its rows' way to the
    device."""
    weights = host.weights(example)
    assert weights is not None
    up = weights["gate_up_proj" if layer.module.has_gate else "up_proj"]
    hidden = torch.randn(MANY_TOKENS, up.shape[0 if layer.module.is_transposed else 1]).to(up.dtype)

    def compute(expert: int, num_tokens: int) -> None:
        weights = host.weights(expert)
        assert weights is not None
        rows = layer.experts(hidden[:num_tokens], np.zeros((num_tokens, 1), np.int64))
        upload(rows.rows_of([HostArrival(0, weights)])[1], device)

    return compute


def measure(
    transfer: Transfer,
    experts: Sequence[int],
    num_slots: int,
    compute: Callable[[int, int], None],
    *,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> MissRates:
    """Rates of `transfer`, which nobody uses and whose slots hold nothing yet, and of `compute`.

    Args:
        experts: to take, in turn; at least one.
        compute: computes one of them for so many tokens. Called twice unmeasured at first.
        budget_s: for each number of tokens, of which there are two.
    """
    for num_tokens in (1, MANY_TOKENS):
        compute(experts[0], num_tokens)
    link = _Link(transfer, experts, min(num_slots, max(1, len(experts) // 2), _WINDOW))
    transfer.reset_stats()
    one_s, many_s = (_computing_s(link, experts, compute, count, budget_s, clock) for count in (1, MANY_TOKENS))
    transfer.drain()
    moved = transfer.stats()
    transfer.reset_stats()
    token_s = max(0.0, (many_s - one_s) / (MANY_TOKENS - 1))
    return MissRates(moved.busy_s / max(moved.num_loads, 1), max(0.0, one_s - token_s), token_s)


def _computing_s(
    link: _Link,
    experts: Sequence[int],
    compute: Callable[[int, int], None],
    num_tokens: int,
    budget_s: float,
    clock: Callable[[], float],
) -> float:
    """The median time of computing an expert while the link is busy."""
    times_s: list[float] = []
    end_s = clock() + budget_s
    while len(times_s) < _LEAST or clock() < end_s:
        link.keep_busy()
        began_s = clock()
        # Not those that are being copied: what one way reads is not in the caches of the other.
        compute(experts[-1 - len(times_s) % len(experts)], num_tokens)
        times_s.append(clock() - began_s)
    return median(times_s)


class _Link:
    """Copies experts in turn, as many at a time as `num_slots`."""

    def __init__(self, transfer: Transfer, experts: Sequence[int], num_slots: int) -> None:
        self._transfer, self._experts, self._num_slots = transfer, experts, num_slots
        self._num_loads = 0

    def keep_busy(self) -> None:
        """Begin a copy into each slot whose last one has ended."""
        loads = []
        for slot in range(self._num_slots):
            if not self._transfer.is_filling(slot):
                loads.append(Load(self._experts[self._num_loads % len(self._experts)], slot, LoadReason.DEMAND))
                self._num_loads += 1
        self._transfer.submit(loads)
        for load in loads:  # all are enqueued at once, whatever the transfer has under way at most; on a GPU none waits
            self._transfer.wait_any([load.expert])
