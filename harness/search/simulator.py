"""The calibrated simulator: what `harness.search.trial.measure` would measure, without running anything.

    trace = WorkloadTrace.of(read_trace(path), requests)      # path: what `tracing.record_workload` wrote
    simulator = Simulator(trace, base, concurrency, Costs.prior(…))
    simulator.calibrated(observations).run({"cache.slots": 64, "prefetch.depth": 2}).latency_ms_p50

`base` is the profile that the overrides are put on. Deterministic. The engine's schedulers choose the passes
(`closed_loop`), its cache decides what is loaded (`runtime.cache`), `Costs` say what takes how long. What a
configuration does not depend on is kept: passes by scheduler, forecasts by predictor.

A GPU is simulated like a CPU, but that long prompts stream whole layers: loads are copies at the probed rate, an expert
is computed in the time that the probe found until the host has seen it done, and what a layer takes beside its experts
is a guess that the fit corrects. Left out is that the host only enqueues and may run ahead of the device (the slower of
the two then sets the pace; here their times are one); that demand and prefetch may be copied on two streams at once
(`transfer.streams` changes nothing here); and that the CPU may compute misses (`miss` and what acts with it change
nothing here: a miss is copied, a long prompt streams). Trials decide those.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from harness.measure.foresight import Foresight
from harness.search.closed_loop import ServedPasses
from harness.search.costs import Costs, Row, fitted
from harness.search.outcome import Measurement
from harness.search.simulated_trial import Simulated, SimulatedTrial, predict_every, predictor_of
from harness.search.tracing import LOOKAHEAD, WorkloadTrace
from runtime.profile import LOSSY, Profile

_ROUNDS = 3
"""Of a fit: what a simulated trial waits is known only once costs are."""


class Simulator:
    """Simulates configurations of one workload.

    Args:
        workload: its recorded routing. base: the profile that overrides are put on.
        concurrency: requests outstanding.
        costs: what things take; a guess (`Costs.prior`) until it is `calibrated`.
        streams: long prompts stream whole layers, as on a GPU.
    """

    def __init__(
        self, workload: WorkloadTrace, base: Profile, concurrency: int, costs: Costs, *, streams: bool = False
    ) -> None:
        self.costs = self._guess = costs
        self._workload, self._base, self._concurrency, self._streams = workload, base, concurrency, streams
        self._schedules: dict[Hashable, ServedPasses] = {}
        self._foresights: dict[Hashable, Foresight] = {}

    def run(self, overrides: Mapping[str, Any]) -> Simulated:
        """Simulate a trial of the profile with `overrides` (dotted keys).

        Raises:
            ProfileError: they do not make a profile. UsageError, ArtifactError: its predictor cannot be had here.
        """
        return self._trial(overrides).simulated()

    def calibrated(self, observations: Sequence[tuple[Mapping[str, Any], Measurement]]) -> Simulator:
        """The same workload with costs fitted to real trials: overrides and what was measured; any number of them.

        The fit begins with the costs that this simulator was made with, not with those of an earlier fit.
        """
        new = self.with_costs(self._guess)
        for _ in range(_ROUNDS if observations else 0):
            rows: list[Row] = []
            loads: list[Row] = []
            for number, (overrides, measured) in enumerate(observations):
                trial = new._trial(overrides)
                rows += trial.rows(measured, number)
                loads += trial.loads(measured, number)
            new.costs = fitted(self._guess, rows, loads)
        return new

    def with_costs(self, costs: Costs) -> Simulator:
        """The same workload on another machine; what does not depend on costs is shared."""
        new = Simulator(self._workload, self._base, self._concurrency, costs, streams=self._streams)
        new._schedules, new._foresights = self._schedules, self._foresights
        return new

    def _trial(self, overrides: Mapping[str, Any]) -> SimulatedTrial:
        profile = self._base.with_overrides(dict(overrides))
        streams = self._streams and profile.numerics not in LOSSY  # which load before passes only
        return SimulatedTrial(profile, self._schedule(profile), self._foresight, self.costs, streams=streams)

    def _schedule(self, profile: Profile) -> ServedPasses:
        section = profile.scheduler
        key = None if self._concurrency == 1 else (section.kind, section.group, section.num_batches, section.quantum)
        if key not in self._schedules:
            self._schedules[key] = ServedPasses(self._workload, profile, self._concurrency)
        return self._schedules[key]

    def _foresight(self, profile: Profile, schedule: ServedPasses) -> Foresight | None:
        """None: what this predictor wants depends on more than the routing."""
        depth = max(LOOKAHEAD, profile.prefetch.depth)
        key = (id(schedule), profile.predictor.model_dump_json(), depth)
        if key not in self._foresights:
            predictor = predictor_of(profile, schedule)
            if predictor.by_likelihood:
                return None
            self._foresights[key] = Foresight(schedule, predictor, predict_every(profile), depth)
        return self._foresights[key]
