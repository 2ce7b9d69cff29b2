"""A profile measured again beside the default: does it still keep what its evidence promises?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.checks.report import Finding, Report, Verdict
from harness.measure.stats import Ratio, exact_confidence
from harness.measure.workload import TokenRequest, Workload, cut, load_workload, segments
from harness.search.confirm import DEFAULT, PEAK_NOISE, Segment, Turns, latency_ratio, take_turns
from harness.search.objective import SLOWDOWN
from harness.search.outcome import Outcome
from harness.search.plan import Sizes, largest_sizes
from runtime import machine
from runtime.errors import ProfileError, UsageError
from runtime.machine import format_bytes
from runtime.profile import Profile, checkpoint_of, load_profile, match_profile

if TYPE_CHECKING:
    import torch

    from runtime.facts import ModelFacts

PROFILE = "profile"
_CONCURRENCY = 8
_TIMEOUT_S = 900.0
_CONFIGURATION = {"cache", "prefetch", "predictor", "scheduler", "compute", "transfer", "tiers", "miss", "numerics"}


@dataclass(frozen=True)
class Promise:
    """What the evidence of a profile says. `ratio` is of latency to the default's; None: it claims no gain.

    `on_gpu`: the memory is a GPU's.
    """

    ratio: Ratio | None
    peak_memory_bytes: int | None
    on_gpu: bool = False

    @classmethod
    def of(cls, profile: Profile) -> Promise:
        """Of a profile."""
        evidence, objectives = profile.evidence, profile.objectives
        told = None if evidence is None else evidence.ratio
        ratio = None if told is None else Ratio(told.estimate, told.low, told.high, (evidence and evidence.pairs) or 0)
        peak_bytes = None if objectives is None else objectives.peak_memory_bytes
        return cls(ratio, peak_bytes, on_gpu=profile.gpu is not None)

    def peak_text(self, num_bytes: int) -> str:
        """A peak of that memory, for people."""
        return f"peak {'GPU ' if self.on_gpu else ''}memory {format_bytes(num_bytes)}"

    def describe(self, ratio: Ratio | None, peak_memory_bytes: int | None) -> str:
        """Figures of this kind, for people."""
        latency = "no gain in latency" if ratio is None else f"latency {ratio} of the default's"
        return latency + ("" if peak_memory_bytes is None else f", {self.peak_text(peak_memory_bytes)}")


@dataclass(frozen=True)
class Checked:
    """What was found. `ratio` and `peak_memory_bytes` are None where a run failed."""

    verdict: Verdict
    reason: str
    promised: Promise
    ratio: Ratio | None
    peak_memory_bytes: int | None
    num_segments: int
    notes: tuple[str, ...]

    def report(self, name: str, reproduce: str) -> Report:
        """For people, pull requests and JSON; `name` is the profile's."""
        facts = [("promised", self.promised.describe(self.promised.ratio, self.promised.peak_memory_bytes))]
        confidence = None
        if self.ratio is not None:
            pairs = self.ratio.num_pairs
            confidence = exact_confidence(pairs)
            how = f"{confidence:.0%} interval, {pairs} pairs on {self.num_segments} segments of text"
            facts.append(("measured", f"{self.promised.describe(self.ratio, self.peak_memory_bytes)} ({how})"))
        figures = {
            "promised": asdict(self.promised),
            "ratio": None if self.ratio is None else self.ratio.as_dict(),
            "confidence": confidence,
            "peak_memory_bytes": self.peak_memory_bytes,
            "num_segments": self.num_segments,
        }
        finding = Finding(name, self.verdict, self.reason, figures)
        return Report("profile", (finding,), reproduce, self.notes, tuple(facts))


