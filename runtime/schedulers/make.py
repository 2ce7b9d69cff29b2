"""Schedulers by name. No torch."""

from __future__ import annotations

from runtime.profile import Profile
from runtime.schedulers.base import Scheduler
from runtime.schedulers.deadline import Deadline
from runtime.schedulers.fifo import Fifo
from runtime.schedulers.route_overlap import QUANTUM, RouteOverlap


def build_scheduler(profile: Profile, max_kv_tokens: int | None = None) -> Scheduler:
    """The scheduler that the profile names, new; for `serving.run_batch`.

    Args:
        max_kv_tokens: that the KV cache will hold; None: no limit is known.
    """
    section = profile.scheduler
    if section.kind == "route_overlap":
        return RouteOverlap(section.group, section.num_batches, section.quantum or QUANTUM)
    if section.kind == "deadline":
        return Deadline(section.group, section.num_batches, max_kv_tokens)
    return Fifo(section.group, section.num_batches)
