from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from harness.measure.foresight import Foresight
from harness.measure.replay import RecordedLookahead, walk
from harness.measure.schedule import Schedule
from harness.measure.workload import TokenRequest
from harness.search.closed_loop import ServedPasses
from harness.search.costs import Costs
from harness.search.outcome import Measurement
from harness.search.simulated_trial import Timed
from harness.search.simulator import Simulator
from harness.search.tracing import RecordSpec, WorkloadTrace, record_workload
from harness.search.trial import TrialSpec, measure
from runtime.cache.coordinator import Coordinator
from runtime.cache.governor import Governor
from runtime.cache.policies import FORESEEING, POLICIES
from runtime.cache.residency import Residency
from runtime.cache.timeline import Times, new_link
from runtime.errors import TraceError
from runtime.predictors.base import Predictor
from runtime.predictors.previous_token import PreviousToken
from runtime.profile import Profile
from runtime.trace import NO_PREDICTION, RoutingTrace, read_trace
from runtime.transfer.simulated import SimulatedTransfer

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def chosen(generator: np.random.Generator, tokens: int, layers: int = LAYERS, experts: int = EXPERTS) -> Any:
    """Routing with habits: uint16 [tokens, layers, top_k]."""
    taste = generator.normal(size=(layers, experts), scale=1.5)
    scores = taste + generator.gumbel(size=(tokens, layers, experts))
    return np.argsort(-scores, axis=2)[..., :TOP_K].astype(np.uint16)


def random_trace(seed: int, pass_sizes: Sequence[int], layers: int = LAYERS, experts: int = EXPERTS) -> RoutingTrace:
    """Passes of one request; a lookahead that is right two times out of three."""
    generator = np.random.default_rng(seed)
    tokens = sum(pass_sizes)
    routed = chosen(generator, tokens, layers, experts)
    predicted = np.full((tokens, layers, 3, TOP_K + 1), NO_PREDICTION, np.uint16)
    for layer in range(layers):
        for ahead in range(1, min(3, layers - 1 - layer) + 1):
            guess = np.argsort(generator.random((tokens, experts)), axis=1)[:, : TOP_K + 1].astype(np.uint16)
            is_right = generator.random(tokens) < 2 / 3
            guess[is_right, :TOP_K] = routed[is_right, layer + ahead]
            predicted[:, layer, ahead - 1] = guess
    return RoutingTrace(
        routed,
        np.zeros(tokens, np.int32),
        {"num_experts": experts},
        step=np.repeat(np.arange(len(pass_sizes)), pass_sizes).astype(np.int32),
        phase=np.repeat(np.array(pass_sizes) == 1, pass_sizes).astype(np.uint8),
        predicted=predicted,
    )


def random_times(schedule: Schedule, seed: int, load_s: float, cold_s: float, slowdown: float) -> Times:
    generator = np.random.default_rng([seed, 1])
    num_passes, num_entries = len(schedule.passes), schedule.demands.experts.size
    per_pass = [generator.uniform(0, 0.3, num_passes) for _ in range(3)]
    return Times(load_s, cold_s, slowdown, *per_pass, generator.uniform(0, 0.4, num_entries))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.sampled_from([1, 1, 1, 2, 5, 40, 90]), min_size=1, max_size=25),
    slots=st.integers(1, LAYERS * EXPERTS),
    policy=st.sampled_from(sorted(set(POLICIES) - FORESEEING)),
    kind=st.sampled_from(["previous_token", "gate_lookahead"]),
    depth=st.integers(1, 3),
    count=st.integers(1, 4),
    every=st.sampled_from([1, 2, 4]),
    load_s=st.sampled_from([0.0, 0.05, 0.3, 2.0]),
    cold_s=st.sampled_from([0.0, 0.1]),
    slowdown=st.sampled_from([0.0, 0.4]),
    streams=st.booleans(),
)
def test_compiled_prefetching_is_the_coordinators(
    seed: int,
    sizes: list[int],
    slots: int,
    policy: str,
    kind: str,
    depth: int,
    count: int,
    every: int,
    load_s: float,
    cold_s: float,
    slowdown: float,
    streams: bool,
) -> None:
    is_lookahead = kind == "gate_lookahead"
    if streams and is_lookahead:
        every = 1  # else the next pass goes by what it forecast before the stream
    schedule = Schedule(random_trace(seed, sizes))
    times = random_times(schedule, seed, load_s, cold_s, slowdown)

    def predictor() -> Predictor:
        return RecordedLookahead(schedule) if is_lookahead else PreviousToken(LAYERS, EXPERTS)

    stepped = Residency(LAYERS, EXPERTS, slots, TOP_K, policy)
    transfer = SimulatedTransfer(load_s, slowdown=slowdown, cold_s=cold_s)
    coordinator = Coordinator(
        stepped,
        transfer,
        Timed(predictor(), transfer, times.ahead_s),
        governor=Governor(depth),
        prefetch_count=count,
        predict_every=every,
        streams=streams,
    )
    expected = walk(schedule, coordinator, transfer, times)

    compiled, link = Residency(LAYERS, EXPERTS, slots, TOP_K, policy), new_link(slots)
    starts, wanted, ahead = Foresight(schedule, predictor(), every, 3).wanted(depth, count)
    steps = schedule.steps(slice(None), streams=streams)._replace(
        wanted_starts=starts, wanted=wanted, steps_ahead=ahead, reads_hidden=is_lookahead
    )
    found = compiled.replay(steps, times, link)

    assert compiled.counts() == stepped.counts()
    assert compiled.resident() == stepped.resident()
    assert found == pytest.approx(expected, abs=1e-9)
    compiled.check_integrity()


