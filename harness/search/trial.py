"""One trial: a configuration loaded in a process of its own, a workload replayed, and what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.measure.peaks import Peak, peak_on
from harness.measure.workload import TokenRequest
from harness.search import child
from harness.search.child import Watch, Work
from harness.search.outcome import Kind, Measurement, Outcome
from runtime import machine

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.prompts import RequestResult

WARM_UP_TOKENS = (8, 3)


@dataclass(frozen=True)
class TrialSpec:
    """What to measure: `requests`, `concurrency` of them outstanding.

    Attributes:
        overrides: dotted profile keys.
        device: what torch calls the GPU, such as "cuda:0"; None: the CPU.
    """

    model: str
    overrides: dict[str, Any] = field(hash=False)
    requests: tuple[TokenRequest, ...]
    concurrency: int
    device: str | None = None


def measure(spec: TrialSpec) -> dict[str, Any]:
    """Load the engine, warm it up, replay the workload. Runs in the trial's process.

    Peak memory is that of the whole process from before loading on: of the host, or on the GPU that it computes on
    (`harness.measure.peaks`). Each finished request is reported, see `Finished`.
    """
    peak = peak_on(spec.device)
    with loaded(spec) as (engine, load_s):
        replay_unmeasured(engine, [_shortened(spec.requests[-1])], concurrency=1)
        peak.settle()
        report = partial(_report, peak)
        return measured(engine, spec.requests, spec.concurrency, load_s, peak, report).as_dict()


@contextmanager
def loaded(spec: TrialSpec) -> Iterator[tuple[Engine, float]]:
    """The engine of a trial, and the seconds that loading took."""
    from transformers.utils import logging

    import runtime
    from runtime.profile import Profile

    logging.disable_progress_bar()  # its lock is a semaphore, which a killed trial would leave behind
    start = time.perf_counter()
    # A configuration is measured as it is, not while the engine finds out whether its prefetching pays, nor with fewer
    # slots where memory is short: what does not fit is to fail.
    overrides = {**spec.overrides, "prefetch.on_trial": False}
    with runtime.load(Profile.default(), spec.model, overrides=overrides, device=spec.device) as engine:
        engine.pressure = None
        yield engine, time.perf_counter() - start


def replay_unmeasured(engine: Engine, requests: Sequence[TokenRequest], concurrency: int) -> None:
    """Fill the caches."""
    from harness.measure.runner import serve

    serve(engine, requests, concurrency)


def measured(
    engine: Engine,
    requests: Sequence[TokenRequest],
    concurrency: int,
    load_s: float,
    peak: Peak,
    on_finish: Callable[[RequestResult], None] = lambda result: None,
) -> Measurement:
    """Replay `requests` and measure; counters start at zero, `peak` goes on from loading."""
    from harness.measure.runner import serve

    engine.reset_stats()
    began = time.perf_counter()
    run = serve(engine, requests, concurrency, on_finish=on_finish)
    return Measurement(
        latency_ms_p50=run.latency_ms_p50,
        ttft_ms_p50=run.ttft_ms_p50,
        tpot_ms_p50=run.tpot_ms_p50,
        tokens_per_s=run.tokens_per_s,
        tokens_sha256=run.sha256,
        peak_memory_bytes=peak.num_bytes(),
        slots=int(engine.profile.cache.slots or 0),
        load_s=load_s,
        run_s=time.perf_counter() - began,
        num_tokens=sum(len(request.output_ids) for request in requests),
        stats=engine.stats().as_dict(),
        notes=engine.notes,
    )


@dataclass(frozen=True)
class Finished:
    """A trial's report of one request.

    Attributes:
        predicted_ids: the most likely token at every step. peak_memory_bytes: so far.
    """

    request: str
    latency_ms: float
    predicted_ids: tuple[int, ...]
    peak_memory_bytes: int

    @classmethod
    def of(cls, progress: dict[str, Any]) -> Finished:
        """From what `measure` reports."""
        return cls(**{**progress, "predicted_ids": tuple(progress["predicted_ids"])})


def _report(peak: Peak, result: RequestResult) -> None:
    child.report(
        {
            "request": result.id,
            "latency_ms": result.latency_ms,
            "predicted_ids": result.predicted_ids,
            "peak_memory_bytes": peak.num_bytes(),
        }
    )


def bare_process(_: None) -> dict[str, Any]:
    """Resident memory of a trial's process before it loads anything."""
    return {"resident_bytes": machine.resident_bytes()}


def _shortened(request: TokenRequest) -> TokenRequest:
    prompt_tokens, output_tokens = WARM_UP_TOKENS
    return TokenRequest(
        request.id, request.task, request.prompt_ids[:prompt_tokens], request.output_ids[:output_tokens]
    )


class TrialRunner:
    """Runs trials one after another.

    Args:
        log: what the trials print is appended here.
    """

    def __init__(self, log: Path) -> None:
        self.log = log

    def run(self, work: Work, argument: Any, timeout_s: float, watch: Watch | None = None) -> Outcome:
        """Run `work(argument)` in a process of its own; both must be picklable, the result JSON.

        Whatever ends this call, Ctrl-C included, the process and its children are gone afterwards.

        Args:
            watch: is given whatever `work` tells `child.report`; one that it says why to stop is HOPELESS, with the
                last report as result.
        """
        with child.start(work, argument, self.log) as process:
            outcome = process.answer(timeout_s, watch)
            if outcome.kind not in (Kind.TIMEOUT, Kind.HOPELESS):
                process.finish()
            return outcome
