"""Before the search: the user's input checked, memory summed up, the machine probed, the default run once, briefly."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from harness.hardware.memory import MemoryModel
from harness.hardware.nvml import read_gpus
from harness.measure.workload import Part, TokenRequest, Workload, cut, load_workload
from harness.probe import Probe, take_probe
from harness.search.measurer import Measurer
from harness.search.outcome import Kind, Measurement, Outcome
from harness.search.plan import PILOT, Sizes, choose_sizes, largest_sizes, num_pairs, timeout_s
from harness.search.space import Setting, Space
from harness.search.study import Study, open_storage, remembered
from harness.search.trial import TrialRunner, TrialSpec, Work, bare_process, measure
from runtime import machine
from runtime.errors import ExpertFlowError, UsageError
from runtime.facts import ModelFacts, describe
from runtime.files import check_writable
from runtime.model import read_tokenizer
from runtime.profile import LOSSY, Profile

_SETUP_TIMEOUT_S = 900.0


class TuneError(ExpertFlowError):
    """Nothing can be tuned: not even the default configuration runs."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        label: short name of the model. folder: of the run. profile: where the profile goes.
        num_trials: most trials, those before a resume among them; None: as many as the budget holds.
        context: tokens of the longest sequence that there must be memory for.
        fixed: dotted profile keys that are not searched.
    """

    model: str
    label: str
    command: str
    folder: Path
    profile: Path
    max_memory_bytes: int | None
    budget_s: float
    num_trials: int | None
    seed: int
    resume: bool
    workload: Path | None
    concurrency: int
    context: int
    fixed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What the search stands on. `default_s` is about how long the default takes for one run."""

    settings: Settings
    facts: ModelFacts
    base: Profile
    workload: Workload
    texts: Texts
    memory: MemoryModel
    memory_limit_bytes: int
    probe: Probe
    sizes: Sizes
    space: Space
    default_s: float

    def open_study(self) -> Study:
        """The run's study: a new one, or the one that is resumed."""
        settings = self.settings
        identity = {
            "model": self.facts.identity.model_dump(),
            "workload": self.workload.sha256,
            "concurrency": settings.concurrency,
            "context": settings.context,
            "max_memory_bytes": settings.max_memory_bytes,
            "fixed": dict(settings.fixed),
            "hardware": machine.fingerprint(),
        }
        limit = settings.max_memory_bytes
        study = Study(
            settings.folder, self.space, identity, max_memory_bytes=limit, seed=settings.seed, resume=settings.resume
        )
        study.remember("sizes", asdict(self.sizes))
        study.remember("setting", asdict(self.space.setting))
        study.remember("default_s", self.default_s)
        return study

    def measurer(self) -> Measurer:
        """What runs configurations; its trials log to the run's folder."""
        settings = self.settings
        return Measurer(
            TrialRunner(settings.folder / "trials.log"),
            settings.model,
            self.space,
            settings.fixed,
            self.texts.requests(self.sizes),
            settings.concurrency,
            timeout_s(self.default_s),
            self._excess,
        )

    def outlook(self) -> str:
        """What is going to happen and how long it takes, for people."""
        settings, budget_s = self.settings, self.settings.budget_s
        confirm_s = num_pairs(2 * self.default_s, budget_s) * 2 * self.default_s
        end = datetime.datetime.now() + datetime.timedelta(seconds=budget_s + confirm_s)
        trials = f"{settings.num_trials} trials, " if settings.num_trials is not None else ""
        return (
            f"search     {self.space.size()} configurations of {', '.join(knob.name for knob in self.space.knobs)}\n"
            f"run        {self.sizes}, {settings.concurrency} outstanding, about {self.default_s:.0f} s by default\n"
            f"time       {trials}at most {budget_s:.0f} s, then at most {confirm_s:.0f} s to confirm: "
            f"done by about {end:%H:%M}"
        )

    def _excess(self, slots: int, group: int) -> str:
        """The sum that says that a configuration will not fit, empty where it will."""
        predicted = self.memory.predict(slots, group)
        if predicted.total_bytes <= self.memory_limit_bytes:
            return ""
        return f"not launched: {predicted.describe()}, limit {machine.format_bytes(self.memory_limit_bytes)}"


