"""From a configuration of the space to a measured outcome: its tokens checked, its surroundings as usual."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from harness.measure.environment import Surroundings
from harness.measure.workload import Part, TokenRequest
from harness.search.outcome import Kind, Measurement, Outcome, Record, Tried
from harness.search.racing import hopeless
from harness.search.space import Params, Space, params_key
from harness.search.trial import Finished, TrialRunner, TrialSpec, measure

MAX_REPEATS = 2
"""Of a trial in surroundings that had changed."""
LEAST_AGREEMENT, FREE_DIFFERENCES = 0.95, 2
"""Share of the default's tokens that other kernels must predict, and so many differences are always allowed. They round
otherwise, which turned 1 in 100 tokens of the demo at most (bfloat16, groups and kernels); garbage agrees by chance."""
ON_DEMAND = {"cache.policy": "lru", "prefetch.depth": 0}
"""What makes any configuration the reference for its tokens: nothing is foretold."""

# Measured, or stopped for being slow: other surroundings could have given something else.
_DEPENDS_ON_SURROUNDINGS = (Kind.OK, Kind.HOPELESS, Kind.TIMEOUT)
# What fixes the result to the bit; `_numerics` adds what decides which requests run together.
_NUMERICS = (
    "scheduler.group",
    "scheduler.kind",
    "scheduler.window",
    "compute.prefill",
    "compute.decode",
    "compute.threads",
    "miss",
    "compute.host_share",
)

PredictedIds = Mapping[str, tuple[int, ...]]


class Measurer:
    """Runs configurations on the two parts of a workload.

    Tokens are checked twice over. Runs with the same kernels, threads and scheduling must give the same to the bit. The
    first of each kind must agree with the default by `LEAST_AGREEMENT`: another kernel may round differently. So must
    every run in which the CPU computes misses of a GPU: which experts those are depends on what the cache holds.

    Args:
        fixed: profile keys that the user set.
        timeout_s: for one run.
        excess: why a configuration will not fit into memory, empty where it will; it is then not launched.
        surroundings: watches what goes on beside the trials.
        device: see `TrialSpec`.
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
        excess: Callable[[Params], str],
        surroundings: Surroundings,
        device: str | None = None,
    ) -> None:
        self._timeout_s, self._excess, self._surroundings = timeout_s, excess, surroundings
        self._runner, self._model, self._space, self._fixed = runner, model, space, dict(fixed)
        self._requests, self._concurrency, self._device = requests, concurrency, device
        self._tokens: dict[Hashable, str] = {}
        self._references: dict[Part, PredictedIds] = {}
        self._without_default: set[Part] = set()
        self._verified: dict[Hashable, Outcome] = {}
        self._measured: dict[str, tuple[Params, list[Measurement]]] = {}

    def __call__(self, params: Params, part: Part = "search") -> Outcome:
        """Measure `params` in a process of its own.

        On the search's part, one that cannot become better than what was measured before is stopped; the default never.
        """
        if excess := self._excess(params):
            return Outcome(Kind.TOO_LARGE, excess)
        run = self._run(self.overrides(params), part, self._rivals(params, part))
        outcome = self._judge(run, params, part)
        if outcome.kind is Kind.OK and part == "search":
            self._measured.setdefault(params_key(params), (params, []))[1].append(outcome.measurement)
        return outcome

    def verify(self, params: Params, part: Part = "search") -> Outcome:
        """Whether the tokens of `params` are to the bit those of its kernels on demand: no prefetch, policy lru.

        Measures that reference once for all configurations that must give the same tokens; WRONG_TOKENS says that they
        differ.
        """
        kind = self._numerics(params, part)
        if kind not in self._tokens and (own := self(params, part)).kind is not Kind.OK:
            return own
        if kind in self._verified:
            return self._verified[kind]
        run = self._run({**self.overrides(params), **ON_DEMAND}, part, ())
        outcome = self._judge(run, params, part, "the same kernels on demand give other tokens: ")
        if outcome.kind in (Kind.OK, Kind.WRONG_TOKENS):
            self._verified[kind] = outcome
        return outcome

    def overrides(self, params: Params) -> dict[str, Any]:
        """Every profile key that a trial of `params` sets."""
        return {**self._fixed, **self._space.overrides(params)}

    def remember(self, records: Iterable[Record]) -> None:
        """Take earlier runs on the search's part as reference, for tokens and for what is hopeless.

        Their records may be given again together with newer ones.
        """
        found: dict[str, tuple[Params, list[Measurement]]] = {}
        for record in records:
            if record.outcome.kind is Kind.OK and not record.reused:
                measurement = record.outcome.measurement
                found.setdefault(params_key(record.params), (record.params, []))[1].append(measurement)
                self._tokens.setdefault(self._numerics(record.params, "search"), measurement.tokens_sha256)
        self._measured |= found

    def _rivals(self, params: Params, part: Part) -> tuple[Tried, ...]:
        if part != "search" or params == self._space.default:
            return ()
        others = [one for key, one in self._measured.items() if key != params_key(params)]
        return tuple(Tried(other, tuple(runs)) for other, runs in others)

    def _run(self, overrides: dict[str, Any], part: Part, rivals: tuple[Tried, ...]) -> _Run:
        """Run until the surroundings are as usual, `MAX_REPEATS` times again at most."""
        spec = TrialSpec(self._model, overrides, self._requests[part], self._concurrency, self._device)
        reasons: list[str] = []
        while True:
            watch = self._surroundings.watch()
            run = _Run(len(spec.requests), rivals, watch.sample)
            outcome = self._runner.run(measure, spec, self._timeout_s, run.saw)
            now = watch.end(outcome.cpu_s, outcome.cpu_wait_share)
            repeats = {"num_repeats": len(reasons)} if reasons else {}
            outcome = replace(outcome, environment={**now.as_dict(), **repeats})
            if now.gpu is not None and now.gpu.lost:
                return run.ended(replace(outcome, kind=Kind.ENVIRONMENT, message=now.gpu.lost, result=None))
            reason = self._surroundings.changed(now)
            if not reason or outcome.kind not in _DEPENDS_ON_SURROUNDINGS:
                return run.ended(outcome)
            reasons.append(reason)
            if len(reasons) > MAX_REPEATS:
                message = f"in {len(reasons)} runs the surroundings had changed; in the last {reason}"
                return run.ended(replace(outcome, kind=Kind.ENVIRONMENT, message=message, result=None))

    def _judge(self, run: _Run, params: Params, part: Part, prefix: str = "") -> Outcome:
        outcome = run.outcome
        if outcome.kind is not Kind.OK:
            return outcome
        kind, found = self._numerics(params, part), outcome.measurement.tokens_sha256
        expected = self._tokens.get(kind) if self._is_reproducible(params) else None
        if expected is not None:
            is_wrong = found != expected
            why = f"tokens {found[:12]}, not {expected[:12]} as in the first run with the same kernels and scheduler"
        else:
            reference = self._reference(params, part, run.predicted)
            differing, compared = _differences(run.predicted, reference)
            is_wrong = differing > max(FREE_DIFFERENCES, (1 - LEAST_AGREEMENT) * compared)
            why = f"{differing} of {compared} tokens are not those of the default"
        if is_wrong:
            return replace(outcome, kind=Kind.WRONG_TOKENS, message=prefix + why)
        self._tokens.setdefault(kind, found)
        if params == self._space.default:
            self._references.setdefault(part, run.predicted)
        return outcome

    def _reference(self, params: Params, part: Part, predicted: PredictedIds) -> PredictedIds:
        """What the default predicted. After a resume it is run for that; where it does not run, the first run is it."""
        default = self._space.default
        if part not in self._references and params != default and part not in self._without_default:
            self._without_default.add(part)
            if not self._excess(default):
                self._judge(self._run(self.overrides(default), part, ()), default, part)
        return self._references.setdefault(part, predicted)

    def _is_reproducible(self, params: Params) -> bool:
        """The deadline scheduler goes by the clock: which requests run together differs from run to run. A miss that
        the CPU computes rounds otherwise than a hit, and what the cache holds decides which is which."""
        overrides = self.overrides(params)
        return overrides.get("scheduler.kind") != "deadline" and overrides.get("miss", "copy") == "copy"

    def _numerics(self, params: Params, part: Part) -> Hashable:
        """Equal for two configurations that must give the same tokens to the bit."""
        overrides = self.overrides(params)
        # A trained predictor's routes are what requests are grouped by; all others go by the routes they took last.
        has_routes = overrides.get("predictor.kind") == "routing_path"
        return part, *(overrides.get(key) for key in _NUMERICS), has_routes


