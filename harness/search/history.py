"""What the trials of a study have shown so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from harness.search.outcome import Kind, Outcome, Record, Tried
from harness.search.space import Params, params_key

MAX_RUNS = 3
"""Runs of one configuration: the first, and two repeats when it is proposed again or its environment changed."""


class History:
    """Records of finished trials, by number and by configuration."""

    def __init__(self) -> None:
        self._records: dict[int, Record] = {}
        self._by_params: dict[str, list[Record]] = {}

    def add(self, number: int, attributes: Mapping[str, Any]) -> None:
        """Take in a finished trial, with what `attributes_of` made of its outcome; one without, or known, is passed
        over."""
        if number in self._records or "outcome" not in attributes:
            return
        outcome = attributes["outcome"]
        record = Record(
            number,
            attributes["params"],
            Outcome(**{**outcome, "kind": Kind(outcome["kind"])}),
            attributes["reused"],
            attributes["source"],
        )
        self._records[number] = record
        self._by_params.setdefault(params_key(record.params), []).append(record)

    def records(self) -> list[Record]:
        """In the order in which they were added."""
        return list(self._records.values())

    def outcomes(self, params: Params) -> list[Outcome]:
        """Of the runs of a configuration."""
        return [record.outcome for record in self._by_params.get(params_key(params), ()) if not record.reused]

    def settled(self, params: Params, *, may_repeat: bool) -> Outcome | None:
        """What is known of a configuration that is not to be run: it failed, is hopeless, ran three times, or ran and
        is not to be repeated; None: run it."""
        outcomes = self.outcomes(params)
        telling = [outcome for outcome in outcomes if outcome.kind is not Kind.ENVIRONMENT]
        is_repeat = may_repeat and all(outcome.kind is Kind.OK for outcome in telling)
        if len(outcomes) < MAX_RUNS and (is_repeat or not telling):
            return None
        return (telling or outcomes)[-1]

    def is_untold(self, params: Params) -> bool:
        """Whether nothing is known of a configuration and it may still be run."""
        return self.settled(params, may_repeat=False) is None

    def tried(self) -> list[Tried]:
        """Every configuration that ran well at least once and never gave wrong tokens, in order of its first run."""
        runs: dict[str, tuple[Params, list[Any]]] = {}
        wrong = {params_key(one.params) for one in self.records() if one.outcome.kind is Kind.WRONG_TOKENS}
        for record in self.records():
            if params_key(record.params) in wrong:
                continue
            if record.outcome.kind is Kind.OK and not record.reused:
                runs.setdefault(params_key(record.params), (record.params, []))[1].append(record.outcome.measurement)
        return [Tried(params, tuple(measured)) for params, measured in runs.values()]

    def pooled(self, params: Params, outcome: Outcome, *, reused: bool) -> Tried | None:
        """All good runs of a configuration, `outcome` among them unless it is `reused`; None for one that is not ok."""
        if outcome.kind is not Kind.OK:
            return None
        known = [one.measurement for one in self.outcomes(params) if one.kind is Kind.OK]
        return Tried(params, (*known, *(() if reused else (outcome.measurement,))))


def attributes_of(params: Params, outcome: Outcome, *, reused: bool, source: str) -> dict[str, Any]:
    """What a finished trial keeps, JSON."""
    return {"params": dict(params), "source": source, "outcome": asdict(outcome), "reused": reused}
