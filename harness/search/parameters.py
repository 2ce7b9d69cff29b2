"""Knobs as parameters of Optuna's trials."""

from __future__ import annotations

from typing import Any

from harness.search.space import Knob, Params, Space, Value

_INDEX = "_index"


def suggested(space: Space, trial: Any, *, is_flat: bool) -> dict[str, Value]:
    """The configuration that an open trial of Optuna proposes.

    Args:
        is_flat: ask for every knob in every trial, also for those that do not act, as samplers need it that model all
            parameters at once: they leave out what is not in every trial.
    """
    if is_flat:
        picked = {knob.name: _suggest(trial, knob) for knob in space.knobs}
        return space.choose(lambda knob: picked[knob.name])
    return space.choose(lambda knob: _suggest(trial, knob))


def encoded(space: Space, params: Params, *, is_flat: bool) -> dict[str, Value]:
    """A configuration as the parameters of a trial."""
    return {
        _parameter(knob): knob.choices.index(value) if _is_indexed(knob) else value
        for knob in space.knobs
        if is_flat or knob.name in params
        for value in (params.get(knob.name, knob.default),)
    }


def knob_name(parameter: str) -> str:
    """Of the knob that a parameter of a trial stands for."""
    return parameter.removesuffix(_INDEX)


def _suggest(trial: Any, knob: Knob) -> Value:
    if not knob.is_ordered:
        return str(trial.suggest_categorical(knob.name, knob.choices))
    if _is_indexed(knob):
        index = int(trial.suggest_int(_parameter(knob), 0, len(knob.choices) - 1))
        return knob.choices[index]
    return int(trial.suggest_int(knob.name, int(knob.choices[0]), int(knob.choices[-1])))


def _parameter(knob: Knob) -> str:
    """Ordered choices that are no range of integers, such as 1, 2, 4, 8, are searched by index."""
    return f"{knob.name}{_INDEX}" if _is_indexed(knob) else knob.name


def _is_indexed(knob: Knob) -> bool:
    return knob.is_ordered and list(knob.choices) != list(range(int(knob.choices[0]), int(knob.choices[-1]) + 1))
