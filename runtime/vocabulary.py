"""The nouns that the engine, the plug-ins and the simulator share. Plain values: no tensors, no clock, no I/O.

An *expert* is named by one integer all over the engine: `layer * num_experts + index`, where `layer` counts the
model's MoE layers from 0 in execution order. A *slot* is a place on the compute device that holds one expert.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Lookup(enum.IntEnum):
    """Answer to "is this expert on the compute device?"; in flight is neither a hit nor a miss."""

    MISS = 0
    IN_FLIGHT = 1
    HIT = 2


class LoadReason(enum.IntEnum):
    """Why an expert is loaded. Demand overtakes prefetch."""

    DEMAND = 0
    PREFETCH = 1


class Phase(enum.IntEnum):
    """What a forward pass does; the values are those of a trace's `phase`."""

    PREFILL = 0
    DECODE = 1


class Load(NamedTuple):
    """Bring `expert` into `slot`; whatever the slot held is gone from the moment this is decided."""

    expert: int
    slot: int
    reason: LoadReason


@dataclass(frozen=True, slots=True)
class Plan:
    """What one layer step will do with the experts that its tokens demand.

    `hits`, `in_flight` and the experts of `loads` are leased: their slots are not reused until they are released.
    `deferred` found no free slot; they are planned again once leases are released (a further wave).
    `computed` are computed where they rest: they have neither slot nor lease.
    """

    hits: tuple[int, ...]
    in_flight: tuple[int, ...]
    loads: tuple[Load, ...]
    deferred: tuple[int, ...] = ()
    computed: tuple[int, ...] = ()

    @property
    def awaited(self) -> tuple[int, ...]:
        """The leased experts that are not in their slot yet."""
        return self.in_flight + tuple(load.expert for load in self.loads)


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass of the model, as predictors and traces see it.

    `step` counts the engine's passes from 0. `token_ids` are in the order of the flattened batch, empty when the
    model was given embeddings; those that lie on a GPU can be looked at while the pass runs, and cost nothing where
    nobody does. `requests` says which sequence each token belongs to: a number that no other sequence
    of the run has. `tasks` names the task of each token's request, empty where none was given.
    """

    phase: Phase
    num_tokens: int
    step: int
    token_ids: Sequence[int] = ()
    requests: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
