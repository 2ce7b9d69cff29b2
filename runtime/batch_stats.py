"""What a batched run did, and how that is counted while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers.generation.continuous_batching.requests import FutureRequestState

from runtime.prompts import RequestResult
from runtime.schedulers.base import Route


@dataclass(frozen=True)
class BatchResult:
    """A run.

    Attributes:
        requests: in the order in which they were given; those that a stop left without a token are missing.
        num_passes: forward passes.
        num_decode_passes: of these, with one token per request.
        decode_batch: mean requests of a decode pass; None without one.
        distinct_experts: mean experts that a layer of a decode pass needed; None without one.
        planning_s: seconds spent predicting routes and choosing requests.
        hidden_planning_s: of these, spent while a pass computed.
    """

    requests: tuple[RequestResult, ...]
    num_passes: int
    num_decode_passes: int
    decode_batch: float | None
    distinct_experts: float | None
    planning_s: float
    hidden_planning_s: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all requests per second of the whole run, prefill included; 0 where nothing came out."""
        if not self.requests:
            return 0.0
        span_s = max(r.finish_s for r in self.requests) - min(r.arrival_s for r in self.requests)
        return sum(request.num_tokens for request in self.requests) / span_s

    def as_dict(self) -> dict[str, int | float | None]:
        """Every figure of the run as a whole, in one flat JSON object."""
        return {
            "num_requests": len(self.requests),
            "num_output_tokens": sum(request.num_tokens for request in self.requests),
            "tokens_per_s": self.tokens_per_s,
            "num_decode_passes": self.num_decode_passes,
            "decode_batch": self.decode_batch,
            "distinct_experts": self.distinct_experts,
            "planning_s": self.planning_s,
            "hidden_planning_s": self.hidden_planning_s,
        }


class RoutingWatch:
    """What the routers of the running pass choose: how many experts, and by which route each request's last token."""

    def __init__(self, shape: tuple[int, int], wants_routes: bool) -> None:
        self._shape, self._wants_routes = shape, wants_routes
        self._names: list[str] = []
        self._routes = np.zeros((0, *shape), np.bool_)
        self._decodes = False
        self._num_passes = self._num_tokens = self._num_experts = 0

    def begin(self, batch: Sequence[FutureRequestState]) -> None:
        """A pass with these requests, in the order of their tokens, is computed next."""
        lengths = [future.query_length for future in batch]
        self._names, self._last = [future.state.request_id for future in batch], np.cumsum(lengths) - 1
        self._routes = np.zeros((len(batch), *self._shape), np.bool_)
        self._decodes = max(lengths) == 1
        if self._decodes:
            self._num_passes += 1
            self._num_tokens += len(batch)

    def observe(self, layer: int, choice: npt.NDArray[np.int64], weights: torch.Tensor) -> None:
        """A layer was routed; indices past the last expert mean "none"."""
        num_experts = self._shape[1]
        if self._decodes:
            self._num_experts += int((np.bincount(choice.reshape(-1))[:num_experts] > 0).sum())
        if self._wants_routes:
            rows = choice[self._last]
            request, rank = np.nonzero(rows < num_experts)
            self._routes[request, layer, rows[request, rank]] = True

    def routes(self) -> dict[str, Route]:
        """Of the pass that ended, by request."""
        return dict(zip(self._names, self._routes, strict=True)) if self._wants_routes else {}

    @property
    def num_decode_passes(self) -> int:
        """So far."""
        return self._num_passes

    def means(self) -> tuple[float | None, float | None]:
        """Requests per decode pass, distinct experts per layer of one."""
        if not self._num_passes:
            return None, None
        return self._num_tokens / self._num_passes, self._num_experts / self._num_passes / self._shape[0]
