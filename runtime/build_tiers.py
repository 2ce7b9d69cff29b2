"""Where the experts of a pool rest, and what brings them to where they are computed: part of the composition root."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from runtime import machine, numa
from runtime.facts import ModelFacts
from runtime.host_memory import HostPlan, PoolNeed, host_memory, plan_host
from runtime.pool import ExpertPlaces, HostWeights, Slots
from runtime.profile import Profile, Tiers
from runtime.transfer.base import Transfer
from runtime.transfer.cuda import CudaTransfer
from runtime.transfer.cuda_streams import CudaStreams, pins_beyond_limit
from runtime.transfer.device_slots import DeviceSlots
from runtime.transfer.disk import DiskTransfer
from runtime.transfer.host_rows import HostRows
from runtime.transfer.host_slab import HostSlab, slab_slot_bytes
from runtime.transfer.slots import SlotArena
from runtime.transfer.store import ExpertStore
from runtime.transfer.tiered import TieredTransfer

_log = logging.getLogger(__name__)


class Tier(NamedTuple):
    """Where the experts of a pool rest, the slots that they come into, what brings them there, and whence they may be
    computed instead."""

    places: ExpertPlaces
    slots: Slots
    transfer: Transfer
    notes: list[str]
    host: HostWeights | None = None


def cpu_tier(store: ExpertStore, num_slots: int, profile: Profile) -> Tier:
    """From disk to host memory, for the CPU."""
    arena = SlotArena(num_slots, store.slot_bytes)
    return Tier(store, arena, DiskTransfer(store, arena, io_threads=profile.transfer.io_threads), [])


def plan_host_tier(
    stores: Sequence[ExpertStore], profile: Profile, facts: ModelFacts, device: torch.device
) -> HostPlan:
    """Where the experts of a GPU's model will rest; said in the log before any of their memory is taken.

    Raises:
        BudgetError: the host has no room for them.
    """
    memory = host_memory()
    if memory.memlock_bytes is not None and device.type == "cuda" and pins_beyond_limit(device):
        memory = replace(memory, memlock_bytes=None)
    needs = [
        PoolNeed(len(store.experts), slab_slot_bytes(store), store.slot_bytes, min(facts.top_k, store.num_experts))
        for store in stores
    ]
    plan = plan_host(needs, memory, profile.tiers.host_bytes if profile.tiers is not None else None)
    _log.info(plan.describe())
    return plan


def gpu_tier(
    store: ExpertStore,
    num_slots: int,
    profile: Profile,
    facts: ModelFacts,
    device: torch.device,
    plan: HostPlan,
    number: int,
) -> Tier:
    """From host memory, into which experts are read now: all of them, or as many as `plan` has rows for in pool
    `number`; the others come from disk when they are needed.

    Raises:
        BudgetError: the device has no room for the slots.
        TransferError: an expert cannot be read.
    """
    share, io_threads, num_streams = plan.shares[number], profile.transfer.io_threads, profile.transfer.streams
    node, notes = _node(device)
    rows: HostSlab | HostRows
    if plan.holds_all:
        rows = HostSlab(store, io_threads=io_threads, num_pinned=share.num_pinned, node=node)
    else:
        policy = (profile.tiers or Tiers()).host_policy
        rows = HostRows(store, share.num_rows, num_pinned=share.num_pinned, top_k=facts.top_k, policy=policy, node=node)
    if not rows.is_placed:
        notes.append(f"the kernel does not place memory on NUMA node {node}, which {device} is near: it may be farther")
    slots = DeviceSlots(num_slots, rows.slot_bytes, device)
    notes.append(f"{num_slots} slots on {device}, {machine.format_bytes(num_slots * slots.slot_bytes)}")
    streams = CudaStreams(rows, slots, num_streams)
    notes += streams.notes
    copies = CudaTransfer(streams, num_slots, store.describe)
    weights = None if profile.miss == "copy" else rows
    if isinstance(rows, HostSlab):
        return Tier(rows, slots, copies, notes, weights)
    disk = DiskTransfer(store, rows.arena, io_threads=io_threads)
    transfer = TieredTransfer(rows, disk, copies, num_slots, store.describe)
    try:
        transfer.fill(store.experts)
    except BaseException:
        transfer.close()
        raise
    return Tier(rows, slots, transfer, notes, weights)


def _node(device: torch.device) -> tuple[int | None, list[str]]:
    """The NUMA node near a GPU; None where there is but one, or, with a note, where it is not known."""
    if device.type != "cuda" or len(numa.nodes()) < 2:
        return None, []
    node = numa.gpu_node(device.index)
    return node, [] if node is not None else [f"which NUMA node {device} is near is not known: it may be a farther one"]