def workload(seed: int = 0, lengths: Sequence[tuple[int, int]] = ((9, 6),) * 8) -> WorkloadTrace:
    """Requests of (prompt, output) tokens, recorded one after the other."""
    sizes = [size for prompt, output in lengths for size in (prompt, *[1] * (output - 1))]
    request = np.repeat(np.arange(len(lengths)), [prompt + output - 1 for prompt, output in lengths])
    trace = replace(random_trace(seed, sizes), request=request.astype(np.int32))
    texts = [TokenRequest(str(i), "t", (1,) * p, (1,) * o) for i, (p, o) in enumerate(lengths)]
    return WorkloadTrace.of(trace, texts)


def prior() -> Costs:
    times = [
        (kernel, threads, tokens, factor * seconds / threads**0.5)
        for kernel, factor in (("eager", 1.5), ("grouped_mm", 1.2), ("gemv", 1.0))
        for threads in (1, 2)
        for tokens, seconds in ((1, 1e-4), (8, 3e-4), (64, 2e-3))
    ]
    return Costs.prior({1: 1e-3, 2: 5e-4, 4: 4e-4}, times, dense_layer_experts=1.0, threads=(1, 2))


def simulator(concurrency: int = 1, costs: Costs | None = None) -> Simulator:
    return Simulator(workload(), Profile.default(), concurrency, costs or prior())


CONFIGURATIONS: list[dict[str, Any]] = [
    {"cache.slots": 10},
    {"cache.slots": 10, "prefetch.depth": 0},
    {"cache.slots": 4, "cache.policy": "lru", "transfer.io_threads": 1},
    {"cache.slots": 24, "compute.decode": "eager", "compute.threads": 2},
    {"cache.slots": 6, "prefetch.depth": 3, "prefetch.count": 4, "compute.prefill": "eager"},
    {"cache.slots": 12, "predictor.kind": "previous_token", "predictor.every": 4, "transfer.io_threads": 4},
    {"cache.slots": 8, "compute.decode": "grouped_mm", "predictor.every": 2},
    {"cache.slots": 16, "cache.policy": "lfru", "compute.threads": 2, "transfer.io_threads": 1},
    {"cache.slots": 5, "prefetch.depth": 2, "compute.decode": "eager"},
    {"cache.slots": 20, "compute.threads": 2, "transfer.io_threads": 4, "compute.prefill": "eager"},
]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_simulated_trial_is_consistent_and_repeats_itself(concurrency: int) -> None:
    one, other = simulator(concurrency), simulator(concurrency)
    for overrides in CONFIGURATIONS:
        found = one.run({**overrides, "scheduler.group": 2})
        assert found == one.run({**overrides, "scheduler.group": 2}) == other.run({**overrides, "scheduler.group": 2})
        assert found.num_tokens == 8 * (9 + 5) and found.num_layer_steps == LAYERS * found.num_passes
        assert found.tokens_per_s == pytest.approx(8 * 6 / found.run_s)
        assert 0 <= found.stall_s <= found.busy_s + 1e-9 and found.busy_s <= found.run_s
        assert found.tpot_ms_p50 is not None and 0 < found.tpot_ms_p50 < found.ttft_ms_p50


