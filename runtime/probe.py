"""How fast single experts come in, through the engine's own transfer path and from the checkpoint's own files."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

from runtime.model import LoadedModel
from runtime.transfer.base import Transfer
from runtime.transfer.disk import DiskTransfer
from runtime.transfer.slots import SlotArena
from runtime.transfer.store import ExpertStore
from runtime.vocabulary import Load, LoadReason

PROBE_S = 2.0
_WINDOW = 4


def engine_bandwidth(
    loaded: LoadedModel, files: Sequence[Path], *, io_threads: int, budget_s: float = 0.7, seed: int = 0
) -> float:
    """Expert bytes per second that the engine's own transfer brings into slots, random experts of the model.

    Args:
        loaded: `runtime.model.meta_model`. files: of its checkpoint.

    Raises:
        ExpertFlowError: the checkpoint cannot be served or read.
    """
    alike = [layer for layer in loaded.layers if layer.parameters == loaded.layers[0].parameters]
    store = ExpertStore.open(loaded.model, files, alike)
    experts = [layer * store.num_experts + i for layer, one in enumerate(alike) for i in range(one.num_experts)]
    transfer = DiskTransfer(store, SlotArena(min(_WINDOW, len(experts)), store.slot_bytes), io_threads=io_threads)
    try:
        return store.expert_bytes * _experts_per_s(transfer, experts, budget_s, random.Random(seed))
    finally:
        transfer.close()


def _experts_per_s(transfer: Transfer, experts: Sequence[int], budget_s: float, draw: random.Random) -> float:
    num_loads, window = 0, min(_WINDOW, len(experts))
    start = time.perf_counter()
    while num_loads < 2 * window or time.perf_counter() - start < budget_s:
        chosen = draw.sample(experts, window)
        transfer.submit([Load(expert, slot, LoadReason.DEMAND) for slot, expert in enumerate(chosen)])
        for expert in chosen:
            transfer.wait_any([expert])
        num_loads += window
    return num_loads / (time.perf_counter() - start)
