"""The search by Optuna, through ask and tell. The only importer of optuna.

Two objectives, both minimised: the logarithm of the latency, and peak memory. Every trial sets every constraint, in the
order of `CONSTRAINTS`. A configuration that cannot be used is told as PRUNED with its constraints violated, never as
FAIL, which samplers do not see and would propose for ever. FAIL is for a trial that says nothing about its
configuration: one that was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from harness.search.outcome import Kind, Outcome, Record, Tried
from harness.search.space import Knob, Params, Space, Value
from runtime.errors import UsageError

CONSTRAINTS = ("memory", "failure")
JOURNAL = "study.journal"
MAX_RUNS = 3
"""Runs of one configuration: the first, and two repeats when it is proposed again."""
_MAX_ASKS = 4
_MIB = 1 << 20

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class Proposal:
    """A configuration to run now, and the open trial that waits for its outcome."""

    trial: Trial
    params: Params


class Study:
    """One search over one space, kept in a journal file: whatever was told survives the process.

    Args:
        folder: of the run.
        space: what is searched.
        identity: everything that makes results comparable; JSON. A study is gone on with only by the same.
        max_memory_bytes: limit on the peak, or None.
        resume: go on with the study that the folder holds.

    Raises:
        UsageError: the folder holds a study and `resume` is not set, or holds none or another one and it is.
    """

    def __init__(
        self,
        folder: Path,
        space: Space,
        identity: Mapping[str, Any],
        *,
        max_memory_bytes: int | None,
        seed: int,
        resume: bool = False,
    ) -> None:
        self.space, self.max_memory_bytes = space, max_memory_bytes
        storage = open_storage(folder, resume)
        name = f"expertflow-{_digest({**identity, 'space': space.digest()})}"
        if resume:
            _check_same(storage, name, folder, identity)
        self._study = optuna.create_study(
            study_name=name,
            storage=storage,
            sampler=optuna.samplers.TPESampler(seed=seed + len(_trials_of(storage, name))),
            directions=["minimize", "minimize"],
            load_if_exists=resume,
        )
        self._draw = random.Random(seed)
        if resume:
            self._abandon_open_trials()
        else:
            self._study.set_user_attr("identity", dict(identity))

    @property
    def name(self) -> str:
        """Under which the journal knows it."""
        return self._study.study_name

    def ask(self) -> Proposal | None:
        """What to run next, the default first; something new, or a repeat of what has run less than three times.

        None when every configuration was run.
        """
        seed = next((params for params in self.space.seeds() if not self._outcomes(params)), None)
        if seed is not None:
            return self.propose(seed)
        for _ in range(_MAX_ASKS):
            proposal = self._ask()
            known = self._outcomes(proposal.params)
            if not known or (all(one.kind is Kind.OK for one in known) and len(known) < MAX_RUNS):
                return proposal
            self._finish(proposal, known[-1], reused=True)
        unseen = self._unseen()
        return None if unseen is None else self.propose(unseen)

    def propose(self, params: Params) -> Proposal:
        """Open a trial of `params`, however often that has run."""
        self._study.enqueue_trial(_encoded(self.space, params))
        proposal = self._ask()
        while _key(proposal.params) != _key(params):
            self.abandon(proposal)  # enqueued by a process that died before it asked
            proposal = self._ask()
        return proposal

    def tell(self, proposal: Proposal, outcome: Outcome) -> None:
        """Note how the proposed trial ended."""
        self._finish(proposal, outcome, reused=False)

    def abandon(self, proposal: Proposal) -> None:
        """Close the trial without a word on its configuration: it was interrupted."""
        self._study.tell(proposal.trial, state=TrialState.FAIL)

    def records(self) -> list[Record]:
        """Every finished trial, in order."""
        return [_record(trial) for trial in self._finished()]

    def tried(self) -> list[Tried]:
        """Every configuration that ran well at least once, in order of its first run."""
        runs: dict[str, tuple[Params, list[Any]]] = {}
        for record in self.records():
            if record.outcome.kind is Kind.OK and not record.reused:
                runs.setdefault(_key(record.params), (record.params, []))[1].append(record.outcome.measurement)
        return [Tried(params, tuple(measured)) for params, measured in runs.values()]

    def remember(self, key: str, value: Any) -> None:
        """Keep a JSON value with the study, for a resume."""
        self._study.set_user_attr(key, value)

    def _ask(self) -> Proposal:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self._study.ask()
            return Proposal(trial, self.space.choose(lambda knob: _suggest(trial, knob)))

    def _finished(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def _outcomes(self, params: Params) -> list[Outcome]:
        """Of the runs of `params` so far."""
        key = _key(params)
        return [one.outcome for one in self.records() if not one.reused and _key(one.params) == key]

    def _finish(self, proposal: Proposal, outcome: Outcome, *, reused: bool) -> None:
        """Set attributes and constraints, then tell; a repeat is told the pooled values of all its runs."""
        trial = proposal.trial
        trial.set_user_attr("params", dict(proposal.params))
        trial.set_user_attr("outcome", asdict(outcome))
        trial.set_user_attr("reused", reused)
        if outcome.kind is not Kind.OK:
            is_memory = outcome.kind is Kind.OUT_OF_MEMORY
            self._constrain(trial, memory=float(is_memory), failure=1.0)
            self._study.tell(trial, state=TrialState.PRUNED)
            return
        known = [one.measurement for one in self._outcomes(proposal.params) if one.kind is Kind.OK]
        pooled = Tried(proposal.params, (*known, *(() if reused else (outcome.measurement,))))
        limit = self.max_memory_bytes
        excess = -1.0 if limit is None else (pooled.peak_memory_bytes - limit) / _MIB
        self._constrain(trial, memory=excess, failure=0.0)
        self._study.tell(trial, [math.log(pooled.latency_ms_p50), float(pooled.peak_memory_bytes)])

    @staticmethod
    def _constrain(trial: Trial, **values: float) -> None:
        for name in CONSTRAINTS:
            trial.set_constraint(name, values[name])

    def _unseen(self) -> Params | None:
        seen = {_key(record.params) for record in self.records()}
        unseen = [params for params in self.space.configurations() if _key(params) not in seen]
        return self._draw.choice(unseen) if unseen else None

    def _abandon_open_trials(self) -> None:
        """A trial that was running when its process died would keep the sampler away from its place for ever."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)


