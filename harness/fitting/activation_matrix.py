"""Makes the collection of `activation_matrix`, MoE-Infinity's predictor, from the requests of a trace."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tqdm import tqdm

from harness.fitting.base import FitOptions, FitResult, model_name, routing_shape, split
from harness.fitting.figures import compared, rows_by_request
from harness.measure.prediction import MORE, in_request_order, ranked
from runtime.predictors.activation_matrix import ActivationMatrix
from runtime.predictors.artifact import Artifact
from runtime.predictors.base import Observation
from runtime.predictors.params import ActivationMatrixParams
from runtime.trace import RoutingTrace
from runtime.vocabulary import Pass, Phase

_PARAMS = ActivationMatrixParams()


def fit(trace: RoutingTrace, options: FitOptions, *, quiet: bool) -> FitResult:
    """See `harness.fitting.base.Fit`. There are no epochs: each request of the training part is seen once.

    The figures are those of `harness.fitting.figures.compared`, of forecasts one layer ahead (for the first layer
    before it), while the predictor goes on learning from the held-out requests that have ended, as in use.

    Raises:
        TraceError: fewer than two requests.
    """
    train, held = split(trace, options)
    learned = collected(train)
    schedule = in_request_order(held)
    with tqdm(total=held.num_tokens, unit="tok", desc="judging", disable=quiet) as bar:
        predictor = ActivationMatrix(routing_shape(trace), _PARAMS, learned)
        ranks = ranked(schedule, predictor, 1, held.top_k + MORE, on_token=bar.update)
    params = {"validation_requests": np.unique(held.request).tolist()}
    return FitResult(replace(learned, params=params), compared(ranks, train, held))


def collected(trace: RoutingTrace) -> Artifact:
    """What the predictor keeps of all requests of a trace, one after the other.

    A request runs as one pass per phase: its matrices are sums, so that they do not depend on how it is cut into
    passes.
    """
    predictor = ActivationMatrix(routing_shape(trace), _PARAMS)
    phases = np.ones(trace.num_tokens, np.uint8) if trace.phase is None else trace.phase
    passes = [
        rows[phases[rows] == phase] for rows in rows_by_request(trace) for phase in np.unique(phases[rows]).tolist()
    ]
    for step, rows in enumerate(passes):
        requests = tuple(trace.request[rows].tolist())
        passing = Pass(Phase(int(phases[rows[0]])), len(rows), step, requests=requests)
        predictor.begin(passing)
        for layer in range(trace.num_layers):
            predictor.observe(layer, Observation(passing, trace.experts[rows, layer].astype(np.int64)))
    return predictor.artifact(model_name(trace))