def test_what_costs_more_takes_longer() -> None:
    costs, overrides = prior(), {"cache.slots": 6, "prefetch.depth": 2}
    usual = simulator(costs=costs).run(overrides).latency_ms_p50
    for path in ("load/2/1", "pass/decode", "layer/decode/1", "token/prefill/1", "forecast/gate_lookahead"):
        slower = replace(costs, seconds={**costs.seconds, path: 3 * costs.seconds[path]})
        assert simulator(costs=slower).run(overrides).latency_ms_p50 > usual, path
    for path, ratio in (("expert/gemv/1", 3.0), ("slowdown/1", 1.0)):
        slower = replace(costs, ratios={**costs.ratios, path: ratio})
        assert simulator(costs=slower).run(overrides).latency_ms_p50 > usual, path


def test_a_lookahead_that_was_not_recorded_prefetches_nothing() -> None:
    blind = workload()
    blind = WorkloadTrace(replace(blind.trace, predicted=None), blind.requests)
    found = Simulator(blind, Profile.default(), 1, prior()).run({"cache.slots": 6, "prefetch.depth": 2})
    assert found.num_prefetch_issued == 0 and found.num_misses > 0


@pytest.mark.parametrize(
    "overrides",
    [
        {"cache.policy": "activation", "predictor.kind": "activation_matrix"},
        {"predictor.kind": "activation_matrix", "prefetch.depth": 2},
        {"predictor.kind": "previous_token", "prefetch.adaptive": True},
    ],
)
def test_what_is_not_compiled_goes_through_the_coordinator(overrides: Mapping[str, Any]) -> None:
    found = simulator().run({"cache.slots": 6, **overrides})
    assert found.num_loads > 0 and found.num_passes == 8 * 6
    assert (
        found.num_hits + found.num_in_flight + found.num_misses
        == simulator().run({"cache.slots": 6, "prefetch.depth": 0}).num_hits
        + simulator().run({"cache.slots": 6, "prefetch.depth": 0}).num_misses
    )


@pytest.mark.parametrize(
    "overrides", [{"prefetch.depth": 2}, {"prefetch.depth": 0}, {"predictor.kind": "previous_token"}]
)
@pytest.mark.parametrize("slots", [6, 12])
def test_long_prompts_stream_as_in_the_coordinator(slots: int, overrides: Mapping[str, Any]) -> None:
    where, profile = workload(lengths=((90, 6), (9, 6), (90, 6))), Profile.default()
    trials = []
    for streams in (False, True):
        one = Simulator(where, profile, 1, prior(), streams=streams)
        trials.append(one._trial({"cache.slots": slots, "cache.policy": "lru", **overrides}))
    found, counts = trials[1]._run
    walked, expected = trials[1]._walk(Residency(LAYERS, EXPERTS, slots, TOP_K, "lru"))
    assert found == pytest.approx(walked, abs=1e-9) and counts == expected
    assert trials[1].simulated().ttft_ms_p50 < trials[0].simulated().ttft_ms_p50


def hidden(seed: int) -> Costs:
    """Another machine than `prior` takes it for."""
    generator = np.random.default_rng(seed)
    costs = prior()
    seconds = {key: 2.0 * value * generator.uniform(0.7, 1.4) for key, value in costs.seconds.items()}
    ratios = {key: value * generator.uniform(0.7, 1.4) for key, value in costs.ratios.items()}
    return replace(costs, seconds=seconds, ratios=ratios)


def noisy(measured: Measurement, generator: np.random.Generator, spread: float) -> Measurement:
    factor = float(np.exp(generator.normal(scale=spread)))
    assert measured.tpot_ms_p50 is not None
    return replace(
        measured,
        latency_ms_p50=measured.latency_ms_p50 * factor,
        ttft_ms_p50=measured.ttft_ms_p50 * factor,
        tpot_ms_p50=measured.tpot_ms_p50 * factor,
        run_s=measured.run_s * factor,
        stats={
            **measured.stats,
            "busy_s": measured.stats["busy_s"] * factor,
            "stall_s": measured.stats["stall_s"] * factor,
        },
    )


