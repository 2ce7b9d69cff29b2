"""The search by Optuna, through ask and tell. The only importer of optuna.

Two objectives, both minimised: the logarithm of the latency, and peak memory. Every trial sets every constraint, in the
order of `CONSTRAINTS`. A configuration that cannot be used is told as PRUNED with its constraints violated, never as
FAIL, which samplers do not see and would propose for ever; one that is merely beaten, as PRUNED within all constraints.
FAIL is for a trial that says nothing about its configuration: one that was interrupted, or whose environment changed.

Several workers share a study. A configuration is claimed before it runs: the claim is written, then the others' are
read, and of two equal claims the lower number goes first; one that has begun carries the lease of its worker.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from harness.search.history import History, attributes_of
from harness.search.leases import Worker, is_elsewhere, lives, worker_of
from harness.search.outcome import FAILURES, OUT_OF_MEMORY, Kind, Limits, Outcome, Record, Tried
from harness.search.parameters import encoded, knob_name, suggested
from harness.search.space import Params, Setting, Space, params_key
from harness.search.storage import (
    agreed,
    check_same,
    cut_torn_line,
    database_url,
    explained,
    journal_of,
    name_prefix,
    redacted,
    study_name,
    unusable,
)
from runtime.errors import ExpertFlowError, UsageError

CONSTRAINTS = ("memory", "slo_tpot", "slo_ttft", "failure")
SAMPLERS = ("tpe", "gp", "nsga2", "random", "brute")
MAX_BRUTE = 1000
"""Configurations that are tried one after the other; a larger space would take days."""
LEASE_S = 3600.0
_FLAT = frozenset({"gp", "nsga2"})  # they model all parameters at once
_POPULATION, _EXPLORING_POPULATION = 16, 8
_MAX_ASKS, _MAX_DRAWS = 4, 100
_MIN_EXPLAINED, _BEST_EXPLAINED = 15, 5  # trials that PED-ANOVA needs, and how many of them are the best
_CLAIM_S = 120.0  # what a sampler may take to propose
_DECIDE_S, _POLL_S = 10.0, 0.02  # what another worker may take to see a claim, and between two looks
_BARE_S = 5.0  # an open trial that nobody has claimed is given up after that
_LOCK_S = 10  # a process that was killed while it wrote to a journal keeps others from it for so long
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

optuna.logging.set_verbosity(optuna.logging.ERROR)

P = ParamSpec("P")
T = TypeVar("T")


class StudyError(ExpertFlowError):
    """What is told cannot be kept any more: the disk is full, or the database is gone."""


@dataclass(frozen=True)
class Proposal:
    """A configuration to run now, and the open trial that waits for its outcome. `source` is as in `Record`."""

    trial: Trial
    params: Params
    source: str


def _explaining(method: Callable[P, T]) -> Callable[P, T]:
    """A storage that fails in the middle of a run is one line for the user, not a trace."""

    @functools.wraps(method)
    def explaining(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except (StorageInternalError, OSError, json.JSONDecodeError) as error:
            study = args[0]
            assert isinstance(study, Study)
            raise StudyError(
                f"the study in {study.where} cannot be read or written any more: "
                f"{explained(study._storage, error)}; what was told before is safe, resume it: one trial may be lost"
            ) from error

    return explaining


class Study:
    """One search over one space, kept in a storage: whatever was told survives the process.

    Args:
        folder: of the run.
        space: what is searched, unless another worker of the study has settled on another number of slots that fit.
        identity: everything that makes results comparable; JSON, and no secrets. A study is gone on with only by the
            same.
        sampler: one of `SAMPLERS`.
        storage: None: a journal in `folder`. A URL, of a database or `journal:///PATH`: whoever names it with the same
            identity and space works on one study, begun by the first.
        resume: go on with the study that `folder` holds; without meaning where there is a `storage`.
        decisions: JSON, of the one who begins: everything else that all workers have to do alike.
        lease_s: longest that a trial takes.

    Attributes:
        space: that is searched. decisions: of the worker who began. where: it is kept, without a password.

    Raises:
        UsageError: the folder holds a study and `resume` is not set, or holds none or another one and it is; a storage
            that cannot be used; a space too large for `brute`.
    """

    @_explaining
    def __init__(
        self,
        folder: Path,
        space: Space,
        identity: Mapping[str, Any],
        *,
        limits: Limits,
        seed: int,
        sampler: str = "tpe",
        storage: str | None = None,
        resume: bool = False,
        decisions: Mapping[str, Any] | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        if sampler not in SAMPLERS:
            raise UsageError(f"--sampler {sampler!r} is unknown; take one of {', '.join(SAMPLERS)}")
        if sampler == "brute" and space.size() > MAX_BRUTE:
            raise UsageError(
                f"--sampler brute: {space.size()} configurations are more than {MAX_BRUTE}; "
                "fix some knobs with --set, or take another sampler"
            )
        self.limits, self.where = limits, redacted(storage or str(folder))
        self._storage, self._is_local = storage or "", storage is None
        self._sampler, self._lease_s, self._worker = sampler, lease_s, Worker.here()
        opened = _open_storage(folder, storage, resume=resume)
        name = study_name(identity, space)
        if storage is None and resume:
            studies = {study.study_name: study.user_attrs for study in opened.get_all_studies()}
            check_same(studies, name, folder, identity)
        own = {**(decisions or {}), "setting": asdict(space.setting)}
        self._study, self.decisions = _begin_or_join(opened, name, identity, own)
        self.space = space.within(Setting(**self.decisions["setting"]))
        self._history = History()
        self._bare: dict[int, float] = {}
        seed += len(self._study.get_trials(deepcopy=False))
        if storage is not None:  # workers that begin together must not propose the same
            seed += zlib.crc32(self._worker.name.encode())
        self._draw = random.Random(seed)
        with warnings.catch_warnings(action="ignore"):
            self._study.sampler = _made(sampler, seed % 2**32)
        self._reap()
        if storage is not None and storage.startswith("sqlite"):
            self._refuse_company()

    @property
    def name(self) -> str:
        """Under which the storage knows it."""
        return self._study.study_name

    @_explaining
    def ask(self) -> Proposal | None:
        """What to run next: the default first, then what was enqueued, then the sampler's; something new, or a repeat
        of what has run less than three times.

        None when every configuration was run, or is being run by another worker.
        """
        self._reap()
        if self._is_new(self.space.default) and (held := self._claimed(self.space.default, "default")):
            return held
        num_sampled = 0
        while num_sampled < _MAX_ASKS and (self._sampler != "brute" or self._trials(TrialState.WAITING)):
            num_sampled += not self._trials(TrialState.WAITING)
            if held := self._claimed():
                return held
        for params in self._unseen():
            if held := self._claimed(params, "sampler"):
                return held
        return None

    @_explaining
    def enqueue(self, configurations: Iterable[Params], source: str) -> None:
        """Have `ask` propose these next, but none that has run, runs or waits already. ValueError: not of the space."""
        waiting = {params_key(trial.user_attrs["params"]) for trial in self._trials(TrialState.WAITING)}
        waiting.add(params_key(self.space.default))  # `ask` has it first as it is
        for params in configurations:
            if not self.space.contains(params):
                raise ValueError(f"no configuration of the space: {dict(params)}")
            if params_key(params) not in waiting and self._is_new(params):
                waiting.add(params_key(params))
                self._study.add_trial(self._template(TrialState.WAITING, params, source))

    @_explaining
    def has_waiting(self) -> bool:
        """Whether something is enqueued that nobody has begun."""
        return bool(self._trials(TrialState.WAITING))

    @_explaining
    def propose(self, params: Params, source: str = "default") -> Proposal:
        """Open a trial of `params`, however often that has run."""
        return self._leased(self._open(params, source))

    @_explaining
    def tell(self, proposal: Proposal, outcome: Outcome) -> None:
        """Note how the proposed trial ended. One whose environment changed is enqueued again, twice at most."""
        self._finish(proposal, outcome, reused=False)
        if outcome.kind is Kind.ENVIRONMENT:
            self.enqueue([proposal.params], proposal.source)

    @_explaining
    def abandon(self, proposal: Proposal) -> None:
        """Close the trial without a word on its configuration: it was interrupted."""
        self._study.tell(proposal.trial, state=TrialState.FAIL, skip_if_finished=True)

    @_explaining
    def records(self) -> list[Record]:
        """Every trial that ended with an outcome, whoever ran it, in the order in which they ended."""
        return self._up_to_date().records()

    @_explaining
    def tried(self) -> list[Tried]:
        """Every configuration that ran well at least once, in order of its first run."""
        return self._up_to_date().tried()

    @_explaining
    def importances(self) -> dict[str, dict[str, float]]:
        """How much each knob explains of whether a configuration is among the best: its share, of either objective.

        By PED-ANOVA over what was measured. Empty with too few trials, without an objective that no knob explains.
        """
        told = [one for one in self._trials(TrialState.COMPLETE) if not one.user_attrs.get("imputed")]
        return _importances([one for one in told if not one.user_attrs.get("reused")])

    def _up_to_date(self) -> History:
        ended = self._study.get_trials(deepcopy=False, states=_FINISHED)
        for trial in sorted(ended, key=lambda trial: trial.datetime_complete or datetime.min):
            self._history.add(trial.number, trial.user_attrs)
        return self._history

    def _is_new(self, params: Params) -> bool:
        """Nothing is known of it, and nobody runs it."""
        return self._up_to_date().is_untold(params) and not self._rivals(params, number=-1)

    def _trials(self, state: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(state,))

    def _template(self, state: TrialState, params: Params, source: str) -> FrozenTrial:
        fixed = encoded(self.space, params, is_flat=self._sampler in _FLAT)
        return create_trial(
            state=state,
            system_attrs={"fixed_params": fixed},
            user_attrs={"params": dict(params), "source": source},
        )

    def _open(self, params: Params, source: str) -> Proposal:
        """A running trial of just that, claimed; what waits in the queue is left there."""
        return self._filled(self._begun(self._template(TrialState.RUNNING, params, source)))

    def _sampled(self) -> Proposal:
        """The next of the queue, else what the sampler says; claimed."""
        if self._trials(TrialState.WAITING):
            trial = self._study.ask()
            trial.set_user_attr("claim", self._worker.lease(_CLAIM_S))
        else:
            trial = self._begun(create_trial(state=TrialState.RUNNING))
        proposal = self._filled(trial)
        trial.set_user_attr("params", dict(proposal.params))
        return proposal

    def _begun(self, template: FrozenTrial) -> Trial:
        """As `optuna.Study.ask`, but with attributes that are there as soon as the trial is."""
        template.set_user_attr("claim", self._worker.lease(_CLAIM_S))
        self._study._thread_local.cached_all_trials = None
        trial_id = self._study._storage.create_new_trial(self._study._study_id, template_trial=template)
        with warnings.catch_warnings(action="ignore"):
            return Trial(self._study, trial_id)

    def _filled(self, trial: Trial) -> Proposal:
        with warnings.catch_warnings(action="ignore"):
            params = suggested(self.space, trial, is_flat=self._sampler in _FLAT)
        return Proposal(trial, params, trial.user_attrs.get("source", "sampler"))

    def _claimed(self, params: Params | None = None, source: str = "") -> Proposal | None:
        """A proposal of `params`, else of the queue or the sampler; None where it need not run, or was given up by
        another worker for it took too long."""
        try:
            if params is not None:
                return self._held(self._open(params, source), may_repeat=False)
            proposal = self._sampled()
            return self._held(proposal, may_repeat=proposal.source == "sampler")
        except UpdateFinishedTrialError:
            return None

    def _held(self, proposal: Proposal, *, may_repeat: bool) -> Proposal | None:
        """The proposal with a lease on it; None, and it is closed, where it need not run."""
        if not self._goes_first(proposal):
            self.abandon(proposal)
            return None
        if (known := self._up_to_date().settled(proposal.params, may_repeat=may_repeat)) is None:
            return self._leased(proposal)
        self._finish(proposal, known, reused=True)
        return None

    def _goes_first(self, proposal: Proposal) -> bool:
        """Whether nobody else runs the same. Who claimed it later and has not begun yet is about to see this claim."""
        number, until = proposal.trial.number, time.monotonic() + _DECIDE_S
        while rivals := self._rivals(proposal.params, number):
            if any("lease" in rival.user_attrs or rival.number < number for rival in rivals):
                return False
            if time.monotonic() > until:
                return True
            time.sleep(_POLL_S)
        return True

    def _rivals(self, params: Params, number: int) -> list[FrozenTrial]:
        """Open trials of the same configuration that somebody runs, or is about to."""
        return [
            trial
            for trial in self._trials(TrialState.RUNNING)
            if trial.number != number and trial.user_attrs.get("params") == params and lives(trial.user_attrs)
        ]

    def _leased(self, proposal: Proposal) -> Proposal:
        proposal.trial.set_user_attr("lease", self._worker.lease(self._lease_s))
        return proposal

    def _finish(self, proposal: Proposal, outcome: Outcome, *, reused: bool) -> None:
        """Set attributes and constraints, then tell; a repeat is told the pooled values of all its runs."""
        trial, pooled = proposal.trial, self._up_to_date().pooled(proposal.params, outcome, reused=reused)
        try:
            for name, value in attributes_of(proposal.params, outcome, reused=reused, source=proposal.source).items():
                trial.set_user_attr(name, value)
        except UpdateFinishedTrialError:  # its lease ran out and another worker gave it up: measured is measured
            self._finish(self._open(proposal.params, proposal.source), outcome, reused=reused)
            return
        excess = dict.fromkeys(CONSTRAINTS, -1.0) if pooled is None else self.limits.excess(pooled)
        if outcome.kind in OUT_OF_MEMORY:
            excess["memory"] = 1.0
        excess["failure"] = float(outcome.kind in FAILURES)
        for name in CONSTRAINTS:
            trial.set_constraint(name, excess[name])
        if pooled is not None:
            self._study.tell(trial, [math.log(pooled.latency_ms_p50), float(pooled.peak_memory_bytes)])
        elif outcome.kind is Kind.ENVIRONMENT:
            self._study.tell(trial, state=TrialState.FAIL)
        elif self._sampler == "gp" and (worst := self._worst()):
            trial.set_user_attr("imputed", True)  # it would not see one that is PRUNED
            self._study.tell(trial, worst)
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    def _worst(self) -> list[float]:
        """Of everything measured, per objective."""
        tried = self.tried()
        latencies, peaks = [one.latency_ms_p50 for one in tried], [one.peak_memory_bytes for one in tried]
        return [math.log(max(latencies)), float(max(peaks))] if tried else []

    def _unseen(self) -> Iterator[Params]:
        """Configurations that nobody has run or runs: a few drawn ones, and at last all; for `brute` all, in order."""
        history = self._up_to_date()
        taken = {params_key(one.user_attrs.get("params", {})) for one in self._trials(TrialState.RUNNING)}
        # Workers that share a study would run into each other if all went through it in order.
        num_drawn = 0 if self._sampler == "brute" and self._is_local else _MAX_DRAWS
        drawn = (self.space.sample(self._draw) for _ in range(num_drawn))
        for params in itertools.chain(drawn, self.space.configurations()):
            if params_key(params) not in taken and history.is_untold(params):
                taken.add(params_key(params))
                yield params

    def _reap(self) -> None:
        """Give up the trials that nobody runs any more: they would keep the sampler away from their place for ever.

        The journal of a run's folder is for one machine. Where it seems to be another one, that was a container.
        """
        running = [one for one in self._trials(TrialState.RUNNING) if worker_of(one.user_attrs) != self._worker.name]
        now = time.monotonic()
        bare = [one.number for one in running if not {"claim", "lease"} & one.user_attrs.keys()]
        self._bare = {number: self._bare.get(number, now) for number in bare}
        for trial in running:
            is_gone = not lives(trial.user_attrs) or (self._is_local and is_elsewhere(trial.user_attrs))
            if is_gone or now - self._bare.get(trial.number, now) > _BARE_S:
                self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _refuse_company(self) -> None:
        for trial in self._trials(TrialState.RUNNING):
            if "lease" in trial.user_attrs:
                other = trial.user_attrs["lease"]["pid"]
                raise UsageError(
                    f"--storage {self.where}: process {other} works on this study, and "
                    "SQLite is for one process; for several take journal:///FILE, PostgreSQL or MySQL"
                )


def _open_storage(folder: Path, storage: str | None = None, *, resume: bool) -> BaseStorage:
    """What the study is kept in; a last line of a journal that a crash cut off is put aside.

    Raises:
        UsageError: see `journal_of`; or a database that cannot be used.
    """
    journal = journal_of(folder, storage, resume=resume)
    with warnings.catch_warnings(action="ignore"):
        return _open_database(storage or "") if journal is None else _open_journal(journal)


def _open_journal(journal: Path) -> JournalStorage:
    try:
        lock = JournalFileSymlinkLock(str(journal), grace_period=_LOCK_S)
        backend = JournalFileBackend(str(journal), lock_obj=lock)
        lock.acquire()
        try:
            cut_torn_line(journal)
        finally:
            lock.release()
        return JournalStorage(backend)
    except OSError as error:
        raise UsageError(f"{journal}: the study cannot be kept there: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{journal}: a line in the middle of it is damaged; begin another study") from error


def _open_database(storage: str) -> RDBStorage:
    url = database_url(storage)
    for is_last in (False, False, True):
        try:
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})  # a connection idles while a trial runs
        except ImportError as error:
            raise unusable(storage, error) from None
        except Exception as error:  # whatever the driver raises; workers that begin together race for the tables
            if is_last:
                raise unusable(storage, error) from None
            time.sleep(0.3)
    raise AssertionError


def remembered(folder: Path, storage: str | None = None, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the study's first worker decided; nothing where there is no study yet.

    Args:
        storage, identity: as for `Study`. The study of a run's folder is the only one there, whatever its identity.

    Raises:
        UsageError: a folder that holds no run; a storage that cannot be used.
    """
    opened = _open_storage(folder, storage, resume=True)
    prefix = "" if storage is None else name_prefix(identity or {})
    studies = [study for study in opened.get_all_studies() if study.study_name.startswith(prefix)]
    if not studies:
        return {}
    return agreed(functools.partial(opened.get_study_user_attrs, studies[-1]._study_id))


