"""The contract of a scheduler."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Route = npt.NDArray[np.bool_]
"""Experts that one token is expected to use: bool [layers, experts]."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request as a scheduler sees it.

    Attributes:
        id: unique among the requests that are waiting or running.
        task: what kind of request it is; "default" where nobody said.
        arrival_s: when it came, on the clock of `now_s`.
        prompt_tokens: length of its prompt.
        left_to_prefill: prompt tokens that are not computed yet; 0 once it decodes.
        output_tokens: tokens generated so far.
        max_output_tokens: where generation stops at the latest.
        slo_s: its answer should be complete that long after its arrival; None: whenever.
    """

    id: str
    task: str
    arrival_s: float
    prompt_tokens: int
    left_to_prefill: int
    output_tokens: int
    max_output_tokens: int
    slo_s: float | None = None

    @property
    def is_decoding(self) -> bool:
        """Its prompt is computed; each further pass gives one token."""
        return self.left_to_prefill == 0


class Scheduler(ABC):
    """Chooses, before every forward pass, the requests that run in it.

    Args:
        group: requests decoded together in one pass, at least 1.
        window: such batches among which requests are distributed, so that `group * window` requests are under way at
            most.

    A scheduler owns its state and mutates nothing that it is given. It reads no clock: `now_s` is the caller's.

    Attributes:
        needs_routes: `choose` wants to know the routes of the running requests' next tokens.
    """

    needs_routes: bool = False

    def __init__(self, group: int, window: int = 1) -> None:
        self.group, self.window = group, window

    @abstractmethod
    def choose(
        self,
        waiting: Sequence[Request],
        running: Sequence[Request],
        routes: Mapping[str, Route],
        now_s: float,
    ) -> Sequence[str]:
        """Ids of the requests of the next pass, the most important first; at most `group` of them decode.

        Never empty while anything waits or runs. Either one request whose prompt is not computed yet, or such that
        decode. The caller leaves out from the end what the KV cache has no room for; where that leaves none, it asks
        again about the decoding requests that were not chosen.

        Args:
            waiting: in order of arrival; none of their tokens has been computed, or their KV cache was taken from them
                and all of them have to be computed again.
            running: in order of admission; their prompt may still be computed in part.
            routes: of running requests' next tokens, by id, as far as they are known; empty unless `needs_routes`. It
                may be lazy: it is read only when a decision depends on it.
            now_s: the time.
        """

    def finished(self, request: Request, now_s: float) -> None:  # noqa: B027 -- optional: some learn from it
        """`request` is complete, with all its `output_tokens`."""
