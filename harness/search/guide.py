"""What to measure next, by the calibrated simulator: stage 1 of the search, and its guidance of stage 2.

The simulator is calibrated anew from everything measured before each round, and heard as long as it can then explain
the order of what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from harness.measure.stats import median
from harness.search.agreement import rank_correlation
from harness.search.memory_guard import MemoryGuard
from harness.search.objective import SLOWDOWN, Objective
from harness.search.outcome import Kind, Limits, Measurement, Record, Tried
from harness.search.space import Params, Space, Value, params_key

FIRST_ROUND, LATER_ROUND = 8, 5
"""Configurations of a round; between two rounds the sampler proposes one, which the simulator has no say in."""
TRUSTED_TAU = 0.3
"""Kendall's tau below which the simulator is not heard."""

Explore = Callable[..., list[tuple[Params, tuple[float, float]]]]


class Foretold(Protocol):
    """What a simulated run answers."""

    @property
    def latency_ms_p50(self) -> float:
        """See `Measurement`, as the others."""

    @property
    def ttft_ms_p50(self) -> float: ...

    @property
    def tpot_ms_p50(self) -> float | None: ...


class Simulates(Protocol):
    """`harness.search.simulator.Simulator`, or a stand-in."""

    def run(self, overrides: Mapping[str, Any]) -> Foretold:
        """A configuration on the virtual clock."""

    def calibrated(self, observations: Sequence[tuple[Mapping[str, Any], Measurement]]) -> Simulates:
        """One whose costs fit what was measured."""


