"""Before the search: the user's input checked, memory summed up, the machine probed, the default run once, briefly."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch

from harness.hardware.compute import CPU_KERNEL
from harness.hardware.memory import MemoryModel
from harness.hardware.nvml import gpu_state, read_gpus
from harness.hardware.readings import GpuState
from harness.measure.environment import Surroundings, lost_of
from harness.measure.workload import Part, TokenRequest, Workload, cut, load_workload, segments
from harness.probe import Probe, take_probe
from harness.search.confirm import Confirmation, Segment, confirm
from harness.search.costs import IO_THREADS, Costs
from harness.search.gpu import Gpu, ProbeSpec, host_plan, probe_with
from harness.search.guide import Guide
from harness.search.live import LiveTrial
from harness.search.loop import GpuLostError
from harness.search.measurer import Measurer
from harness.search.memory_guard import MemoryGuard
from harness.search.objective import Objective
from harness.search.outcome import Kind, Limits, Measurement, Outcome
from harness.search.plan import (
    PILOT,
    Sizes,
    choose_sizes,
    confirm_s,
    largest_sizes,
    num_finalists,
    num_pairs,
    timeout_s,
)
from harness.search.simulator import Simulator
from harness.search.space import Params, Setting, Space
from harness.search.storage import journal_of
from harness.search.study import Study, explore, remembered
from harness.search.tracing import RecordSpec, WorkloadTrace, record_workload
from harness.search.trial import TrialRunner, TrialSpec, bare_process, measure
from runtime import machine
from runtime.build import for_device
from runtime.errors import BudgetError, ExpertFlowError, UsageError
from runtime.facts import ModelFacts, describe
from runtime.files import check_writable
from runtime.host_memory import HostPlan
from runtime.machine import MemorySum
from runtime.model import read_tokenizer
from runtime.profile import LOSSY, Profile
from runtime.trace import read_trace

UNTRAINED = ("previous_token",)
"""Predictors that any model has. The others want a trained artefact, which the user names, or a long past."""
_SETUP_TIMEOUT_S = 900.0
_SAMPLED = 400


class TuneError(ExpertFlowError):
    """Nothing can be tuned: not even the default configuration runs."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        label: short name of the model. folder: of the run. profile: where the profile goes.
        num_trials: most trials, those before a resume among them; None: as many as the budget holds.
        context: tokens of the longest sequence that there must be memory for.
        sampler, storage: see `Study`.
        fixed: dotted profile keys that are not searched.
        gpu: that trials run on; None: the CPU.
    """

    model: str
    label: str
    command: str
    folder: Path
    profile: Path
    limits: Limits
    objective: Objective
    budget_s: float
    num_trials: int | None
    sampler: str
    seed: int
    storage: str | None
    resume: bool
    workload: Path | None
    concurrency: int
    context: int
    fixed: Mapping[str, Any] = field(default_factory=dict)
    gpu: Gpu | None = None

    @property
    def device(self) -> str | None:
        """See `TrialSpec`."""
        return None if self.gpu is None else self.gpu.device

    @property
    def hardware(self) -> dict[str, str | int]:
        """What results depend on."""
        gpu = self.gpu
        return machine.fingerprint() if gpu is None else {**machine.fingerprint(gpu.kind), **gpu.fingerprint()}


@dataclass(frozen=True)
class Setup:
    """What the search stands on.

    Attributes:
        memory: model of the memory that is limited: the host's, or that of the GPU.
        default_s: about how long the default takes for one run.
        host_bytes: with a GPU, what each trial takes of the host.
    """

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
    host_bytes: int = 0

    def begin(self) -> tuple[Setup, Study]:
        """The run's study, new or resumed or joined, and the setup as all who work on that study have it."""
        settings = self.settings
        study = Study(
            settings.folder,
            self.space,
            identity_of(settings, self.facts, self.workload),
            limits=settings.limits,
            seed=settings.seed,
            sampler=settings.sampler,
            storage=settings.storage,
            resume=settings.resume,
            decisions={"sizes": asdict(self.sizes), "default_s": self.default_s},
            lease_s=2 * timeout_s(self.default_s),
        )
        decided = study.decisions
        settings.folder.mkdir(parents=True, exist_ok=True)
        sizes, default_s = Sizes(**decided["sizes"]), float(decided["default_s"])
        return replace(self, sizes=sizes, default_s=default_s, space=study.space), study

    @cached_property
    def guard(self) -> MemoryGuard:
        """What fits, by what was measured so far."""
        measured = self.memory.with_context(self.sizes.context, of=self.settings.context)
        return MemoryGuard(self.memory, measured, self.space, self.memory_limit_bytes)

    @cached_property
    def runner(self) -> TrialRunner:
        """Its trials log to the run's folder."""
        return TrialRunner(self.settings.folder / "trials.log")

    def measurer(self) -> Measurer:
        """What runs configurations."""
        settings = self.settings
        return Measurer(
            self.runner,
            settings.model,
            self.space,
            settings.fixed,
            self.texts.requests(self.sizes),
            settings.concurrency,
            timeout_s(self.default_s),
            self.guard.excess,
            Surroundings(self._gpu_state),
            settings.device,
        )

    @property
    def _gpu_state(self) -> Callable[[], GpuState] | None:
        """Asks the GPU that trials run on how it is."""
        return None if self.settings.gpu is None else partial(gpu_state, self.settings.gpu.uuid)

    def guide(self, measurer: Measurer, on_round: Callable[[int], None]) -> Guide:
        """The simulator of this workload, its routing recorded before, and what it proposes.

        Raises:
            ExpertFlowError: the routing of this model cannot be recorded.
        """
        settings = self.settings
        requests = self.texts.requests(self.sizes)["search"]
        # A folder may see other workloads, where the study is elsewhere.
        digest = hashlib.sha256(repr((settings.model, requests)).encode()).hexdigest()[:8]
        path = settings.folder / f"workload-{digest}.npz"
        if not path.exists():
            overrides = measurer.overrides(self.space.default)
            trial = TrialSpec(settings.model, overrides, requests, settings.concurrency, settings.device)
            outcome = self.runner.run(record_workload, RecordSpec(trial, str(path)), _SETUP_TIMEOUT_S)
            if outcome.kind is not Kind.OK:
                raise TuneError(f"the workload's routing was not recorded: {outcome.message}")
        simulator = Simulator(
            WorkloadTrace.of(read_trace(path), requests),
            self.base,
            settings.concurrency,
            self._costs(),
            streams=settings.gpu is not None,
        )
        return Guide(
            self.space,
            simulator,
            measurer.overrides,
            self.guard,
            settings.limits,
            settings.objective,
            explore,
            seed=settings.seed,
            on_round=on_round,
        )

    def confirm(
        self, on_run: Callable[[str, Outcome], None], finalists: Sequence[Params], default: Params
    ) -> Confirmation:
        """Finalists beside the default, on text that the search has not seen.

        Raises:
            GpuLostError: the GPU was lost meanwhile.
        """
        settings = self.settings
        pairs = num_pairs(2 * self.default_s, settings.budget_s)
        warm_up = self.texts.requests(self.sizes)["search"]

        def contender(params: Params) -> AbstractContextManager[LiveTrial]:
            overrides = {**settings.fixed, **self.space.overrides(params)}
            spec = TrialSpec(settings.model, overrides, warm_up, settings.concurrency, settings.device)
            return LiveTrial(self.runner, spec, timeout_s(self.default_s))

        found = confirm(
            finalists,
            default,
            self.texts.segments(self.sizes, pairs),
            open_contender=contender,
            fit_together=self._fit_together,
            num_pairs=pairs,
            objective=settings.objective,
            limits=settings.limits,
            on_run=on_run,
        )
        if found.failed and self._gpu_state is not None and (lost := lost_of([self._gpu_state()])):
            raise GpuLostError(lost)
        return found

    def _fit_together(self, several: Sequence[Params]) -> bool:
        """Whether so many processes can be loaded at once; on a GPU each needs the host's memory, too."""
        needed_bytes, gpu = sum(map(self.guard.expected_bytes, several)), self.settings.gpu
        if gpu is None:
            return needed_bytes <= machine.available_memory_bytes()
        fits_host = len(several) * self.host_bytes <= machine.available_memory_bytes()
        return fits_host and needed_bytes <= gpu.free_bytes()

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Of bringing in one expert: from disk, or from the host to the GPU."""
        copies = self.probe.copies
        rate = None if copies is None else copies.to_device_bytes_per_s()
        return self.probe.curve.engine_bytes_per_s if rate is None else rate

    @property
    def confirm_s(self) -> float:
        """About how long confirming takes, at most."""
        return confirm_s(self.default_s, self.settings.budget_s)

    @property
    def num_finalists(self) -> int:
        """Configurations that there is time to confirm one of."""
        return num_finalists(self.default_s, self.settings.budget_s)

    def outlook(self) -> str:
        """What is going to happen and how long it takes, for people."""
        settings, budget_s = self.settings, self.settings.budget_s
        end = datetime.datetime.now() + datetime.timedelta(seconds=budget_s + self.confirm_s)
        trials = f"{settings.num_trials} trials, " if settings.num_trials is not None else ""
        return (
            f"search     {self.space.size():,} configurations of {', '.join(knob.name for knob in self.space.knobs)}\n"
            f"run        {self.sizes}, {settings.concurrency} outstanding, about {self.default_s:.0f} s by default\n"
            f"time       {trials}at most {budget_s:.0f} s, then at most {self.confirm_s:.0f} s to confirm: "
            f"done by about {end:%H:%M}"
        )

    def share_infeasible(self) -> float:
        """Of the space: what is predicted not to fit, by a sample."""
        draw = random.Random(0)
        return sum(bool(self.guard.excess(self.space.sample(draw))) for _ in range(_SAMPLED)) / _SAMPLED

    def _costs(self) -> Costs:
        """What the probe says that things take: of a GPU, copies beside a computation, and computing an expert until
        the host has seen that it is done."""
        facts, curve, copies = self.facts, self.probe.curve, self.probe.copies
        layers = facts.identity.layers
        copied = None if copies is None else copies.to_device_bytes_per_s(under_load=True)
        rates = {threads: curve.bytes_per_s(threads) if copied is None else copied for threads in IO_THREADS}
        compute = self.probe.compute if self.settings.gpu is None else self.probe.gpu_compute
        return Costs.prior(
            {threads: facts.expert_bytes / bytes_per_s for threads, bytes_per_s in rates.items()},
            [(one.kernel, one.threads, one.num_tokens, one.seconds) for one in compute],
            dense_layer_experts=facts.dense_bytes / layers / facts.expert_bytes,
            threads=tuple(sorted({one.threads for one in compute})),
            predictors=self.space.setting.predictors,
        )


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

    def segments(self, sizes: Sizes, num_pairs: int) -> list[Segment]:
        """Of the part kept for confirming: as many as are wanted, or as there is text for."""
        return segments(self._workload, self._tokenizer, **asdict(sizes), num_segments=2 * num_pairs)


def identity_of(settings: Settings, facts: ModelFacts, workload: Workload) -> dict[str, Any]:
    """Everything that makes results comparable: who differs in it does not work on one study."""
    hardware = settings.hardware
    # Some KiB of it come and go from one boot, and from one machine of a kind, to the next.
    memory_gib = round(int(hardware.pop("memory_bytes")) / (1 << 30))
    return {
        "model": facts.identity.model_dump(),
        "workload": workload.sha256,
        "concurrency": settings.concurrency,
        "context": settings.context,
        **asdict(settings.limits),
        "fixed": dict(settings.fixed),
        "hardware": {**hardware, "memory_gib": memory_gib},
    }


def prepare(settings: Settings) -> Setup:
    """Check everything that the user gave, then probe; prints what it finds and writes no file.

    Raises:
        ExpertFlowError: something cannot be used, or the default does not run.
    """
    check_writable("--profile-out", settings.profile)
    check_writable("--out", settings.folder / "trials.csv")
    base = base_of(settings)
    if base.numerics in LOSSY:
        raise UsageError(
            f"numerics {base.numerics!r} changes results, and every trial must give those of the default: tune without "
            "it, then measure its cost: python -m harness.quality"
        )
    if settings.storage is None and not settings.resume and settings.folder.exists():
        journal_of(settings.folder, None, resume=False)
    kept = remembered(settings.folder) if settings.storage is None and settings.resume else {}
    facts = describe(settings.model)
    workload = load_workload(settings.workload)
    texts = Texts(workload, settings.model)
    texts.requests(largest_sizes(settings.concurrency))
    if settings.storage is not None:
        kept = remembered(settings.folder, settings.storage, identity_of(settings, facts, workload))
    with tempfile.TemporaryDirectory() as scratch:
        runner = TrialRunner(Path(scratch) / "setup.log")
        process_bytes = _must(runner, bare_process, None)["resident_bytes"]
        host = None if settings.gpu is None else host_plan(facts, base)
        memory, free_bytes = _room(settings, facts, process_bytes)
        limit_bytes = min(settings.limits.max_memory_bytes or 1 << 62, free_bytes)
        num_slots_fit = memory.slots_that_fit(limit_bytes, base.scheduler.num_sequences)
        probe = _probe(runner, settings, facts, base)
        print(probe.describe())
        needs = memory.predict(num_slots_fit, base.scheduler.num_sequences)
        _say(facts, needs, limit_bytes, host)
        if (asked := settings.limits.max_memory_bytes or 0) > free_bytes:
            print(_more_than_there_is(settings, asked, free_bytes), flush=True)
        if not kept:
            setting = Setting(
                memory.num_experts,
                num_slots_fit,
                settings.concurrency,
                machine.cpu_count(),
                fewer_slots=_beside_more_sequences(memory, limit_bytes, num_slots_fit, settings.concurrency),
            )
            kept = _pilot(runner, settings, base, texts, setting if host is None else _on_gpu(setting, host))
    host_bytes = 0 if host is None else host.pinned_bytes + host.pageable_bytes + process_bytes
    space = Space(Setting(**kept["setting"]), base, fixed=settings.fixed)
    sizes, default_s = Sizes(**kept["sizes"]), float(kept["default_s"])
    return Setup(
        settings, facts, base, workload, texts, memory, limit_bytes, probe, sizes, space, default_s, host_bytes
    )


def base_of(settings: Settings) -> Profile:
    """What overrides are put on: the default with the keys that the user set, and kernels that run on the device.

    Raises:
        UsageError: the user set one that does not.
    """
    base = Profile.default().with_overrides({"workload.context": settings.context, **settings.fixed})
    if settings.gpu is None:
        return base
    fitting, changed = for_device(base, torch.device(settings.gpu.device))
    if changed and "compute.decode" in settings.fixed:
        raise UsageError(f"--set compute.decode={base.compute.decode}: {changed[0]}; leave it out")
    return fitting


def _room(settings: Settings, facts: ModelFacts, process_bytes: int) -> tuple[MemoryModel, int]:
    """The model of the memory that is limited, and how much of it one trial can have."""
    gpu, context = settings.gpu, settings.context
    if gpu is None:
        free_bytes = process_bytes + machine.available_memory_bytes()
        return MemoryModel.of(facts, process_bytes=process_bytes, context=context), free_bytes
    return MemoryModel.of_gpu(facts, context_bytes=gpu.context_bytes, context=context), gpu.memory_free_bytes


def _probe(runner: TrialRunner, settings: Settings, facts: ModelFacts, base: Profile) -> Probe:
    io_threads = base.transfer.io_threads
    if settings.gpu is None:
        return take_probe(settings.model, facts, read_gpus(), io_threads=io_threads)
    return probe_with(runner, ProbeSpec(settings.model, settings.gpu.uuid, io_threads))


def _more_than_there_is(settings: Settings, asked_bytes: int, free_bytes: int) -> str:
    where = "this machine" if settings.gpu is None else settings.gpu.name
    asked, free = machine.format_bytes(asked_bytes), machine.format_bytes(free_bytes)
    return f"limit      --max-memory is {asked}, {where} has {free} free: the latter counts"


def _say(facts: ModelFacts, needs: MemorySum, limit_bytes: int, host: HostPlan | None) -> None:
    """What fits, and what it takes."""
    where = "" if host is None else " of GPU memory"
    print(f"model      {facts.identity.architecture}, {needs.num_slots} of {facts.num_experts_total} experts fit")
    print(f"needs      {needs.describe()} of {machine.format_bytes(limit_bytes)}{where}")
    if host is not None:
        print(f"host       {host.describe()}")
    sys.stdout.flush()


def _on_gpu(setting: Setting, host: HostPlan) -> Setting:
    kernels = tuple(name for name in setting.decode_kernels if name != CPU_KERNEL)
    return replace(setting, decode_kernels=kernels, on_gpu=True, has_disk_tier=not host.holds_all)


def _pilot(runner: TrialRunner, settings: Settings, base: Profile, texts: Texts, setting: Setting) -> dict[str, Any]:
    """Run the default on one short request: how much of the workload there is time for, and whether it can prefetch."""
    overrides = {**settings.fixed, **Space(setting, base, fixed=settings.fixed).overrides({})}
    spec = TrialSpec(settings.model, overrides, texts.requests(PILOT)["search"], 1, settings.device)
    pilot = Outcome(Kind.OK, result=_must(runner, measure, spec)).measurement
    sizes, default_s = choose_sizes(pilot, settings.concurrency, settings.budget_s)
    predictors = UNTRAINED if _lacks_lookahead(pilot) else ("gate_lookahead", *UNTRAINED)
    return {
        "sizes": asdict(sizes),
        "setting": asdict(replace(setting, predictors=predictors)),
        "default_s": default_s,
    }


def _beside_more_sequences(
    memory: MemoryModel, limit_bytes: int, num_slots_fit: int, concurrency: int
) -> tuple[int, ...]:
    """The most slots beside 2, 4, … sequences as far as any fit and they are fewer."""
    found = set()
    for power in range(1, concurrency.bit_length()):
        with contextlib.suppress(BudgetError):
            found.add(memory.slots_that_fit(limit_bytes, 2**power))
    return tuple(sorted(found - {num_slots_fit}))


def _lacks_lookahead(pilot: Measurement) -> bool:
    """The engine says so in a note when a model's routers cannot be asked ahead."""
    return any("gate_lookahead is not available" in note for note in pilot.notes)


def _must(runner: TrialRunner, work: Callable[[Any], dict[str, Any]], argument: Any) -> dict[str, Any]:
    outcome = runner.run(work, argument, _SETUP_TIMEOUT_S)
    if outcome.kind is not Kind.OK or outcome.result is None:
        raise TuneError(f"the default configuration does not run, so there is nothing to tune: {outcome.message}")
    return outcome.result
