"""A configuration kept loaded, to measure one segment of text after another in turn with others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from harness.measure.peaks import Peak, peak_on
from harness.measure.workload import TokenRequest
from harness.search import child
from harness.search.outcome import Kind, Outcome
from harness.search.trial import TrialRunner, TrialSpec, loaded, measured, replay_unmeasured

if TYPE_CHECKING:
    from runtime.engine import Engine


def serve_segments(spec: TrialSpec) -> dict[str, Any]:
    """Load the engine, replay `spec.requests` unmeasured, then measure what the parent asks for. Runs in a child."""
    peak = peak_on(spec.device)
    with loaded(spec) as (engine, load_s):
        if spec.requests:
            replay_unmeasured(engine, spec.requests, spec.concurrency)
        peak.settle()
        child.reply(lambda: {"load_s": load_s})
        for question in child.questions():
            child.reply(partial(_segment, engine, question, spec.concurrency, load_s, peak))
    return {}


def _segment(
    engine: Engine, question: list[dict[str, Any]], concurrency: int, load_s: float, peak: Peak
) -> dict[str, Any]:
    return measured(engine, [_request(**one) for one in question], concurrency, load_s, peak).as_dict()


def _request(id: str, task: str, prompt_ids: list[int], output_ids: list[int]) -> TokenRequest:
    return TokenRequest(id, task, tuple(prompt_ids), tuple(output_ids))


class LiveTrial:
    """A process that has loaded a configuration; use it in a `with` block, which ends the process.

    Its expert cache stays as it is between segments, as in production. Failures are outcomes: that of loading is what
    the first `run` returns. Once one has failed the process is gone, and `run` goes on returning how.

    Args:
        runner: whose log it writes to.
        spec: `requests` are replayed after loading to fill the caches; there may be none.
        timeout_s: for loading with that, and for each segment.
    """

    def __init__(self, runner: TrialRunner, spec: TrialSpec, timeout_s: float) -> None:
        self._runner, self._spec, self._timeout_s = runner, spec, timeout_s
        self._process: ExitStack | None = None
        self._child: child.Child | None = None
        self._failure: Outcome | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # loading may be interrupted
            self._child = stack.enter_context(child.start(serve_segments, self._spec, self._runner.log))
            self._kept(self._child.answer(self._timeout_s))
            self._process = stack.pop_all()
        return self

    def run(self, requests: Sequence[TokenRequest]) -> Outcome:
        """Measure one segment; counters start at zero, peak memory is that of the process since it began to load.

        Raises:
            ValueError: outside of the `with` block.
        """
        if self._failure is not None:
            return self._failure
        if self._child is None:
            raise ValueError("a live trial runs within its with block only")
        return self._kept(self._child.ask([asdict(request) for request in requests], self._timeout_s))

    def _kept(self, outcome: Outcome) -> Outcome:
        """A process that has failed is ended: what it computes after that is not to be trusted."""
        if outcome.kind is not Kind.OK and self._child is not None:
            self._failure = outcome
            self._child.kill()
        return outcome

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if self._child is not None and process is not None:
            if self._failure is None and error is None:
                self._child.finish()
            process.__exit__(kind, error, trace)
        self._child = None