class Guide:
    """Proposes configurations in rounds.

    Args:
        overrides: of a configuration, every profile key that a trial sets.
        explore: an in-memory search (`harness.search.study.explore`).
        num_simulated: configurations that one round explores.
        on_round: told how many were simulated in a round.

    Attributes:
        simulator: as it was calibrated last.
    """

    def __init__(
        self,
        space: Space,
        simulator: Simulates,
        overrides: Callable[[Params], Mapping[str, Any]],
        guard: MemoryGuard,
        limits: Limits,
        objective: Objective,
        explore: Explore,
        *,
        seed: int = 0,
        num_simulated: int = 240,
        on_round: Callable[[int], None] = lambda num_simulated: None,
    ) -> None:
        self.space, self.limits, self.objective = space, limits, objective
        self.simulator = simulator
        self._overrides, self._guard, self._explore = overrides, guard, explore
        self._seed, self._num_simulated, self._on_round = seed, num_simulated, on_round
        self._num_rounds = 0
        self._is_samplers_turn = False
        self._slowest_ms = float("inf")
        self._simulated: dict[str, tuple[float, float] | None] = {}
        self._off = (1.0, 1.0)  # by what foretold times per output token, and to the first one, are to be multiplied

    def foretell(self, params: Params) -> float | None:
        """Latency that is expected of a configuration, ms; None before there was anything to calibrate by."""
        return self._simulated_ms(params) if self._num_rounds else None

    def propose(self, records: Sequence[Record], tried: Sequence[Tried]) -> list[Params]:
        """A round of configurations to run before it is asked again, the most promising first; empty: it is the
        sampler's turn.

        Args:
            records: of every trial, however it ended. tried: what was measured.
        """
        if not records:
            return []
        if self._is_samplers_turn:
            self._is_samplers_turn = False
            return []
        self._is_samplers_turn = True
        observations = [(self._overrides(one.params), run) for one in tried for run in one.runs]
        self.simulator = self.simulator.calibrated(observations)
        if not self._explains(records, tried):
            return []
        return self._round(tried, {params_key(record.params) for record in records})

    def _explains(self, records: Sequence[Record], tried: Sequence[Tried]) -> bool:
        """Whether the order of what was measured is that of the simulator. What was stopped early was slow for sure."""
        stopped = [
            (one.params, median(one.outcome.result["latencies_ms"]))
            for one in records
            if one.outcome.kind is Kind.HOPELESS and one.outcome.result is not None
        ]
        measured = [(one.params, one.latency_ms_p50) for one in tried]
        pairs = [(self._simulated_ms(params), latency_ms) for params, latency_ms in (*measured, *stopped)]
        tau = rank_correlation(pairs)
        return tau is None or tau >= TRUSTED_TAU

    def _simulated_ms(self, params: Params) -> float:
        return self.simulator.run(self._overrides(params)).latency_ms_p50

    def _round(self, tried: Sequence[Tried], seen: set[str]) -> list[Params]:
        self._simulated, self._off = {}, self._seen_off(tried)
        within = [one for one in tried if self.limits.allow(one)]
        default = next((one for one in within if one.params == self.space.default), None)
        if self.objective is Objective.MEMORY and default is not None:
            self._slowest_ms = SLOWDOWN * self._simulated_ms(self.space.default)
        best = self.objective.rank(within, default)
        start = [one.params for one in (best or tried)[:3]]
        found = self._explore(
            self.space, self._evaluate, self._num_simulated, seed=self._seed + self._num_rounds, start=start
        )
        ranked = self._ranked(found)
        self._polish([params for params, _ in ranked[:2]] or start)
        ranked = self._ranked([(json.loads(key), value) for key, value in self._simulated.items() if value])
        self._on_round(len(self._simulated))
        self._num_rounds += 1
        unseen = [one for one in ranked if params_key(one[0]) not in seen]
        return _spread(unseen, FIRST_ROUND if self._num_rounds == 1 else LATER_ROUND)

    def _evaluate(self, params: Params) -> tuple[float, float] | None:
        """Foretold latency in ms and peak memory in bytes; None where it is foretold to exceed a limit."""
        key = params_key(params)
        if key not in self._simulated:
            self._simulated[key] = self._limited(params)
        return self._simulated[key]

    def _limited(self, params: Params) -> tuple[float, float] | None:
        if not self._guard.allows(params):
            return None
        run, peak_bytes = self.simulator.run(self._overrides(params)), self._guard.expected_bytes(params)
        tpot_ms = None if run.tpot_ms_p50 is None else self._off[0] * run.tpot_ms_p50
        if max(self.limits.excess_of(peak_bytes, tpot_ms, self._off[1] * run.ttft_ms_p50).values()) > 0:
            return None
        return run.latency_ms_p50, float(peak_bytes)

    def _seen_off(self, tried: Sequence[Tried]) -> tuple[float, float]:
        """Measured over foretold, median over what was tried. What the simulator leaves out, such as a host
        that runs ahead of its GPU, shifts one of them for all configurations; a limit is on what is measured."""
        pairs = [(one, self.simulator.run(self._overrides(one.params))) for one in tried]
        tpot = [one.tpot_ms_p50 / run.tpot_ms_p50 for one, run in pairs if one.tpot_ms_p50 and run.tpot_ms_p50]
        ttft = [one.ttft_ms_p50 / run.ttft_ms_p50 for one, run in pairs if run.ttft_ms_p50]
        return (median(tpot) if tpot else 1.0), (median(ttft) if ttft else 1.0)

    def _ranked(self, found: Iterable[tuple[Params, tuple[float, float]]]) -> list[tuple[Params, tuple[float, float]]]:
        return sorted(found, key=lambda one: self._order(*one[1]))

    def _order(self, latency_ms: float, peak_bytes: float) -> tuple[bool, float]:
        """To sort by: what is too slow for `memory` comes last, the least slow of it first."""
        if latency_ms > self._slowest_ms:
            return True, latency_ms
        return False, self.objective.cost(latency_ms, peak_bytes)

    def _polish(self, starts: Sequence[Params]) -> None:
        """Descend from each start one knob at a time, to where no single change is better."""
        for params in starts:
            cost = self._cost(params)
            improved = True
            while improved:
                improved = False
                for neighbour in neighbours(self.space, params):
                    if (other := self._cost(neighbour)) < cost:
                        params, cost, improved = neighbour, other, True

    def _cost(self, params: Params) -> tuple[bool, float]:
        value = self._evaluate(params)
        return (True, float("inf")) if value is None else self._order(*value)


def neighbours(space: Space, params: Params) -> Iterable[dict[str, Value]]:
    """Every configuration that differs from `params` in one knob; those that begin to act with it at their default."""
    for knob in space.knobs:
        for value in knob.choices if knob.name in params else ():
            if value != params[knob.name]:
                yield space.near({**params, knob.name: value})


def _spread(ranked: Sequence[tuple[Params, tuple[float, float]]], number: int) -> list[Params]:
    """The best half of `number` by cost, and as many of the front of both objectives, far apart."""
    best = [params for params, _ in ranked[: -(-number // 2)]]
    edge: list[Params] = []
    least = float("inf")
    for params, (_, peak_bytes) in sorted(ranked, key=lambda one: one[1]):
        if peak_bytes < least:
            edge.append(params)
            least = peak_bytes
    taken = {params_key(params) for params in best}
    others = [params for params in edge if params_key(params) not in taken]
    wanted = number - len(best)
    step = max(1.0, len(others) / wanted) if wanted else 1.0
    return [*best, *(others[int(i * step)] for i in range(wanted) if int(i * step) < len(others))]