def open_storage(folder: Path, resume: bool) -> JournalStorage:
    """The journal of a run's folder; a last line that a crash cut off is put aside.

    Raises:
        UsageError: there is one and `resume` is not set, or there is none and it is.
    """
    journal = folder / JOURNAL
    if journal.exists() and not resume:
        raise UsageError(
            f"{folder} holds a run already; add --resume to go on with it, or name another folder with --out"
        )
    if resume and not journal.exists():
        raise UsageError(f"{folder} holds no run to go on with; leave --resume out, or name its folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    if resume:
        _cut_torn_line(journal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return JournalStorage(JournalFileBackend(str(journal)))


def remembered(folder: Path) -> dict[str, Any]:
    """What `Study.remember` kept in a run's folder. Raises UsageError when it holds no run."""
    storage = open_storage(folder, resume=True)
    studies = storage.get_all_studies()
    return dict(studies[0].user_attrs) if studies else {}


def _cut_torn_line(journal: Path) -> None:
    data = journal.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        journal.with_suffix(".corrupt").write_bytes(data[whole:])
        os.truncate(journal, whole)


def _check_same(storage: JournalStorage, name: str, folder: Path, identity: Mapping[str, Any]) -> None:
    studies = {study.study_name: study.user_attrs for study in storage.get_all_studies()}
    if name in studies:
        return
    before = next(iter(studies.values()), {}).get("identity", {})
    wanted = json.loads(json.dumps(dict(identity)))
    differing = sorted(key for key in {*before, *wanted} if before.get(key) != wanted.get(key)) or ["the space"]
    raise UsageError(
        f"{folder} holds a run with other settings ({', '.join(differing)}); "
        "resume it with the command that began it, or name another folder with --out"
    )


def _trials_of(storage: JournalStorage, name: str) -> list[FrozenTrial]:
    for study in storage.get_all_studies():
        if study.study_name == name:
            return list(storage.get_all_trials(study._study_id, deepcopy=False))
    return []


def _parameter(knob: Knob) -> str:
    """Optuna's name: ordered choices that are no range of integers, such as 1, 2, 4, 8, are searched by index."""
    return f"{knob.name}_index" if knob.is_ordered and not _is_range(knob) else knob.name


def _is_range(knob: Knob) -> bool:
    return knob.is_ordered and list(knob.choices) == list(range(int(knob.choices[0]), int(knob.choices[-1]) + 1))


def _suggest(trial: Trial, knob: Knob) -> Value:
    if not knob.is_ordered:
        return str(trial.suggest_categorical(knob.name, knob.choices))
    if _is_range(knob):
        return trial.suggest_int(knob.name, int(knob.choices[0]), int(knob.choices[-1]))
    return knob.choices[trial.suggest_int(_parameter(knob), 0, len(knob.choices) - 1)]


def _encoded(space: Space, params: Params) -> dict[str, Value]:
    """`params` as Optuna's parameters."""
    knobs = {knob.name: knob for knob in space.knobs}
    return {
        _parameter(knobs[name]): value if _parameter(knobs[name]) == name else knobs[name].choices.index(value)
        for name, value in params.items()
    }


def _record(trial: FrozenTrial) -> Record:
    outcome = trial.user_attrs["outcome"]
    return Record(
        trial.number,
        trial.user_attrs["params"],
        Outcome(**{**outcome, "kind": Kind(outcome["kind"])}),
        trial.user_attrs["reused"],
    )


def _key(params: Params) -> str:
    return json.dumps(sorted(params.items()))


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