def judge(promised: Promise, ratio: Ratio, peak_memory_bytes: int) -> tuple[Verdict, str]:
    """Whether what was measured keeps the promise, and why.

    A gain that was promised must be there and not be smaller than promised; where none was, as for a profile that is
    the default's or that saves memory, it must not be noticeably slower than it may have been.
    """
    most = promised.peak_memory_bytes
    if most is not None and peak_memory_bytes > (1 + PEAK_NOISE) * most:
        return Verdict.REGRESSION, f"{promised.peak_text(peak_memory_bytes)}, promised {format_bytes(most)}"
    high = 1.0 if promised.ratio is None else promised.ratio.high
    if ratio.low > high:
        return Verdict.REGRESSION, f"latency at least {ratio.low:.2f} of the default's, promised at most {high:.2f}"
    limit = 1.0 if high < 1 else max(high, SLOWDOWN)
    if ratio.high >= limit:
        return Verdict.INCONCLUSIVE, f"latency up to {ratio.high:.2f} of the default's is possible: give more --pairs"
    return Verdict.PASS, "it keeps what it promises" if promised.ratio else "it promises no gain and costs none"


def check_profile(
    path: Path,
    model: str | None,
    text: Path | None,
    num_pairs: int,
    on_run: Callable[[str, Outcome], None],
    device: str | None = None,
) -> Checked:
    """Measure the profile and the default in turns, in fresh processes, on the text that the tuner confirms on.

    One for a GPU where there is none cannot be judged: nothing is measured then.

    Args:
        device: that computes. None: the GPU that the profile was tuned on, if there is one, else the CPU.
        model: None: the one that the profile names. text: a workload; None: the bundled one.
        num_pairs: at least `confirm.MIN_PAIRS`.
        on_run: told about every run, by name and outcome.

    Raises:
        ExpertFlowError: the profile, the model or the text cannot be used.
    """
    from harness.search.live import LiveTrial
    from harness.search.trial import TrialRunner, TrialSpec
    from runtime.devices import device_facts, find_device
    from runtime.facts import describe

    profile = load_profile(path)
    place = find_device(device, profile)
    if device is None and (reason := _is_elsewhere(profile, device_facts(place).device)):
        return Checked(Verdict.INVALID, reason, Promise.of(profile), None, None, 0, ())
    checkpoint = model or checkpoint_of(profile)
    if checkpoint is None:
        raise UsageError(f"{path} does not say where its model is; name it with --model")
    facts = describe(checkpoint)
    workload, other_text = _workload(text, profile)
    sizes, other_sizes = _sizes(profile)
    notes = (*_matched(profile, facts, place), *other_text, *other_sizes)
    unseen, warm_up = _cut(workload, checkpoint, sizes, num_pairs)
    concurrency = (profile.workload and profile.workload.concurrency) or _CONCURRENCY
    contenders = {DEFAULT: default_of(profile), PROFILE: configuration(profile, path.parent)}
    are_kept_open = _fit_together(profile, facts, place)
    with tempfile.TemporaryDirectory() as scratch:
        runner = TrialRunner(Path(scratch) / "check.log")
        specs = {
            name: TrialSpec(checkpoint, overrides, warm_up, concurrency, str(place))
            for name, overrides in contenders.items()
        }
        openers = {name: partial(LiveTrial, runner, spec, _TIMEOUT_S) for name, spec in specs.items()}
        turns = take_turns(openers, unseen, num_pairs, are_kept_open=are_kept_open, on_run=on_run)
    return _checked(Promise.of(profile), turns, min(len(unseen), num_pairs), notes)


def configuration(profile: Profile, folder: Path) -> dict[str, Any]:
    """Dotted keys and values of everything in a profile that acts; `folder` is where its artefact lies."""
    tree = profile.model_dump(exclude_none=True, include=_CONFIGURATION)
    found = {
        f"{section}.{key}" if key else section: value
        for section, keys in tree.items()
        for key, value in (keys if isinstance(keys, dict) else {"": keys}).items()
    }
    if profile.predictor.artifact is not None:
        found["predictor.artifact"] = str((folder / profile.predictor.artifact).absolute())
    return {**found, **_limits(profile)}


def default_of(profile: Profile) -> dict[str, Any]:
    """Dotted keys and values of what the profile was compared with: the default with the keys that the user set."""
    tree = profile.model_dump()
    return {**{key: _value(tree, key) for key in profile.fixed}, **_limits(profile)}


def _limits(profile: Profile) -> dict[str, Any]:
    """What holds for both."""
    limits, workload = profile.limits, profile.workload
    most_bytes, context = limits and limits.max_memory_bytes, workload and workload.context
    return {
        **({} if most_bytes is None else {"limits.max_memory_bytes": most_bytes}),
        **({} if context is None else {"workload.context": context}),
    }


