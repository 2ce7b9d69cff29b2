"""`run.json`: what a finished search found, with everything that a profile of any of its configurations needs.

`harness.pick` reads nothing else: no study, no model, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.report.profiles import objectives
from harness.search.objective import Objective
from harness.search.outcome import OUT_OF_MEMORY, Kind, Limits, Measurement, Record, Tried
from harness.search.space import Params, Value
from runtime.errors import ProfileError, UsageError
from runtime.profile import Evidence, Match, Objectives, Profile, Provenance, Ratio, Workload
from runtime.profile import Limits as ProfileLimits

NAME = "run.json"
_KEPT_STATS = ("hit_rate", "bytes_per_token")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Run(_Part):
    """One measurement of a configuration, as in `harness.search.outcome.Measurement`."""

    latency_ms_p50: float = Field(gt=0)
    ttft_ms_p50: float
    tpot_ms_p50: float | None = None
    tokens_per_s: float
    tokens_sha256: str
    peak_memory_bytes: int = Field(gt=0)
    slots: int
    load_s: float
    run_s: float
    num_tokens: int
    stats: dict[str, Any] = {}

    @classmethod
    def of(cls, measured: Measurement) -> Run:
        """With the counters that a profile holds."""
        fields = {name: getattr(measured, name) for name in cls.model_fields}
        return cls(**{**fields, "stats": {name: measured.stats.get(name) for name in _KEPT_STATS}})

    def measurement(self) -> Measurement:
        """As the search has it."""
        return Measurement(**self.model_dump())


class Point(_Part):
    """One configuration that ran: knobs that act, every knob, what it sets in a profile, and its runs in the search."""

    params: dict[str, Value]
    values: dict[str, Value]
    overrides: dict[str, Any]
    runs: tuple[Run, ...] = Field(min_length=1)
    memory_model_error: float | None = None

    @property
    def objectives(self) -> Objectives:
        """From the search."""
        return objectives([run.measurement() for run in self.runs])


class Confirmed(_Part):
    """The configuration that was measured beside the default on text that the search had not seen."""

    params: dict[str, Value]
    objectives: Objectives
    baseline: Objectives
    ratio: Ratio
    pairs: int
    is_proven: bool


class Figures(NamedTuple):
    """Of a configuration, of the default beside it (None: it did not run), and the ratio of `pairs` pairs of them."""

    objectives: Objectives
    baseline: Objectives | None
    ratio: Ratio | None = None
    pairs: int | None = None


class RunFile(_Part):
    """The whole file.

    `base` is the profile that a configuration's overrides are put upon; `failed` are finalists that did not get to the
    end on the text kept for confirming.
    """

    schema_version: Literal[1] = 1
    kind: Literal["expertflow-tuning-run"] = "expertflow-tuning-run"
    base: Profile
    num_experts: int = Field(gt=0)
    fixed: tuple[str, ...]
    objective: Objective
    limits: Limits
    workload: Workload
    match: Match
    provenance: Provenance
    default: dict[str, Value]
    chosen: dict[str, Value] | None = None
    reason: str
    drift: float | None = None
    stop_reason: str
    seed: int
    outcomes: dict[str, int]
    simulator_rank_correlation: float | None = None
    points: tuple[Point, ...]
    confirmed: Confirmed | None = None
    failed: tuple[dict[str, Value], ...] = ()

    @property
    def memory(self) -> str:
        """Which memory the limit and the peaks are of, for people."""
        return "memory" if self.match.gpu is None else "GPU memory"

    def point(self, params: Params | None) -> Point | None:
        """The configuration that ran with `params`, if any did."""
        return next((point for point in self.points if point.params == params), None)

    def tried(self, point: Point) -> Tried:
        """A configuration with its latency from the search, and the worst that is known of what limits are set on."""
        known = self.figures(point).objectives
        worst = {
            name: max(values)
            for name in ("peak_memory_bytes", "ttft_ms_p50", "tpot_ms_p50")
            if (values := [value for one in (known, *point.runs) if (value := getattr(one, name)) is not None])
        }
        return Tried(point.params, tuple(replace(run.measurement(), **worst) for run in point.runs))

    def profile(self, point: Point, *, limits: Limits | None = None, provenance: Provenance | None = None) -> Profile:
        """The profile of a configuration, with what is known about it and nothing else.

        Figures and ratio are those of the confirmation where the configuration took part in it, else of the search.

        Args:
            limits, provenance: others than the run's.
        """
        asked = ProfileLimits(**asdict(self.limits if limits is None else limits))
        figures = self.figures(point)
        evidence = Evidence(
            baseline=figures.baseline,
            ratio=figures.ratio,
            pairs=figures.pairs,
            trials=num_launched(self.outcomes),
            oom=sum(self.outcomes.get(kind, 0) for kind in OUT_OF_MEMORY),
            seed=self.seed,
            simulator_rank_correlation=self.simulator_rank_correlation,
            memory_model_error=point.memory_model_error,
        )
        return self.base.with_overrides(point.overrides).model_copy(
            update={
                "match": self.match,
                "workload": self.workload,
                "limits": asked if asked.model_dump(exclude_none=True) else None,
                "fixed": self.fixed,
                "objectives": figures.objectives,
                "evidence": evidence,
                "provenance": provenance or self.provenance,
            }
        )

    def figures(self, point: Point) -> Figures:
        """What is known about a configuration."""
        if (found := self.confirmed) is not None:
            if point.params == self.default:
                return Figures(found.baseline, found.baseline)
            if point.params == found.params:
                return Figures(found.objectives, found.baseline, found.ratio, found.pairs)
        default = self.point(self.default)
        return Figures(point.objectives, None if default is None else default.objectives)

    def to_json(self) -> str:
        """The content of the file."""
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"


def load_run(folder: Path) -> RunFile:
    """Read the file of a run's folder, or the file itself.

    Raises:
        UsageError: there is none, it cannot be read, or it is not one, with the first thing that is wrong.
    """
    path = folder / NAME if folder.is_dir() else folder
    try:
        return RunFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(
            f"--run {folder}: holds no {NAME} that can be read ({error.strerror}); name the folder that harness.tune "
            "wrote, such as results/runs/MODEL-TIME"
        ) from error
    except ProfileError as error:
        raise UsageError(f"--run {folder}: {path.name}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(
            f"--run {folder}: {path.name} is damaged or of another version: {where}: {first['msg']}"
        ) from error


def count_outcomes(records: Sequence[Record]) -> dict[str, int]:
    """Trials by how they ended, in the order of `Kind`; repeats that were answered from memory are left out."""
    ended = [record.outcome.kind for record in records if not record.reused]
    return {str(kind): ended.count(kind) for kind in Kind if kind in ended}


def num_launched(outcomes: dict[str, int]) -> int:
    """Trials of `count_outcomes` that ran."""
    return sum(number for kind, number in outcomes.items() if kind != Kind.TOO_LARGE)
