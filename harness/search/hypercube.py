"""Configurations spread over a space: a Latin hypercube, drawn before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy.stats import qmc

from harness.search.space import Knob, Params, Space, Value, params_key

_MAX_DRAWS = 50


def latin_hypercube(
    space: Space, number: int, *, seed: int, accepts: Callable[[Params], bool] = lambda params: True
) -> list[dict[str, Value]]:
    """`number` different configurations other than the default, fewer where the space has no more.

    Each knob is one dimension, cut into `number` strata of which each is drawn once; a knob's choices get equal shares
    of it. What `accepts` refuses, and what was drawn before, is replaced from a further hypercube.

    Args:
        accepts: whether a configuration can be run at all.
    """
    seen = {params_key(space.default)}
    found: list[dict[str, Value]] = []
    for params in _drawn(space, number, seed):
        if len(found) == number:
            break
        if params_key(params) not in seen and accepts(params):
            found.append(params)
        seen.add(params_key(params))
    return found


def _drawn(space: Space, number: int, seed: int) -> Iterator[dict[str, Value]]:
    """The configurations of one hypercube after the other."""
    if not space.knobs:
        return
    column = {knob.name: index for index, knob in enumerate(space.knobs)}
    for draw in range(_MAX_DRAWS):
        generator = np.random.default_rng([seed, draw])
        for point in qmc.LatinHypercube(len(column), rng=generator).random(number):
            shares = dict(zip(column, point.tolist(), strict=True))
            yield space.choose(lambda knob, shares=shares: _at(knob, shares[knob.name]))  # type: ignore[misc]


def _at(knob: Knob, share: float) -> Value:
    return knob.choices[int(share * len(knob.choices))]