def _value(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def _sizes(profile: Profile) -> tuple[Sizes, tuple[str, ...]]:
    """How much of the text one run takes: as when the profile was tuned, where it says so."""
    told = profile.workload
    if told is not None and told.prompt_tokens and told.output_tokens and told.num_requests:
        return Sizes(told.prompt_tokens, told.output_tokens, told.num_requests), ()
    sizes = largest_sizes((told and told.concurrency) or _CONCURRENCY)
    return sizes, (f"the profile does not say how long its runs were: {sizes}",)


def _is_elsewhere(profile: Profile, here: str) -> str:
    """Why a profile that was tuned on a GPU cannot be judged `here`; "" where it can."""
    if profile.gpu in (None, here):
        return ""
    return (
        f"it was tuned on {profile.gpu}, and here is {here}; --gpu N holds another GPU against the promise all the same"
    )


def _matched(profile: Profile, facts: ModelFacts, device: torch.device) -> tuple[str, ...]:
    """Why the promise may not hold here; ProfileError where it cannot."""
    from runtime.devices import device_facts

    found = match_profile(profile, facts.identity, device_facts(device))
    if found.level == "rejected":
        raise ProfileError(f"the profile is for another model or machine: {'; '.join(found.reasons)}")
    return () if found.level == "exact" else tuple(f"{found.level}: {reason}" for reason in found.reasons)


def _workload(path: Path | None, profile: Profile) -> tuple[Workload, tuple[str, ...]]:
    """The text to measure on, and a note where it is not the one that the profile was tuned on."""
    workload, told = load_workload(path), profile.workload
    if told is None or told.sha256 in (None, workload.sha256):
        return workload, ()
    if path is None and told.name != workload.name:
        raise UsageError(f"the profile was tuned on the workload {told.name}: give its file with --workload")
    return workload, (f"{workload.name} is not the text that the profile was tuned on",)


def _cut(
    workload: Workload, checkpoint: str, sizes: Sizes, num_pairs: int
) -> tuple[list[Segment], tuple[TokenRequest, ...]]:
    """Segments of the text that the tuner confirms on, and requests to warm up with."""
    from transformers.utils import logging

    from runtime.model import read_tokenizer

    logging.set_verbosity_error()  # texts longer than the model's context are cut anyway
    tokenizer = read_tokenizer(checkpoint)
    found = segments(workload, tokenizer, **asdict(sizes), num_segments=num_pairs)
    return found, cut(workload, tokenizer, **asdict(sizes), part="search")


def _fit_together(profile: Profile, facts: ModelFacts, device: torch.device) -> bool:
    """Whether both processes fit into the memory that is free; not known is no. On a GPU, with what CUDA takes for
    each, and their experts into the host's."""
    from runtime.devices import free_bytes, is_gpu
    from runtime.facts import cuda_buffer_bytes, planned_context

    baseline = profile.evidence.baseline if profile.evidence is not None else None
    peaks = [found.peak_memory_bytes if found is not None else None for found in (profile.objectives, baseline)]
    known = [peak for peak in peaks if peak is not None]
    room = machine.available_memory_bytes()
    if is_gpu(device):
        if 2 * facts.model_bytes > room:
            return False
        room = free_bytes(device) - 2 * cuda_buffer_bytes(facts, planned_context(profile))
    return len(known) == len(peaks) and sum(known) <= room


def _checked(promised: Promise, turns: Turns, num_segments: int, notes: Sequence[str]) -> Checked:
    runs, default = turns.runs[PROFILE], turns.runs[DEFAULT]
    notes = (*notes, *dict.fromkeys(note for run in runs for note in run.notes))
    if turns.failures:
        verdict = Verdict.INCONCLUSIVE if DEFAULT in turns.failures else Verdict.REGRESSION
        return Checked(verdict, "; ".join(turns.failures.values()), promised, None, None, num_segments, notes)
    ratio, peak = latency_ratio(runs, default), max(run.peak_memory_bytes for run in runs)
    return Checked(*judge(promised, ratio, peak), promised, ratio, peak, num_segments, notes)
