"""Eviction policies: one formula each. The resident expert with the lowest score is evicted first.

A formula is a pure function of a few per-expert values, compiled into the cache's one step (`steps.py`):

    last_used   layer step at which the expert was last demanded (-1: never)
    loaded_at   layer step at which it was brought in
    uses        number of tokens that demanded it, ever
    fast, medium, slow  decayed frequencies of use per token of its layer (alpha 0.6, 0.05 and 0.002), started at
                top_k / num_experts
    soon        P(the next token of its layer selects it): `often` of these frequencies, and what the experts of the
                last token say (learned online)
    next_demand layer step at which the expert is demanded next, for the oracle
    forecast    tokens that a predictor expects to choose the expert at its layer's next turn; -1: nobody said
    share       the forecast over the sum of its layer's
    wait        tokens until the expert's next use, beyond its layer's next turn, discounted: learned online or told by
                a predictor; -1: nobody said
    now         the layer step that is running
    layer       the expert's layer, from 0
    distance    layers until the expert's layer runs next, 1 … num_layers (its own layer: num_layers)
    num_layers  layers in one token's cycle

All experts of a layer must keep their order from one turn of the layer to the next, unless the forecast changes: the
step remembers each layer's worst resident. `lfru` does not, and pays with a scan of all slots.

To add a policy: write its function, give it a line in `score` and a member of `Policy`.
"""

from __future__ import annotations

import enum
from pathlib import Path

from numba import njit


class Policy(enum.IntEnum):
    """The number by which the compiled step knows a formula."""

    LRU = 0
    LFU = 1
    LFRU = 2
    STATIC = 3
    NEXT_USE = 4
    BELADY = 5
    ACTIVATION = 6
    PLEC = 7
    PERIODIC = 8
    PROBABILISTIC_BELADY = 9
    TD_NEXT_USE = 10


POLICIES: dict[str, Policy] = {policy.name.lower(): policy for policy in Policy if policy is not Policy.BELADY}
ORACLE = Policy.BELADY.name.lower()
"""Knows the future; for replays of a trace only."""

FORESEEING = frozenset({"activation", "plec", "periodic", "probabilistic_belady"})
"""Policies that go by a predictor's forecast."""

ALPHAS = (0.6, 0.05, 0.002)  # fast, medium, slow
LEARNING_RATE = 0.01  # of the next-token table
_MIN_OFTEN, _MIN_SOON, _MAX_SOON = 0.003, 0.002, 0.98

DISCOUNT = 0.85
"""What a use is worth a token later. Undiscounted, rare long waits rule an expectation that they should not: the slot
will have changed hands long before."""
TD_CONTEXT = 8
"""Layer steps, the one that just ran and those before it, by whose experts `td_next_use` learns."""
TD_STEP = 0.16
"""Share of its error that it corrects at a time (normalised least mean squares)."""


@njit(inline="always")
def _lru(last_used):  # type: ignore[no-untyped-def]
    """Least recently used goes."""
    return float(last_used)


@njit(inline="always")
def _lfu(uses, last_used, now):  # type: ignore[no-untyped-def]
    """Least used goes; among equals the least recent."""
    return float(uses) - (now - last_used) / (now + 2.0)


@njit(inline="always")
def _lfru(medium, last_used, now):  # type: ignore[no-untyped-def]
    """Frequency over age: decayed frequency divided by the layer steps since the last use."""
    return medium / (now - last_used + 1.0)


@njit(inline="always")
def _static(loaded_at):  # type: ignore[no-untyped-def]
    """What came first stays: a fixed residency, with the latest arrival making room."""
    return -float(loaded_at)


@njit(inline="always")
def often(fast, medium, slow):  # type: ignore[no-untyped-def]
    """P(a later token of its layer selects the expert), from its own history."""
    return 0.25 * fast + 0.55 * medium + 0.20 * slow


@njit(inline="always")
def steady_worth(fast, medium, slow):  # type: ignore[no-untyped-def]
    """What the next use is worth, E[DISCOUNT ** wait], of an expert that each token selects with P = `often`."""
    p = max(often(fast, medium, slow), _MIN_OFTEN)
    return p / (1.0 - DISCOUNT * (1.0 - p))


