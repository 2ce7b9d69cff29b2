"""Routes that requests are expected to take because their last tokens took them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from runtime.schedulers.base import Route

DECAY = 0.9
"""What a token counts, beside the one after it."""
LEAST = 2.0
"""Times as often as the mean expert of its layer, an expert is used that is expected again."""


class RecentRoutes:
    """Experts that each request has used most of late.

    The route of the last token alone says less: it is one draw of what a request uses. So a route here does not have
    the model's top_k experts per layer, but as many as were used often enough.
    """

    def __init__(self) -> None:
        self._uses: dict[str, npt.NDArray[np.float32]] = {}  # decayed, [layers, experts]

    def saw(self, routes: Mapping[str, Route]) -> None:
        """A token of each of these requests took that route."""
        for name, route in routes.items():
            uses = self._uses.setdefault(name, np.zeros(route.shape, np.float32))
            uses *= DECAY
            uses += route

    def forget(self, name: str) -> None:
        """The request is gone."""
        self._uses.pop(name, None)

    def routes(self, names: Iterable[str]) -> dict[str, Route]:
        """Of those of which a token was seen."""
        return {name: _above_mean(self._uses[name]) for name in names if name in self._uses}


def _above_mean(uses: npt.NDArray[np.float32]) -> Route:
    often: Route = uses >= LEAST * uses.mean(axis=1, keepdims=True)
    return often