def explore(
    space: Space,
    evaluate: Callable[[Params], tuple[float, float] | None],
    num_trials: int,
    *,
    seed: int,
    start: Sequence[Params] = (),
) -> list[tuple[Params, tuple[float, float]]]:
    """Search in memory for what makes both values small, and the compromises between them.

    Args:
        evaluate: latency and bytes of a configuration, exact and positive; None: it cannot be used. Asked once of each.
        num_trials: distinct configurations at most.
        start: configurations to begin with, beside the default.

    Returns:
        Every usable configuration that was evaluated, in order.
    """
    sampler = NSGAIISampler(seed=seed, population_size=_EXPLORING_POPULATION)
    study = optuna.create_study(sampler=sampler, directions=["minimize", "minimize"])
    found: dict[str, tuple[Params, tuple[float, float] | None]] = {}
    for params in (space.default, *filter(space.contains, start)):
        study.enqueue_trial(encoded(space, params, is_flat=True))
    num_asks = 0
    while len(found) < min(num_trials, space.size()) and num_asks < 3 * num_trials:
        trial, num_asks = study.ask(), num_asks + 1
        params = suggested(space, trial, is_flat=True)
        if params_key(params) not in found:
            found[params_key(params)] = (params, evaluate(params))
        values = found[params_key(params)][1]
        if values is None:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, [math.log(value) for value in values])
    return [(params, values) for params, values in found.values() if values is not None]


