"""The folder of a run (trials.csv, pareto.csv, pareto.png, environment.json beside the journal), and the profile."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from harness.hardware.memory import MemoryModel
from harness.report.plots import pareto_png
from harness.report.profiles import commit, evidence, match, near, objectives, provenance, tuned, versions
from harness.report.tables import front_table, trials_table
from harness.search.loop import Choice
from harness.search.outcome import Measurement, Tried, feasible, front
from harness.search.setup import Setup
from harness.search.space import Params
from harness.search.study import Study
from runtime import machine
from runtime.files import write_atomic
from runtime.profile import Profile, Workload, save_profile


def write_run(setup: Setup, study: Study, choice: Choice | None, stop_reason: str) -> pd.DataFrame:
    """Write what was measured so far, each file wholly or not at all; the Pareto table and the default's row."""
    folder, space = setup.settings.folder, setup.space
    tried = study.tried()
    chosen = choice.params if choice is not None else best_so_far(study)
    default = next((one for one in tried if one.params == space.default), None)
    best = front(feasible(tried, study.max_memory_bytes))
    shown = [*best, *([] if default is None or default in best else [default])]
    table = front_table(shown, space, default, chosen or {})
    write_atomic(folder / "trials.csv", trials_table(study.records(), space).to_csv(index=False))
    write_atomic(folder / "pareto.csv", table.head(len(best)).to_csv(index=False))
    write_atomic(folder / "environment.json", json.dumps(_environment(setup, study, choice, stop_reason), indent=2))
    if tried:
        limit = study.max_memory_bytes
        write_atomic(folder / "pareto.png", pareto_png(tried, space.default, chosen or {}, limit))
    return table


def best_so_far(study: Study) -> Params | None:
    """The fastest configuration within the limit, unconfirmed; None while the default was not measured."""
    within = feasible(study.tried(), study.max_memory_bytes)
    return within[0].params if any(one.params == study.space.default for one in within) else None


def write_profile(setup: Setup, study: Study, choice: Choice, path: Path) -> Profile:
    """Write the profile of the choice to `path`."""
    settings, space, confirmation = setup.settings, setup.space, choice.confirmation
    values = space.complete(choice.params)
    runs, baseline = _runs(study, choice)
    proof = evidence(
        study.records(),
        baseline,
        confirmation,
        seed=settings.seed,
        memory_model_error=_memory_error(setup, values, runs),
    )
    profile = tuned(
        setup.base,
        space.overrides(choice.params),
        fixed=tuple(settings.fixed),
        max_memory_bytes=settings.max_memory_bytes,
        workload=Workload(
            name=setup.workload.name,
            sha256=setup.workload.sha256,
            concurrency=settings.concurrency,
            context=settings.context,
        ),
        measured=objectives(runs),
        proof=proof,
        where=match(setup.facts.identity, setup.probe.curve.engine_bytes_per_s),
        origin=provenance(settings.model, settings.command),
    )
    save_profile(profile, path)
    return profile


def _runs(study: Study, choice: Choice) -> tuple[tuple[Measurement, ...], tuple[Measurement, ...]]:
    """Runs of the choice and of the default: side by side on the confirming text, else the search's."""
    confirmation, default = choice.confirmation, study.space.default
    if confirmation is not None and confirmation.ratio is not None:
        chosen = confirmation.default if choice.params == default else confirmation.finalist
        return chosen, confirmation.default
    by_params = {_frozen(one): one.runs for one in study.tried()}
    return by_params[_frozen(choice.params)], by_params.get(_frozen(default), ())


def _frozen(params: Tried | Params) -> frozenset[tuple[str, Any]]:
    return frozenset((params.params if isinstance(params, Tried) else params).items())


def _memory_error(setup: Setup, values: Params, runs: tuple[Measurement, ...]) -> float | None:
    """Measured over predicted peak minus 1, at the context that was measured."""
    measured = max(run.peak_memory_bytes for run in runs)
    predicted = _at_context(setup.memory, setup.settings.context, setup.sizes.context).predict(
        int(values["slots"]), int(values["group"])
    )
    return round(measured / predicted.total_bytes - 1, 4)


def _at_context(memory: MemoryModel, context: int, measured: int) -> MemoryModel:
    fields = asdict(memory)
    return MemoryModel(**{**fields, "kv_bytes_per_sequence": memory.kv_bytes_per_sequence * measured // context})


def _environment(setup: Setup, study: Study, choice: Choice | None, stop_reason: str) -> dict[str, Any]:
    settings = setup.settings
    return {
        "command": settings.command,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "hardware": machine.fingerprint(),
        "model": near(settings.model),
        "identity": setup.facts.identity.model_dump(),
        "workload": {"name": setup.workload.name, "sha256": setup.workload.sha256, **asdict(setup.sizes)},
        "concurrency": settings.concurrency,
        "seed": settings.seed,
        "study": study.name,
        "stop_reason": stop_reason,
        "memory_limit_bytes": setup.memory_limit_bytes,
        "probe": setup.probe.as_dict(),
        "choice": None
        if choice is None
        else {
            "params": dict(choice.params),
            "reason": choice.reason,
            "drift": choice.drift,
            "confirmation": None if choice.confirmation is None else choice.confirmation.as_dict(),
        },
    }
