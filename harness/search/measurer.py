"""From a configuration of the space to a measured outcome, its tokens checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from harness.measure.workload import Part, TokenRequest
from harness.search.outcome import Kind, Outcome, Record
from harness.search.space import Params, Space
from harness.search.trial import TrialRunner, TrialSpec, measure


class Measurer:
    """Runs configurations on the two parts of a workload.

    Tokens must be those of the first run of the same part and the same batch group (the default's, for its own group):
    kernels and threads are the same in every trial, but a batched product may round differently from a single one, so
    that different groups are not compared.

    Args:
        fixed: profile keys that the user set.
        timeout_s: for one run.
        excess: of (slots, group): why that will not fit into memory, empty where it will; it is then not launched.
    """

    def __init__(
        self,
        runner: TrialRunner,
        model: str,
        space: Space,
        fixed: Mapping[str, Any],
        requests: Mapping[Part, tuple[TokenRequest, ...]],
        concurrency: int,
        timeout_s: float,
        excess: Callable[[int, int], str],
    ) -> None:
        self._timeout_s, self._excess = timeout_s, excess
        self._runner, self._model, self._space, self._fixed = runner, model, space, dict(fixed)
        self._requests, self._concurrency = requests, concurrency
        self._tokens: dict[tuple[Part, Any], str] = {}

    def __call__(self, params: Params, part: Part = "search") -> Outcome:
        """Measure `params` in a process of its own."""
        overrides = self.overrides(params)
        if excess := self._excess(overrides["cache.slots"], overrides["scheduler.group"]):
            return Outcome(Kind.OUT_OF_MEMORY, excess)
        spec = TrialSpec(self._model, overrides, self._requests[part], self._concurrency)
        outcome = self._runner.run(measure, spec, self._timeout_s)
        return self._judge(outcome, part, overrides["scheduler.group"])

    def overrides(self, params: Params) -> dict[str, Any]:
        """Every profile key that a trial of `params` sets."""
        return {**self._fixed, **self._space.overrides(params)}

    def remember(self, records: Iterable[Record]) -> None:
        """Take the tokens of earlier runs on the search part as reference."""
        for record in records:
            if record.outcome.kind is Kind.OK and not record.reused:
                self._judge(record.outcome, "search", self.overrides(record.params)["scheduler.group"])

    def _judge(self, outcome: Outcome, part: Part, group: Any) -> Outcome:
        if outcome.kind is not Kind.OK:
            return outcome
        found = outcome.measurement.tokens_sha256
        expected = self._tokens.setdefault((part, group), found)
        if found == expected:
            return outcome
        message = f"tokens differ from the first run with group {group}: {found[:12]}, not {expected[:12]}"
        return Outcome(Kind.WRONG_TOKENS, message, outcome.result, outcome.wall_s)