@njit(inline="always")
def _next_use(fast, medium, slow, soon, forecast, distance, num_layers):  # type: ignore[no-untyped-def]
    """Expected layer steps until the next use, negated: -(distance + num_layers * W).

    W = (1 - q) / (0.5 (p + q)) further tokens of waiting are expected after the next one, where q is the probability
    that the next token selects the expert and p that a later one does. Not 1/q alone: q falls to its floor for cold
    experts and ruins their order. A pooled cache must rank the layer that just ran as the one needed last, which LRU
    gets backwards. A forecast says of the next token only, and takes q's place in 1 - q alone.
    """
    p = max(often(fast, medium, slow), _MIN_OFTEN)
    q = min(max(soon, _MIN_SOON), _MAX_SOON)
    unused_next = 1.0 - q if forecast < 0.0 else 1.0 - min(forecast, 1.0)
    return -(distance + num_layers * unused_next / (0.5 * (p + q)))


@njit(inline="always")
def _belady(next_demand):  # type: ignore[no-untyped-def]
    """What is needed farthest in the future goes (Belady 1966): no demand-only policy has fewer misses."""
    return -float(next_demand)


@njit(inline="always")
def _activation(share, layer, num_layers):  # type: ignore[no-untyped-def]
    """MoE-Infinity (arXiv 2401.14361v3, algorithm 1): (p + eps) (1 - i / L), p the layer's share of the predicted
    activation matrix. Early layers are kept: prefetching cannot help them."""
    return (max(share, 0.0) + 1e-6) * (1.0 - layer / num_layers)


@njit(inline="always")
def _plec(forecast, last_used, now, distance, num_layers):  # type: ignore[no-untyped-def]
    """ExpertFlow's predictive locality-aware cache (arXiv 2410.17954v2, section 3.3): slots belong to the experts that
    are predicted, in execution order, within a layer by expected tokens. What is not predicted goes first, the longest
    unused before others."""
    if forecast >= 0.5:
        return num_layers - distance + 1.0 + forecast / (forecast + 1.0)
    return 1.0 / (now - last_used + 2.0)


@njit(inline="always")
def _periodic(forecast, last_used, now):  # type: ignore[no-untyped-def]
    """eMoE (arXiv 2503.06823, section 3.3): the experts with the most expected tokens N_i are kept; of those without
    any the longest unused goes first."""
    return max(forecast, 0.0) + 1e-9 / (now - last_used + 2.0)


@njit(inline="always")
def _probabilistic_belady(fast, medium, slow, soon, forecast, wait, distance, num_layers):  # type: ignore[no-untyped-def]
    """Belady's rule on expectations (SeqMoE, arXiv 2609.12978): what is expected to be needed farthest in the future
    goes. By the waits that a predictor tells, or (`td_next_use`) that are learned online; where there are none,
    `next_use` with the predictor's forecast of the next turn, if any, in place of its own."""
    if wait >= 0.0:
        return -(distance + num_layers * wait)
    return _next_use(fast, medium, slow, soon, forecast, distance, num_layers)


@njit(inline="always")
def score(  # type: ignore[no-untyped-def]
    policy, last_used, loaded_at, uses, fast, medium, slow, soon, next_demand, forecast, share, wait, now, layer,
    distance, num_layers,
):  # fmt: skip
    """Value of keeping a resident expert under `policy`; the lowest goes."""
    if policy == 0:
        return _lru(last_used)
    if policy == 1:
        return _lfu(uses, last_used, now)
    if policy == 2:
        return _lfru(medium, last_used, now)
    if policy == 3:
        return _static(loaded_at)
    if policy == 5:
        return _belady(next_demand)
    if policy == 6:
        return _activation(share, layer, num_layers)
    if policy == 7:
        return _plec(forecast, last_used, now, distance, num_layers)
    if policy == 8:
        return _periodic(forecast, last_used, now)
    if policy == 9 or policy == 10:
        return _probabilistic_belady(fast, medium, slow, soon, forecast, wait, distance, num_layers)
    return _next_use(fast, medium, slow, soon, -1.0, distance, num_layers)


KEEPS_ORDER = tuple(policy is not Policy.LFRU for policy in Policy)
"""By policy: whether experts of one layer keep their order between the layer's turns."""

# The compiled step is cached on disk under its own file's time stamp; it carries this one too (see steps.py).
SOURCE = Path(__file__).read_text(encoding="utf-8")
