"""The routing of a workload: recorded once, replayed by the simulator in whatever order a configuration serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from harness.measure.workload import TokenRequest
from harness.search.trial import TrialSpec, loaded
from runtime.errors import TraceError
from runtime.trace import RoutingTrace, write_trace
from runtime.vocabulary import Phase

LOOKAHEAD = 3
"""Layers ahead for which gate lookahead is recorded: the deepest prefetch of the search space."""


@dataclass(frozen=True)
class RecordSpec:
    """What to record: the workload served as `trial` would; the trace goes to the file `out`."""

    trial: TrialSpec
    out: str


def record_workload(spec: RecordSpec) -> dict[str, Any]:
    """Serve the workload once and write its routing. Runs in a trial's process (`TrialRunner.run`).

    The gate lookahead is in the trace where the model's routers can be asked.

    Raises:
        ExpertFlowError: the engine cannot be loaded, or the routing of this model cannot be recorded.
    """
    from harness.measure.runner import serve

    with loaded(spec.trial) as (engine, _):
        engine.start_trace(lookahead=min(LOOKAHEAD, engine.routing_shape[0]))
        serve(engine, spec.trial.requests, spec.trial.concurrency)
        trace = engine.trace()
        write_trace(spec.out, trace)
        return {"path": spec.out, "num_tokens": trace.num_tokens, "notes": list(engine.notes)}


class RequestRows(NamedTuple):
    """The rows of a trace that one request computed: its prompt, then every output token but the last."""

    prompt: tuple[int, ...]
    decoded: tuple[int, ...]

    @property
    def num_output_tokens(self) -> int:
        """Tokens that its client gets."""
        return len(self.decoded) + 1


@dataclass(frozen=True, eq=False)
class WorkloadTrace:
    """A trace and whose its rows are, in the order of the workload's requests."""

    trace: RoutingTrace
    requests: tuple[RequestRows, ...]

    @classmethod
    def of(cls, trace: RoutingTrace, requests: Sequence[TokenRequest]) -> WorkloadTrace:
        """Find every request's rows in what `record_workload` wrote.

        Raises:
            TraceError: the trace is not one of these requests.
        """
        numbers = np.unique(trace.request)
        if len(numbers) != len(requests):
            raise TraceError(f"the trace has {len(numbers)} requests, the workload {len(requests)}; record it again")
        return cls(trace, tuple(_rows(trace, int(n), of) for n, of in zip(numbers, requests, strict=True)))


def _rows(trace: RoutingTrace, number: int, request: TokenRequest) -> RequestRows:
    rows = np.flatnonzero(trace.request == number).tolist()
    num_prompt, num_decoded = len(request.prompt_ids), len(request.output_ids) - 1
    if len(rows) != num_prompt + num_decoded:
        wanted = f"{num_prompt} + {num_decoded}"
        raise TraceError(f"request {request.id!r} has {len(rows)} rows in the trace, not {wanted}; record it again")
    return RequestRows(tuple(rows[:num_prompt]), tuple(rows[num_prompt:]))


def served(trace: RoutingTrace, num_output_tokens: int) -> WorkloadTrace:
    """The requests of a trace, their prompts and up to so many output tokens; those cut off at its end are left out.

    Raises:
        TraceError: it does not say which tokens were prefilled, or has no request with both.
    """
    if trace.phase is None:
        raise TraceError("the trace does not say which tokens were prefilled (field `phase`); record one that does")
    requests = []
    for number in np.unique(trace.request):
        rows = np.flatnonzero(trace.request == number)
        decodes = trace.phase[rows] == Phase.DECODE
        if decodes.any() and not decodes.all():
            requests.append(
                RequestRows(tuple(rows[~decodes].tolist()), tuple(rows[decodes][: num_output_tokens - 1].tolist()))
            )
    if not requests:
        raise TraceError("the trace has no request with prompt and output tokens; record one with harness.record")
    return WorkloadTrace(trace, tuple(requests))
