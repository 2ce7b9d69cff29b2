"""What a run leaves: its folder (tables, plots, page, `run.json`, `environment.json`), its profile, and a summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from harness.report import plots
from harness.report.messages import asked_text, verdict_text
from harness.report.page import page
from harness.report.run_file import NAME, RunFile
from harness.report.tables import front_table, front_text, trials_table, with_marked
from harness.report.text_plot import text_pareto
from harness.search.agreement import agreement
from harness.search.outcome import Record, Tried, feasible, front
from harness.search.space import Params, Space, params_key
from runtime.errors import ExpertFlowError
from runtime.files import write_atomic
from runtime.profile import Profile, dump_profile


class ResultsError(ExpertFlowError):
    """What was found could not be written."""


@dataclass(frozen=True)
class Results:
    """A finished or interrupted search, in values.

    Attributes:
        simulated: latency in ms that was foretold of a configuration before it ran.
        importances: of each objective, the share of each knob.
        again: the command that goes on with the run.
    """

    folder: Path
    run: RunFile
    records: Sequence[Record]
    tried: Sequence[Tried]
    space: Space
    simulated: Sequence[tuple[Params, float]]
    importances: dict[str, dict[str, float]]
    environment: dict[str, Any]
    again: str

    @cached_property
    def front(self) -> list[Tried]:
        """The configurations within the limits that no other beats in both objectives."""
        return front(feasible(self.tried, self.run.limits))

    @cached_property
    def table(self) -> pd.DataFrame:
        """The front, and the default and the chosen configuration where they are not on it."""
        default, chosen = self._marked()
        return front_table(with_marked(self.front, default, chosen), default, self.run.chosen, self.space.complete)

    def text(self) -> str:
        """For the terminal: the plot, the table and the verdict."""
        drawn = text_pareto(self.tried, self.run.limits, *self._marked(), memory=self.run.memory)
        default = self.space.complete(self.space.default)
        table = front_text(self.table, default, self.space.setting.num_experts, memory=self.run.memory)
        return "\n\n".join(part for part in (drawn, table, verdict_text(self.run)) if part)

    def figures(self) -> dict[str, Figure]:
        """By name, those that there is something to show for."""
        limits, agreed = self.run.limits, agreement(self.simulated, self.tried)
        found: dict[str, Figure] = {}
        if self.tried:
            found["pareto"] = plots.pareto(self.tried, limits, *self._marked(), memory=self.run.memory)
        if any(not record.reused for record in self.records):
            found["history"] = plots.history(self.records, limits)
        if self.importances:
            found["importance"] = plots.importance(self.importances)
        if agreed is not None:
            found["simulated"] = plots.simulated(agreed)
        return found

    def _marked(self) -> tuple[Tried | None, Tried | None]:
        """The default and the chosen configuration, as far as they were measured."""
        by_params = {params_key(one.params): one for one in self.tried}
        chosen = self.run.chosen
        return (
            by_params.get(params_key(self.space.default)),
            None if chosen is None else by_params.get(params_key(chosen)),
        )


def write_run(results: Results) -> None:
    """Write the folder, each file wholly or not at all.

    Raises:
        ResultsError: a file could not be written; it says which, and how to write again.
    """
    drawn = results.figures()
    trials = trials_table(results.records, results.space, results.run.limits, results.simulated)
    front_rows = results.table.head(len(results.front))
    files: dict[str, str | bytes] = {
        NAME: results.run.to_json(),
        "environment.json": json.dumps(results.environment, indent=2) + "\n",
        "trials.csv": trials.to_csv(index=False),
        "pareto.csv": front_rows.to_csv(index=False),
        "report.html": page(
            title=f"Tuning run {results.folder.name}",
            verdict=f"{asked_text(results.run)}\n{verdict_text(results.run)}",
            command=results.environment["command"],
            figures=drawn,
            front=results.table,
            trials=trials.drop(columns="tokens_sha256", errors="ignore"),
            environment=results.environment,
        ),
    }
    for name, data in (files | {f"{name}.png": plots.png(figure) for name, figure in drawn.items()}).items():
        _write(results, results.folder / name, data)


def write_profile(results: Results, path: Path) -> Profile:
    """Write the profile of the chosen configuration.

    Raises:
        ResultsError: as `write_run`.
        ValueError: nothing was chosen.
    """
    point = results.run.point(results.run.chosen)
    if point is None:
        raise ValueError("a profile needs a configuration that was measured")
    found = results.run.profile(point)
    _write(results, path, dump_profile(found))
    return found


def summary(results: Results, profile_path: Path | None) -> dict[str, Any]:
    """The last line of the tuner, for programs; what was not found is null."""
    run = results.run
    point = run.point(run.chosen)
    figures = None if point is None else run.figures(point)
    ratio = None if figures is None else figures.ratio
    return {
        "profile": None if profile_path is None else str(profile_path),
        "run": str(results.folder),
        "chosen": None if point is None else point.overrides,
        "is_default": run.chosen == run.default,
        "reason": run.reason,
        "drift": run.drift,
        "objectives": None if figures is None else figures.objectives.model_dump(),
        "baseline": None if figures is None or figures.baseline is None else figures.baseline.model_dump(),
        "ratio": None if ratio is None else ratio.model_dump(),
        "objective": str(run.objective),
        "limits": asdict(run.limits),
        "trials": run.outcomes,
        "simulator_rank_correlation": run.simulator_rank_correlation,
        "stop_reason": run.stop_reason,
    }


def _write(results: Results, path: Path, data: str | bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        raise ResultsError(
            f"{path}: cannot be written: {error.strerror or error}; every trial is safe in the study, so make room and "
            f"write again with: {results.again}"
        ) from error
