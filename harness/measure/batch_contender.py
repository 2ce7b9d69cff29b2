"""A contender that serves batches: our engine, or the whole model in memory through the same continuous batching."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.predictors.base import RoutePredictor
    from runtime.prompts import RequestResult
    from runtime.schedulers.base import Scheduler


JsonDict = dict[str, Any]


class BatchContender:
    """Serves requests with any scheduler. A scheduler that was used once goes on with what it has learned."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._schedulers: dict[str, Scheduler] = {}
        self._predictors: dict[str, RoutePredictor] = {}

    def facts(self) -> JsonDict:
        """What is known after loading."""
        return {"slots": self._engine.profile.cache.slots, "notes": list(self._engine.notes)}

    def serve(
        self,
        requests: Sequence[JsonDict],
        scheduler: JsonDict,
        concurrency: int | None = None,
        artifact: str | None = None,
    ) -> JsonDict:
        """Replay `requests` (`PromptRequest`) by continuous batching.

        Args:
            scheduler: keys of a profile's `scheduler` section.
            concurrency: outstanding at any time; None: each arrives at its `arrival_s`.
            artifact: a trained routing path predictor, which then tells the scheduler the routes.
        """
        from runtime import machine
        from runtime.prompts import PromptRequest
        from runtime.serving import run_batch

        given = [PromptRequest(**{**request, **_tuples(request)}) for request in requests]
        self._engine.reset_stats()
        run = run_batch(
            self._engine,
            given,
            self._scheduler(scheduler),
            concurrency=concurrency,
            routes=None if artifact is None else self._predictor(artifact),
        )
        return {
            **run.as_dict(),
            "num_passes": run.num_passes,
            "requests": [_times(result) for result in run.requests],
            "stats": self._engine.stats().as_dict(),
            "peak_resident_bytes": machine.peak_resident_bytes(),
        }

    def close(self) -> JsonDict:
        """Stop the I/O threads."""
        self._engine.close()
        return {}

    def _scheduler(self, section: JsonDict) -> Scheduler:
        from runtime.schedulers.make import build_scheduler

        name = json.dumps(section, sort_keys=True)
        if name not in self._schedulers:
            keys = {f"scheduler.{key}": value for key, value in section.items()}
            self._schedulers[name] = build_scheduler(self._engine.profile.with_overrides(keys))
        return self._schedulers[name]

    def _predictor(self, artifact: str) -> RoutePredictor:
        from runtime.build_predictors import route_predictor

        if artifact not in self._predictors:
            self._predictors[artifact] = route_predictor(self._engine, Path(artifact))
        return self._predictors[artifact]


def _tuples(request: JsonDict) -> JsonDict:
    return {name: tuple(request[name]) for name in ("prompt_ids", "output_ids")}


def _times(result: RequestResult) -> JsonDict:
    return {
        "id": result.id,
        "task": result.task,
        "arrival_s": result.arrival_s,
        "first_token_s": result.first_token_s,
        "finish_s": result.finish_s,
        "num_tokens": result.num_tokens,
    }


def build(spec: JsonDict) -> BatchContender:
    """The contender of `spec`: kind "batch" or "batch_resident"."""
    import runtime
    from runtime import machine
    from runtime.profile import Profile

    source = (spec["profile"] or Profile.default(), spec["model"])
    if spec["kind"] == "batch":
        engine = runtime.load(*source, overrides=spec["overrides"])
        engine.pressure = None  # measured with the slots that it was given
        return BatchContender(engine)
    machine.return_freed_memory()  # as the other does on loading: both keep no more than they need
    return BatchContender(runtime.load_reference(*source, overrides=spec["overrides"]))
