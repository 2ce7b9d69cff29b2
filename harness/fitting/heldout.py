"""The part of a trace that predictors are judged on: requests that none of them was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from harness.fitting.base import FitOptions, routing_shape, rows_of, split
from runtime.errors import UsageError
from runtime.predictors.artifact import read_artifact
from runtime.trace import RoutingTrace


class Parts(NamedTuple):
    """The tokens that predictors are judged on, those of other requests, and why these."""

    judged: RoutingTrace
    past: RoutingTrace
    reason: str


def held_out(trace: RoutingTrace, artifacts: Mapping[str, str], options: FitOptions) -> Parts:
    """The requests that the trainings of all `artifacts` held out; without any, those that a training would hold out.

    Args:
        artifacts: path of each trained predictor by its kind. Those that do not say what they held out are for anyone.
        options: of the split where no artefact decides.

    Raises:
        UsageError: a predictor was trained on another trace, or no request was held out from all trainings.
        TraceError: fewer than two requests.
    """
    held = {
        kind: set(requests)
        for kind, path in artifacts.items()
        if (requests := read_artifact(path, shape=routing_shape(trace)).params.get("validation_requests"))
    }
    if not held:
        past, judged = split(trace, options)
        return Parts(judged, past, f"a share of {options.validation_share:g}, seed {options.seed}")
    who, requests = " and ".join(held), set(trace.request.tolist())
    if not all(of < requests for of in held.values()):
        raise UsageError(
            f"{who}: trained on another trace than this one, or on several; give the same ones, or --unseen"
        )
    common = set.intersection(*held.values())
    if not common:
        raise UsageError(f"{who}: no request was held out from all of their trainings; judge them one by one")
    is_held = np.isin(trace.request, list(common))
    return Parts(rows_of(trace, is_held), rows_of(trace, ~is_held), f"those that {who} did not train on")