def error_after(num_observed: int, concurrency: int, *, spread: float = 0.02, spoiled: int = 0) -> float:
    """Median over configurations of the error of latency, as a share, on five machines."""
    errors = []
    for seed in range(5):
        generator = np.random.default_rng([seed, 2])
        truth, guess = simulator(concurrency, hidden(seed)), simulator(concurrency)
        observed = []
        for number, overrides in enumerate(CONFIGURATIONS[:num_observed]):
            measured = noisy(truth.run(overrides).measurement(), generator, spread)
            observed.append((overrides, noisy(measured, generator, 1.0) if number < spoiled else measured))
        fit = guess.calibrated(observed)
        errors += [
            abs(np.log(fit.run(overrides).latency_ms_p50 / truth.run(overrides).latency_ms_p50))
            for overrides in CONFIGURATIONS
        ]
    return float(np.median(errors))


@pytest.mark.parametrize("concurrency", [1, 4])
def test_calibration_needs_one_trial_and_gets_better_with_more(concurrency: int) -> None:
    none, one, all_of_them = (error_after(num, concurrency) for num in (0, 1, len(CONFIGURATIONS)))
    assert none > 0.5 and one < 0.08 and all_of_them < 0.8 * one and all_of_them < 0.035


def test_a_disturbed_trial_does_not_decide() -> None:
    assert error_after(len(CONFIGURATIONS), 1, spoiled=1) < 0.06


def texts(prompt: int, output: int, number: int, seed: int = 3) -> tuple[TokenRequest, ...]:
    generator = np.random.default_rng(seed)
    ids = generator.integers(16, 4000, (number, prompt + output)).tolist()
    return tuple(TokenRequest(str(i), "t", tuple(one[:prompt]), tuple(one[prompt:])) for i, one in enumerate(ids))


@pytest.mark.parametrize(
    ("scheduler", "group", "window"), [("fifo", 2, None), ("fifo", 3, 2), ("route_overlap", 2, 2), ("fifo", 1, None)]
)
def test_the_passes_of_the_closed_loop_are_the_engines(
    tiny_checkpoint: Path, scheduler: str, group: int, window: int | None
) -> None:
    from harness.measure.runner import serve

    overrides = {"scheduler.kind": scheduler, "scheduler.group": group, "scheduler.window": window, "cache.slots": 8}
    requests = texts(5, 20, 9)
    with runtime.load(tiny_checkpoint, overrides=overrides) as engine:
        engine.start_trace()
        serve(engine, requests, concurrency=5)
        trace = engine.trace()
    ends = np.flatnonzero(np.diff(trace.step)) + 1
    engines = [sorted(part.tolist()) for part in np.split(np.arange(trace.num_tokens), ends)]
    ours = ServedPasses(WorkloadTrace.of(trace, requests), Profile.default().with_overrides(overrides), 5)
    assert [sorted(rows.tolist()) for rows in ours.passes[ours.num_warm_up :]] == engines


@pytest.mark.parametrize(("concurrency", "slots"), [(1, 6), (3, 9)])
def test_on_demand_the_counts_are_those_of_a_real_trial(
    tiny_checkpoint: Path, tmp_path: Path, concurrency: int, slots: int
) -> None:
    overrides = {"cache.slots": slots, "prefetch.depth": 0, "scheduler.group": 2}
    requests = texts(8, 6, 4)  # as long as the warm-up's prompt: what it decodes is then in the trace as well
    spec = TrialSpec(str(tiny_checkpoint), overrides, requests, concurrency)
    told = record_workload(RecordSpec(spec, str(tmp_path / "trace.npz")))
    trace = read_trace(told["path"])
    assert trace.predicted is not None and trace.predicted.shape[2:] == (2, 2 + 3)
    measured = measure(spec)
    found = Simulator(WorkloadTrace.of(trace, requests), Profile.default(), concurrency, prior()).run(overrides)
    for name in ("num_hits", "num_misses", "num_loads", "num_layer_steps", "num_passes", "num_tokens"):
        assert getattr(found, name) == measured["stats"][name], name


def test_a_trace_of_other_requests_is_refused() -> None:
    found = workload()
    with pytest.raises(TraceError, match="8 requests, the workload 7"):
        WorkloadTrace.of(found.trace, texts(9, 6, 7))
    with pytest.raises(TraceError, match=r"14 rows in the trace, not 9 \+ 6"):
        WorkloadTrace.of(found.trace, texts(9, 7, 8))