class Texts:
    """A workload in tokens of one model."""

    def __init__(self, workload: Workload, model: str) -> None:
        self._workload, self._model = workload, model

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers.utils import logging

        logging.set_verbosity_error()  # texts longer than the model's context are cut anyway
        tokenizer = read_tokenizer(self._model)
        return cache(lambda text, **options: tokenizer(text, **options))  # every text is cut several times

    def requests(self, sizes: Sizes) -> dict[Part, tuple[TokenRequest, ...]]:
        """Both parts. Raises WorkloadError when one has too little text."""
        return {
            part: cut(self._workload, self._tokenizer, part=part, **asdict(sizes)) for part in ("search", "confirm")
        }


def prepare(settings: Settings) -> Setup:
    """Check everything that the user gave, then probe; prints what it finds and writes no file.

    Raises:
        ExpertFlowError: something cannot be used, or the default does not run.
    """
    kept = _kept(settings)
    check_writable("--profile-out", settings.profile)
    check_writable("--out", settings.folder / "trials.csv")
    base = Profile.default().with_overrides({"workload.context": settings.context, **settings.fixed})
    if base.numerics in LOSSY:
        raise UsageError(
            f"numerics {base.numerics!r} changes results, and every trial must give those of the default: tune without "
            "it, then measure its cost: python -m harness.quality"
        )
    facts = describe(settings.model)
    workload = load_workload(settings.workload)
    texts = Texts(workload, settings.model)
    texts.requests(largest_sizes(settings.concurrency))
    with tempfile.TemporaryDirectory() as scratch:
        runner = TrialRunner(Path(scratch) / "setup.log")
        process_bytes = _must(runner, bare_process, None)["resident_bytes"]
        memory = MemoryModel.of(facts, process_bytes=process_bytes, context=settings.context)
        limit_bytes = min(settings.max_memory_bytes or 1 << 62, process_bytes + machine.available_memory_bytes())
        num_slots_fit = memory.slots_that_fit(limit_bytes, base.scheduler.group)
        probe = take_probe(settings.model, facts, read_gpus(), io_threads=base.transfer.io_threads)
        needs = memory.predict(num_slots_fit, base.scheduler.group)
        print(probe.describe())
        print(
            f"model      {facts.identity.architecture}, {num_slots_fit} of {memory.num_experts} experts fit", flush=True
        )
        print(f"needs      {needs.describe()} of {machine.format_bytes(limit_bytes)}", flush=True)
        if not kept:
            kept = _pilot(
                runner, settings, base, texts, Setting(memory.num_experts, num_slots_fit, settings.concurrency)
            )
    space = Space(Setting(**kept["setting"]), base, fixed=settings.fixed)
    sizes, default_s = Sizes(**kept["sizes"]), float(kept["default_s"])
    return Setup(settings, facts, base, workload, texts, memory, limit_bytes, probe, sizes, space, default_s)


def _kept(settings: Settings) -> dict[str, Any]:
    """What the run to be resumed decided; nothing for a new one."""
    if settings.resume:
        return remembered(settings.folder)
    if settings.folder.exists():
        open_storage(settings.folder, resume=False)
    return {}


def _pilot(runner: TrialRunner, settings: Settings, base: Profile, texts: Texts, setting: Setting) -> dict[str, Any]:
    """Run the default on one short request: how much of the workload there is time for, and whether it can prefetch."""
    overrides = {**settings.fixed, **Space(setting, base, fixed=settings.fixed).overrides({})}
    spec = TrialSpec(settings.model, overrides, texts.requests(PILOT)["search"], concurrency=1)
    pilot = Outcome(Kind.OK, result=_must(runner, measure, spec)).measurement
    sizes, default_s = choose_sizes(pilot, settings.concurrency, settings.budget_s)
    can_prefetch = setting.can_prefetch and not _lacks_predictor(pilot)
    return {
        "sizes": asdict(sizes),
        "setting": {**asdict(setting), "can_prefetch": can_prefetch},
        "default_s": default_s,
    }


def _lacks_predictor(pilot: Measurement) -> bool:
    """The engine says so in a note when a model's routers cannot be asked ahead."""
    return any("gate_lookahead is not available" in note for note in pilot.notes)


def _must(runner: TrialRunner, work: Work, argument: Any) -> dict[str, Any]:
    outcome = runner.run(work, argument, _SETUP_TIMEOUT_S)
    if outcome.kind is not Kind.OK or outcome.result is None:
        raise TuneError(f"the default configuration does not run, so there is nothing to tune: {outcome.message}")
    return outcome.result