def _value(index: int, trial: FrozenTrial) -> float:
    return float(trial.values[index])


def _importances(trials: Sequence[FrozenTrial]) -> dict[str, dict[str, float]]:
    if len(trials) < _MIN_EXPLAINED:
        return {}
    study = optuna.create_study(directions=["minimize", "minimize"])
    study.add_trials(trials)
    evaluator = PedAnovaImportanceEvaluator(target_quantile=max(0.1, _BEST_EXPLAINED / len(trials)))
    found: dict[str, dict[str, float]] = {}
    for index, objective in enumerate(("latency", "memory")):
        with warnings.catch_warnings(action="ignore"):
            weights = get_param_importances(
                study, evaluator=evaluator, target=functools.partial(_value, index), normalize=False
            )
        if total := sum(weights.values()):
            found[objective] = {knob_name(name): weight / total for name, weight in weights.items()}
    return found


def _made(name: str, seed: int) -> BaseSampler:
    match name:
        case "tpe":
            return TPESampler(seed=seed)
        case "gp":
            return GPSampler(seed=seed, warn_independent_sampling=False)
        case "nsga2":
            return NSGAIISampler(seed=seed, population_size=_POPULATION)
        case "random" | "brute":
            return RandomSampler(seed=seed)
    raise AssertionError(name)


def _begin_or_join(
    storage: BaseStorage, name: str, identity: Mapping[str, Any], decisions: Mapping[str, Any]
) -> tuple[optuna.Study, dict[str, Any]]:
    """The study, and what all its workers go by: of those who begin at one moment, one creates it and decides."""
    try:
        study = optuna.create_study(study_name=name, storage=storage, directions=["minimize", "minimize"])
        with warnings.catch_warnings(action="ignore"):
            study.set_metric_names(["log of latency in ms", "peak memory in bytes"])
    except DuplicatedStudyError:
        study = optuna.load_study(study_name=name, storage=storage, sampler=RandomSampler())
        if decided := agreed(lambda: study.user_attrs):
            return study, decided
    study.set_user_attr("identity", dict(identity))
    study.set_user_attr("decisions", dict(decisions))
    return study, dict(study.user_attrs["decisions"])
