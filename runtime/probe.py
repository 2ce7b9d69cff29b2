"""How fast single experts come in, through the engine's own transfer path and from the checkpoint's own files."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from runtime.model import LoadedModel
from runtime.transfer.base import Transfer
from runtime.transfer.cuda import CudaTransfer, Streams
from runtime.transfer.cuda_streams import CudaStreams
from runtime.transfer.device_slots import DeviceSlots
from runtime.transfer.disk import DiskTransfer
from runtime.transfer.host_slab import HostSlab
from runtime.transfer.slots import SlotArena
from runtime.transfer.store import ExpertStore
from runtime.vocabulary import Load, LoadReason

PROBE_S = 2.0
_WINDOW = 4
_GPU_WINDOW_BYTES, _GPU_WINDOW = 256 << 20, 16  # copied before the host waits: as few waits as the memory allows


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


def gpu_bandwidth(
    expert_bytes: int,
    device: torch.device,
    *,
    budget_s: float = 0.7,
    streams: Callable[[HostSlab, DeviceSlots, int], Streams] = CudaStreams,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Expert bytes per second that the engine's own transfer copies from pinned host memory to a GPU, one expert after
    another from a few of that size.

    Raises:
        BudgetError: not even a few find room.
    """
    window = max(2, min(_GPU_WINDOW, _GPU_WINDOW_BYTES // expert_bytes))
    slab = HostSlab.blank(window, expert_bytes)
    slots = DeviceSlots(window, slab.slot_bytes, device)
    transfer = CudaTransfer(streams(slab, slots, 1), window)
    loads = [Load(expert, expert, LoadReason.DEMAND) for expert in range(window)]

    def copy_all() -> None:
        transfer.submit(loads)
        for load in loads:
            transfer.wait_any([load.expert])
        transfer.drain()  # the host has waited for nothing so far

    try:
        copy_all()  # the first time is the libraries'
        num_windows, start = 0, clock()
        while (took_s := clock() - start) < budget_s or not num_windows:
            copy_all()
            num_windows += 1
        return num_windows * window * expert_bytes / took_s
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
