"""From the parts of the tuner to the values that its outputs are made of."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from harness.report.profiles import match, objectives, provenance
from harness.report.results import Results
from harness.report.run_file import Confirmed, Point, Run, RunFile, count_outcomes
from harness.search.agreement import Agreement, agreement, foretold
from harness.search.confirm import Confirmation
from harness.search.loop import Choice
from harness.search.objective import Objective
from harness.search.outcome import Measurement, Tried, feasible
from harness.search.setup import Settings, Setup
from harness.search.space import Params, Space, params_key
from harness.search.study import Study
from runtime import profile


def collect(
    setup: Setup,
    study: Study,
    choice: Choice | None,
    stop_reason: str,
) -> Results:
    """Everything that the outputs need, from the parts of the tuner.

    Args:
        choice: None before there is one: the best so far stands for it.
    """
    records, tried = study.records(), study.tried()
    simulated = foretold(records)
    agreed = agreement(simulated, tried)
    run = _run_file(setup, study, choice, stop_reason, agreed)
    return Results(
        folder=setup.settings.folder,
        run=run,
        records=records,
        tried=tried,
        space=study.space,
        simulated=simulated,
        importances=study.importances(),
        environment=_environment(setup, study, choice, run, agreed),
        again=resume_command(setup.settings),
    )


def best_so_far(study: Study, objective: Objective) -> Params | None:
    """The best configuration within the limits, unconfirmed; None while nothing was measured within them."""
    within = feasible(study.tried(), study.limits)
    default = next((one for one in within if one.params == study.space.default), None)
    return next((one.params for one in objective.rank(within, default)), None)


def resume_command(settings: Settings) -> str:
    """The command that goes on with the run."""
    words = shlex.split(settings.command)
    has_out = any(word == "--out" or word.startswith("--out=") for word in words)
    out = [] if has_out else ["--out", str(settings.folder)]
    return shlex.join([*words, *out, *([] if "--resume" in words else ["--resume"])])


def _run_file(setup: Setup, study: Study, choice: Choice | None, stop_reason: str, agreed: Agreement | None) -> RunFile:
    settings, space, tried = setup.settings, study.space, study.tried()
    confirmed = None if choice is None else _confirmed(choice.confirmation, tried, space.default)
    best = best_so_far(study, settings.objective)
    chosen = best if choice is None else choice.params
    nothing = "nothing was measured that can be used" if best is None else "the best so far, unconfirmed"
    return RunFile(
        base=setup.base,
        num_experts=space.setting.num_experts,
        fixed=tuple(settings.fixed),
        objective=settings.objective,
        limits=study.limits,
        workload=profile.Workload(
            name=setup.workload.name,
            sha256=setup.workload.sha256,
            concurrency=settings.concurrency,
            context=settings.context,
            **asdict(setup.sizes),
        ),
        match=match(setup.facts.identity, setup.bandwidth_bytes_per_s, settings.gpu),
        provenance=provenance(settings.model, settings.command, settings.hardware),
        default=space.default,
        chosen=None if chosen is None else dict(chosen),
        reason=nothing if choice is None else choice.reason,
        drift=None if choice is None else choice.drift,
        stop_reason=stop_reason,
        seed=settings.seed,
        outcomes=count_outcomes(study.records()),
        simulator_rank_correlation=None if agreed is None else round(agreed.rank_correlation, 3),
        points=tuple(_point(one, space, setup.guard.error_of(one)) for one in tried),
        confirmed=confirmed,
        failed=() if choice is None or choice.confirmation is None else tuple(map(dict, choice.confirmation.failed)),
    )


def _point(one: Tried, space: Space, memory_model_error: float) -> Point:
    return Point(
        params=dict(one.params),
        values=space.complete(one.params),
        overrides=space.overrides(one.params),
        runs=tuple(Run.of(run) for run in one.runs),
        memory_model_error=round(memory_model_error, 4),
    )


def _confirmed(found: Confirmation | None, tried: Sequence[Tried], default: Params) -> Confirmed | None:
    """Figures of both; their peaks are the highest that was seen, in the search too: they are promises."""
    if found is None or found.ratio is None:
        return None
    searched = {params_key(one.params): one.runs for one in tried}

    def figures(params: Params, runs: Sequence[Measurement]) -> profile.Objectives:
        known = [*runs, *searched.get(params_key(params), ())]
        return objectives(runs).model_copy(update={"peak_memory_bytes": max(run.peak_memory_bytes for run in known)})

    ratio = found.ratio
    return Confirmed(
        params=dict(found.params),
        objectives=figures(found.params, found.finalist),
        baseline=figures(default, found.default),
        ratio=profile.Ratio(estimate=ratio.estimate, low=ratio.low, high=ratio.high, confidence=found.confidence),
        pairs=len(found.default),
        is_proven=found.is_proven,
    )


def _environment(
    setup: Setup, study: Study, choice: Choice | None, run: RunFile, agreed: Agreement | None
) -> dict[str, Any]:
    settings, origin = setup.settings, run.provenance
    confirmation = None if choice is None else choice.confirmation
    return {
        "command": settings.command,
        "written": origin.created,
        "commit": origin.commit,
        "versions": origin.versions,
        "hardware": origin.hardware,
        "model": origin.model,
        "identity": setup.facts.identity.model_dump(),
        "workload": {"name": setup.workload.name, "sha256": setup.workload.sha256, **asdict(setup.sizes)},
        "concurrency": settings.concurrency,
        "objective": str(run.objective),
        "limits": asdict(run.limits),
        "seed": run.seed,
        "study": study.name,
        "stop_reason": run.stop_reason,
        "memory_limit_bytes": setup.memory_limit_bytes,
        "gpu": None if settings.gpu is None else asdict(settings.gpu),
        "host_bytes": setup.host_bytes,
        "probe": setup.probe.as_dict(),
        "simulator": None
        if agreed is None
        else {"rank_correlation": agreed.rank_correlation, "median_error": agreed.median_error},
        "chosen": run.chosen,
        "reason": run.reason,
        "drift": run.drift,
        "confirmation": None if confirmation is None else confirmation.as_dict(),
    }
