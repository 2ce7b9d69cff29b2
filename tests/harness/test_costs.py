from __future__ import annotations

import numpy as np
import pytest

from harness.search.costs import Costs, Row, closest, fitted

TIMES = [("eager", 1, 1, 1e-4), ("eager", 1, 4, 2e-4), ("eager", 2, 1, 6e-5), ("gemv", 1, 1, 5e-5)]


def prior() -> Costs:
    return Costs.prior({1: 1e-3, 4: 3e-4}, TIMES, dense_layer_experts=2.0, threads=(1, 2))


def test_the_guess_comes_from_the_probe() -> None:
    costs = prior()
    assert [costs.of(f"load/{io}/1") for io in (1, 2, 4)] == [1e-3, 1e-3, 3e-4]
    assert costs.of("layer/decode/1") > costs.of("layer/decode/2") > 2.0 * 6e-5
    assert costs.of("expert/gemv/1") == 1.0
    assert min(costs.seconds.values()) > 0


def test_expert_times_lie_on_the_measured_points_and_their_last_line() -> None:
    found = prior().expert_s("eager", 1, np.array([1, 2, 4, 10]))
    assert found == pytest.approx([1e-4, 1e-4 + 1e-4 / 3, 2e-4, 2e-4 + 6 * 1e-4 / 3])
    assert prior().expert_s("gemv", 1, np.array([1, 3])) == pytest.approx([5e-5, 15e-5])  # one point: in proportion


def test_expert_times_that_were_disturbed_are_not_believed_and_do_not_become_negative() -> None:
    measured = {1: 3.0, 2: 90.0, 4: 2.0, 8: 4.0, 16: 400.0, 32: 5.0, 64: 3.0}
    costs = Costs.prior({1: 1e-3}, [("eager", 1, *point) for point in measured.items()], dense_layer_experts=2.0)
    assert costs.experts["eager/1"] == {1: 3.0, 2: 2.0, 4: 2.0, 8: 4.0, 16: 3.0, 32: 5.0, 64: 3.0}
    assert costs.expert_s("eager", 1, np.array([1000])) == pytest.approx([3.0])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("load/4/1", "load/4/1"),
        ("load/8/1", "load/1/1"),
        ("layer/decode/3", "layer/decode/2"),
        ("layer/decode/64", "layer/decode/2"),
        ("forecast/previous_token", "forecast/gate_lookahead"),
    ],
)
def test_an_unknown_coefficient_is_the_nearest_known_one(path: str, expected: str) -> None:
    assert closest(path, prior().seconds) == expected


def test_kernels_that_were_not_measured_are_like_others() -> None:
    costs = prior()
    assert costs.expert_s("eager", 8, np.array([1])) == pytest.approx([6e-5])
    assert costs.known("expert/grouped_mm/2") in costs.ratios


def test_one_time_moves_what_shares_a_path_and_the_rest_less() -> None:
    before = prior()
    after = fitted(before, [Row({"layer/decode/1": 100.0}, 0.0, 300 * before.of("layer/decode/1"), 0)], [])

    def moved(path: str) -> float:
        return after.of(path) / before.of(path)

    assert moved("layer/decode/1") == pytest.approx(3.0, rel=0.02)
    assert 1.2 < moved("expert/gemv/1") < moved("layer/prefill/1") < moved("layer/decode/2") < 3.0
    assert moved("load/1/1") == 1.0  # loads are measured by themselves


def test_many_times_tell_coefficients_apart() -> None:
    before, generator = prior(), np.random.default_rng(0)
    truth = {path: value * generator.uniform(0.4, 2.5) for path, value in before.seconds.items()}
    paths = ["pass/decode", "layer/decode/1", "token/decode/1", "layer/prefill/1"]
    rows = []
    for trial in range(30):
        units = dict(zip(paths, generator.uniform(0, 1, 4) / [before.of(path) for path in paths], strict=True))
        slowed_s = float(generator.uniform(0, 2))
        seconds = sum(truth[path] * number for path, number in units.items()) + 0.5 * slowed_s + 0.3
        rows.append(Row({**units, "slowdown/1": slowed_s}, 0.3, seconds, trial))
    rows[0] = rows[0]._replace(measured_s=20 * rows[0].measured_s)  # something else ran meanwhile
    loads = [
        Row({path: 1.0}, 0.0, seconds, number)
        for number, (path, seconds) in enumerate([("load/1/1", 3e-3), ("load/1/1", 3.3e-3), ("load/4/2", 1e-3)])
    ]
    after = fitted(before, rows, loads)
    assert [after.of(path) for path in paths] == pytest.approx([truth[path] for path in paths], rel=0.12)
    assert after.of("slowdown/1") == pytest.approx(0.5, rel=0.2)
    assert after.of("load/1/1") == pytest.approx(3.15e-3, rel=0.05)
    assert after.of("load/4/2") == pytest.approx(1e-3, rel=0.05)
    assert after.of("load/2/1") > 2 * before.of("load/2/1")  # never measured, but slower like the others


def test_nothing_measured_changes_nothing() -> None:
    assert fitted(prior(), [], []) == prior()