@dataclass
class _Run:
    """One trial of `num_requests` requests as it is reported, and how it ended."""

    num_requests: int
    rivals: tuple[Tried, ...]
    sample: Callable[[], str]
    predicted: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=lambda: Outcome(Kind.ERROR, "not run"))
    _latencies_ms: list[float] = field(default_factory=list)

    def saw(self, progress: dict[str, Any]) -> str:
        """A request has finished; why to stop the trial now."""
        finished = Finished.of(progress)
        self.predicted[finished.request] = finished.predicted_ids
        self._latencies_ms.append(finished.latency_ms)
        return self.sample() or hopeless(self._latencies_ms, self.num_requests, finished.peak_memory_bytes, self.rivals)

    def ended(self, outcome: Outcome) -> _Run:
        """With its outcome; of a hopeless one what was measured so far is kept."""
        if outcome.kind is Kind.HOPELESS:
            outcome = replace(outcome, result={"latencies_ms": self._latencies_ms, "num_requests": self.num_requests})
        self.outcome = outcome
        return self


def _differences(found: PredictedIds, reference: PredictedIds) -> tuple[int, int]:
    """Tokens of `reference` that are not in `found` at the same position of the same request, and all of them."""
    pairs = [
        (token, found[request][position] if position < len(found.get(request, ())) else None)
        for request, tokens in reference.items()
        for position, token in enumerate(tokens)
    ]
    return sum(token != other for token, other in pairs), len(pairs)
