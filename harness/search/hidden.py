"""A machine to judge searches by: the simulator with coefficients that the search does not see, and with noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from harness.measure.workload import TokenRequest
from harness.search.costs import Costs
from harness.search.memory_guard import MemoryGuard
from harness.search.outcome import Kind, Measurement, Outcome
from harness.search.simulated_trial import Simulated
from harness.search.simulator import Simulator
from harness.search.space import Params, Space, params_key
from runtime.machine import format_bytes

LEAST_BIAS, MOST_BIAS = 0.1, 0.3
"""By what share each coefficient is above or below the one that the search begins with."""
NOISE = 0.04
"""Standard deviation of the logarithm of a run's times."""
MEMORY_ABOVE_MODEL = 0.04


def biased(costs: Costs, seed: int) -> Costs:
    """Every coefficient times a factor of its own, within the bounds above."""
    generator = np.random.default_rng([seed, 0])

    def factor() -> float:
        return float(1 + generator.choice([-1, 1]) * generator.uniform(LEAST_BIAS, MOST_BIAS))

    seconds, ratios = ({path: of[path] * factor() for path in sorted(of)} for of in (costs.seconds, costs.ratios))
    return replace(costs, seconds=seconds, ratios=ratios)


class Optimum(NamedTuple):
    """The fastest configuration that fits, and how many of the grid's do."""

    params: dict[str, Any]
    latency_ms: float
    num_fit: int


class HiddenMachine:
    """Answers as a trial would; a configuration fits where the peak that nobody is told of is within the limit.

    Args:
        simulator: with the hidden coefficients. guard: the search's own, with its memory model and the limit.
        seed: of the noise, which depends on the configuration and on how often it has run, not on the order.
    """

    def __init__(self, simulator: Simulator, space: Space, guard: MemoryGuard, seed: int) -> None:
        self._simulator, self._space, self._guard, self._seed = simulator, space, guard, seed
        self._truth = MemoryGuard(guard.model, guard.model, space, guard.limit_bytes)
        self._truth.error = MEMORY_ABOVE_MODEL
        self._known: dict[str, Simulated] = {}
        self._num_runs: Counter[str] = Counter()

    def truth(self, params: Params) -> Simulated:
        """Without noise."""
        key = params_key(params)
        if key not in self._known:
            self._known[key] = self._simulator.run(self._space.overrides(params))
        return self._known[key]

    def peak_bytes(self, params: Params) -> int:
        """Above what the memory model says."""
        return self._truth.expected_bytes(params)

    def fits(self, params: Params) -> bool:
        """Whether it runs."""
        return self.peak_bytes(params) <= self._guard.limit_bytes

    def optimum(self, grid: Iterable[Params]) -> Optimum:
        """Every configuration of the grid that fits, tabulated. Raises ValueError where none does."""
        fitting = [params for params in grid if self.fits(params)]
        best = min(fitting, key=lambda params: self.truth(params).latency_ms_p50)
        return Optimum(dict(best), self.truth(best).latency_ms_p50, len(fitting))

    def measure(self, params: Params) -> Outcome:
        """A trial: what the memory model refuses is not launched."""
        if excess := self._guard.excess(params):
            return Outcome(Kind.TOO_LARGE, excess)
        if not self.fits(params):
            return Outcome(Kind.OUT_OF_MEMORY, f"needs {format_bytes(self.peak_bytes(params))}", wall_s=1.0)
        key = params_key(params)
        self._num_runs[key] += 1
        draw = np.random.default_rng([self._seed, crc32(key.encode()), self._num_runs[key]])
        measured = self._measurement(params, float(np.exp(draw.normal(0, NOISE))))
        return Outcome(Kind.OK, result=measured.as_dict(), wall_s=measured.run_s)

    @contextmanager
    def contender(self, params: Params) -> Iterator[_Contender]:
        """What `harness.search.confirm` opens."""
        yield _Contender(self, params)

    def _measurement(self, params: Params, factor: float) -> Measurement:
        """All times and rates of a run `factor` longer than the true one."""
        run = self.truth(params).measurement()
        stats = {name: value * factor if name.endswith("_s") else value for name, value in run.stats.items()}
        return replace(
            run,
            latency_ms_p50=run.latency_ms_p50 * factor,
            ttft_ms_p50=run.ttft_ms_p50 * factor,
            tpot_ms_p50=None if run.tpot_ms_p50 is None else run.tpot_ms_p50 * factor,
            tokens_per_s=run.tokens_per_s / factor,
            run_s=run.run_s * factor,
            peak_memory_bytes=self.peak_bytes(params),
            slots=int(self._space.complete(params)["slots"]),
            stats=stats,
        )


class _Contender(NamedTuple):
    machine: HiddenMachine
    params: Params

    def run(self, requests: tuple[TokenRequest, ...], /) -> Outcome:
        """The workload is always the same."""
        return self.machine.measure(self.params)
