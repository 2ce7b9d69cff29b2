"""What things take on this machine: a small set of physical coefficients, guessed from the probe and fitted to trials.

A coefficient has a path, from what it is about to what sets it apart: `token/prefill/2` is the dense work of one prompt
token in one layer with two threads. Coefficients that share the beginning of their path share, in the fit, what is
wrong with the guess: one measured trial moves all of them, many tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

Floats = npt.NDArray[np.float64]

IO_THREADS = (1, 2, 4)
# Python and small operators, of any model.
_PASS_S, _LAYER_S, _PLAN_S, _FORECAST_S, _PREFETCH_S = 1e-3, 3e-4, 5e-4, 1e-4, 5e-5
_SLOWDOWN, _COLD = 0.1, 0.2
_MAX_FALL = 2.0


@dataclass(frozen=True)
class Costs:
    """Coefficients of the simulator.

    Attributes:
        seconds: by path. `load/IO/THREADS` one expert with so many I/O and compute threads, `cold/THREADS` one more of
            the first loads after the link was idle · `pass/PHASE` a pass beside
            its layers · `layer/PHASE/THREADS` a layer step beside its experts · `token/PHASE/THREADS` what each of its
            tokens adds · `plan/SCHEDULER` choosing a pass by routes · `forecast/PREDICTOR` a forecast for one layer ·
            `prefetch/layer` acting on it.
        experts: by `KERNEL/THREADS`, seconds of one expert by the tokens that it is computed for.
        ratios: `expert/KERNEL/THREADS` what those have to be multiplied by · `slowdown/THREADS` by what share computing
            takes longer while an expert is being loaded.
    """

    seconds: Mapping[str, float]
    experts: Mapping[str, Mapping[int, float]]
    ratios: Mapping[str, float]

    @classmethod
    def prior(
        cls,
        load_s: Mapping[int, float],
        expert_times: Iterable[tuple[str, int, int, float]],
        *,
        dense_layer_experts: float,
        threads: Sequence[int] = (1,),
        predictors: Sequence[str] = ("gate_lookahead",),
    ) -> Costs:
        """A guess from what a probe measures.

        Args:
            load_s: of one expert, by I/O threads; at least one entry.
            expert_times: kernel, threads, tokens and seconds of one expert; at least one.
            dense_layer_experts: dense parameters of a layer (all that is no expert), in experts.
            threads: of computing, that will be asked about.
        """
        curves: dict[str, dict[int, float]] = {}
        for kernel, count, num_tokens, seconds in expert_times:
            curves.setdefault(f"{kernel}/{count}", {})[num_tokens] = seconds
        costs = cls({}, {key: _plausible(curve) for key, curve in curves.items()}, {})
        found = {f"forecast/{name}": _FORECAST_S for name in predictors}
        found |= {"prefetch/layer": _PREFETCH_S, "plan/route_overlap": _PLAN_S}
        for io_threads in IO_THREADS:
            found |= {f"load/{io_threads}/{count}": _nearest(load_s, io_threads) for count in threads}
        found |= {f"cold/{count}": _COLD * _nearest(load_s, IO_THREADS[0]) for count in threads}
        for phase in ("prefill", "decode"):
            found[f"pass/{phase}"] = _PASS_S
            for count in threads:
                one, many = costs.expert_s("eager", count, np.array([1, 65])).tolist()
                found[f"layer/{phase}/{count}"] = _LAYER_S + dense_layer_experts * one
                found[f"token/{phase}/{count}"] = dense_layer_experts * max((many - one) / 64, 1e-3 * one)
        ratios = {f"expert/{key}": 1.0 for key in costs.experts} | {f"slowdown/{count}": _SLOWDOWN for count in threads}
        return replace(costs, seconds=found, ratios=ratios)

    def known(self, path: str) -> str:
        """`path`, or that of the nearest coefficient that there is."""
        return closest(path, self.ratios if path.startswith(("expert/", "slowdown/")) else self.seconds)

    def of(self, path: str) -> float:
        """A coefficient, or the nearest one."""
        known = self.known(path)
        return self.ratios[known] if known in self.ratios else self.seconds[known]

    def expert_s(self, kernel: str, threads: int, num_tokens: npt.NDArray[np.int64]) -> Floats:
        """Seconds of one expert for each number of tokens, before `ratios`: between points, and along the last two."""
        key = closest(f"{kernel}/{threads}", self.experts)
        tokens, seconds = (np.array(list(of), np.float64) for of in zip(*self.experts[key].items(), strict=True))
        found = np.interp(num_tokens, tokens, seconds)
        beyond = np.maximum(num_tokens - tokens[-1], 0)
        slope = (seconds[-1] - seconds[-2]) / (tokens[-1] - tokens[-2]) if len(tokens) > 1 else seconds[-1] / tokens[-1]
        return np.asarray(found + max(slope, 0.0) * beyond, np.float64)


def closest(path: str, known: Mapping[str, object]) -> str:
    """`path`, else the known one with the nearest last number and, if it can be, the same beginning."""
    if path in known:
        return path
    start, _, number = path.rpartition("/")

    def distance(other: str) -> tuple[int, float, str]:
        other_start, _, other_number = other.rpartition("/")
        parts = sum(a == b for a, b in zip(start.split("/"), other_start.split("/"), strict=False))
        is_number = number.isdigit() and other_number.isdigit()
        return -parts, abs(np.log(int(number) / int(other_number))) if is_number else 0.0, other

    return min(known, key=distance)


def _plausible(curve: Mapping[int, float]) -> dict[int, float]:
    """Seconds by ascending tokens, without those that another process disturbed: threads that wait for one which does
    not run cost a hundredfold. Fewer tokens may take longer, where torch has another kernel for one, but not twice.
    """
    kept: dict[int, float] = {}
    for num_tokens, seconds in sorted(curve.items(), reverse=True):
        least = min(kept.values(), default=seconds)
        kept[num_tokens] = seconds if seconds <= _MAX_FALL * least else least
    return dict(sorted(kept.items()))


def _nearest(by_number: Mapping[int, float], number: int) -> float:
    return by_number[min(by_number, key=lambda other: abs(np.log(other / number)))]


class Row(NamedTuple):
    """One measured time: it was `measured_s`, which is `known_s` and, of each coefficient, so many units.

    `trial`: times of one trial are wrong together, where the machine was slower or faster than at other times.
    """

    units: Mapping[str, float]
    known_s: float
    measured_s: float
    trial: int


_SPREADS = (1.0, 0.6, 0.3, 0.3)  # of the logarithm of what is wrong with the guess, by length of the shared path
_NOISE, _TRIAL_NOISE = 0.03, 0.06  # of the logarithm of a measured time; of what those of one trial share


def fitted(costs: Costs, rows: Sequence[Row], loads: Sequence[Row]) -> Costs:
    """The coefficients that explain what was measured, near those of `costs` where that says little.

    Robust least squares of logarithms; each coefficient is multiplied by factors that it shares with others of its
    path, and every factor costs what it departs from 1.

    Args:
        rows: measured times of computing. loads: of loading, with the units of no other coefficients.
    """
    by_load = _factors(costs, loads)
    by_time = _factors(costs, rows)
    return replace(
        costs,
        seconds={
            path: value * (by_load if path.startswith(("load/", "cold/")) else by_time)[path]
            for path, value in costs.seconds.items()
        },
        ratios={path: value * by_time[path] for path, value in costs.ratios.items()},
    )


def _factors(costs: Costs, rows: Sequence[Row]) -> dict[str, float]:
    """What each coefficient has to be multiplied by."""
    everything = [*costs.seconds, *costs.ratios]
    shared = sorted({prefix for path in everything for prefix in _prefixes(path)})
    spreads = np.array([_SPREADS[len(prefix)] for prefix in shared])
    place = {prefix: number for number, prefix in enumerate(shared)}
    design = np.zeros((len(everything), len(shared)))
    for number, path in enumerate(everything):
        design[number, [place[prefix] for prefix in _prefixes(path)]] = 1.0
    if not rows:
        return dict.fromkeys(everything, 1.0)
    units = np.array([[row.units.get(path, 0.0) for path in everything] for row in rows])
    guess = np.array([costs.of(path) for path in everything])
    known_s, measured_s = np.array([row.known_s for row in rows]), np.array([row.measured_s for row in rows])
    _, trial = np.unique([row.trial for row in rows], return_inverse=True)

    def residuals(unknown: Floats) -> Floats:
        steps, of_trials = np.split(unknown, [len(shared)])
        found = units @ (guess * np.exp(design @ (steps * spreads))) + known_s
        off = np.log(measured_s / found) - _TRIAL_NOISE * of_trials[trial]
        return np.concatenate([_robust(off / _NOISE), _robust(of_trials), steps])

    start = np.zeros(len(shared) + int(trial.max()) + 1)
    steps = least_squares(residuals, start, max_nfev=60).x[: len(shared)]  # type: ignore[operator]
    return dict(zip(everything, np.exp(design @ (steps * spreads)).tolist(), strict=True))


def _prefixes(path: str) -> list[tuple[str, ...]]:
    """All coefficients but slowdowns share the first, that of everything: the speed of the machine."""
    parts = tuple(path.split("/"))
    return [parts[:length] for length in range(parts[0] == "slowdown", len(parts) + 1)]


def _robust(residuals: Floats) -> Floats:
    """Residuals whose squares grow linearly beyond 2 (Huber), so that a disturbed trial does not decide."""
    size = np.abs(residuals)
    return np.asarray(
        np.sign(residuals) * np.where(size <= 2, size, np.sqrt(np.maximum(4 * size - 4, 0.0))), np.float64
    )
