"""Is the head slower than a base? Both run the head's benchmarks on this machine, in turns; see `pairs`.

Pairs whose surroundings changed are left out, and told. Time is not all: both sides must compute the same tokens,
and the head must not need more memory.
"""

from __future__ import annotations

import importlib.util
import math
import shlex
import signal
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

from harness.checks.decision import MARGIN, NUM_PAIRS, Samples, decide, judge_runner, noise_floor
from harness.checks.pairs import SIDES, Metric, PairedRun
from harness.checks.report import Finding, Report, Verdict
from harness.checks.side import Side
from harness.checks.worktrees import EnvironmentFailed, Tree, worktrees
from harness.measure.stats import median
from runtime.errors import UsageError
from runtime.machine import format_bytes

BENCHMARKS = Path("tests", "benchmarks")
MOST_DISTURBED = 0.2
"""Share of the pairs above which the machine does not let anything be said."""
PEAK_MARGIN = 0.02
"""By how much peak memory may grow: that of equal processes differs by less."""
_ROOT = Path(__file__).parents[2]


def report_of(
    run: PairedRun, trees: Mapping[str, Tree], *, margin: float, is_aa: bool, notes: Sequence[str], reproduce: str
) -> Report:
    """What the pairs say. Where too many were disturbed, nothing is said about time."""
    metrics = {name: metric for name, metric in run.metrics.items() if metric.pairs and name not in run.findings}
    findings = list(run.findings.values())
    samples = {name: metric.samples() for name, metric in metrics.items()}
    most = max((len(metric.pairs) for metric in metrics.values()), default=None)
    floors = noise_floor({name: metric.repeats() for name, metric in metrics.items()}, num_pairs=most)
    if (invalid := _invalid(metrics.values())) is not None:
        findings.append(invalid)
    else:
        known = floors if all(map(math.isfinite, floors.values())) else None  # not of a few pairs
        timed = judge_runner(samples, margin=margin) if is_aa else decide(samples, margin=margin, noise_floor=known)
        findings += [_with_rates(one, metrics[one.name], samples[one.name]) for one in timed]
    if is_aa:  # there is no head that could have become worse
        findings = [_without_head(one) for one in findings]
    else:
        findings += [_tokens(metrics.values()), _peak(run.peaks)]
    pairs = [pair for metric in metrics.values() for pair in metric.pairs]
    if num_disturbed := sum(bool(pair.disturbed) for pair in pairs):
        notes = (*notes, f"{num_disturbed} of {len(pairs)} pairs were disturbed; they are left out")
    sides = {name: {"commit": tree.commit} for name, tree in trees.items()}
    return Report(
        "paired",
        tuple(findings),
        reproduce,
        tuple(notes),
        tuple((name, tree.commit) for name, tree in trees.items()),
        {
            **sides,
            "margin": margin,
            "noise_floor": {name: floor if math.isfinite(floor) else None for name, floor in floors.items()},
            "peak_resident_bytes": {side: list(peaks.values()) for side, peaks in run.peaks.items()},
            "samples": {name: metric.as_dict() for name, metric in metrics.items()},
        },
    )


def _without_head(finding: Finding) -> Finding:
    """What is the base's own: it cannot run the head's new benchmarks, and need not."""
    if finding.verdict is not Verdict.REGRESSION:
        return finding
    if finding.figures.get("kind") == "missing":
        return replace(finding, verdict=Verdict.PASS, reason=f"not compared, new since the base: {finding.reason}")
    return replace(finding, verdict=Verdict.INVALID)


def _invalid(metrics: Collection[Metric]) -> Finding | None:
    """Why nothing can be said about time, if nothing can."""
    pairs = [pair for metric in metrics for pair in metric.pairs]
    if not pairs:
        return Finding("pairs", Verdict.INVALID, "nothing could be compared")
    disturbed = [pair.disturbed for pair in pairs if pair.disturbed]
    if len(disturbed) <= MOST_DISTURBED * len(pairs):
        return None
    why = f"{len(disturbed)} of {len(pairs)} pairs were disturbed, such as: {disturbed[-1]}"
    return Finding("surroundings", Verdict.INVALID, f"{why}; run it again when the machine is quieter")


def _with_rates(finding: Finding, metric: Metric, samples: Samples) -> Finding:
    """The finding with how much of the benchmark's work a second did on each side."""
    if not len(samples.base):
        return finding
    info = metric.info["head"][-1] if metric.info["head"] else {}
    base, head = (info.get("count", 1) / median(list(side)) for side in (samples.base, samples.head))
    return replace(finding, reason=f"{finding.reason}; {base:.4g} -> {head:.4g} {info.get('of', 'runs')}/s")


def _tokens(metrics: Collection[Metric]) -> Finding:
    """Whether both sides computed the same: a head that is fast and wrong is no better."""
    wrong, unsure, others, num_compared = list[str](), list[str](), list[str](), 0
    for metric in metrics:
        base, head = ({info["tokens"] for info in metric.info[side] if "tokens" in info} for side in SIDES)
        if not base or not head:
            continue
        num_compared += 1
        kernels = [metric.info[side][-1].get("kernels") for side in SIDES]
        if len(base) > 1:
            unsure.append(f"{metric.name}: the base itself computes other tokens from start to start")
        elif base != head and kernels[0] != kernels[1]:
            others.append(f"{metric.name}: other tokens by other kernels, {kernels[0]} -> {kernels[1]}")
        elif base != head:
            wrong.append(f"{metric.name}: the head computes other tokens than the base")
    verdict = Verdict.REGRESSION if wrong else Verdict.INCONCLUSIVE if unsure else Verdict.PASS
    told = [*wrong, *unsure, *others] or [f"equal in {num_compared} benchmarks"]
    return Finding("tokens", verdict, "; ".join(told))


def _peak(peaks: Mapping[str, Mapping[int, int]]) -> Finding:
    """Whether the head's processes need more memory: where all of them do, it is no accident."""
    pairs = [(bytes_, peaks["head"][couple]) for couple, bytes_ in peaks["base"].items() if couple in peaks["head"]]
    name, ratios = "peak memory", [head / base for base, head in pairs]
    if not pairs:
        return Finding(name, Verdict.PASS, "not known on this system")
    base, head = (format_bytes(round(median(side))) for side in zip(*pairs, strict=True))
    seen, most = f"{base} -> {head} in {len(pairs)} starts", 1 + PEAK_MARGIN
    if min(ratios) > most:
        return Finding(name, Verdict.REGRESSION, f"more than {PEAK_MARGIN:.0%} above the base's every time: {seen}")
    if median(ratios) > most:
        return Finding(name, Verdict.INCONCLUSIVE, f"more than {PEAK_MARGIN:.0%} above the base's, mostly: {seen}")
    return Finding(name, Verdict.PASS, seen)


def check_paired(
    base: str,
    *,
    num_pairs: int = NUM_PAIRS,
    margin: float = MARGIN,
    is_aa: bool = False,
    on_block: Callable[[str], None] = lambda line: None,
    only: Sequence[str] = (),
    root: Path = _ROOT,
) -> Report:
    """Compare the working tree at `root` with commit `base` by the benchmarks marked `paired`.

    Args:
        num_pairs: of each benchmark. margin: slowdown that is tolerated, 0.02 is 2 %.
        is_aa: compare the base with itself instead: how small a difference this machine can show.
        on_block: told a line after each pair.
        only: names of benchmarks; none: all.

    Raises:
        UsageError: no git clone, an unknown `base`, or no such benchmark.
    """
    if importlib.util.find_spec("pytest") is None:
        raise UsageError("--base runs benchmarks with pytest, which is not installed: pip install 'expertflow[ci]'")
    asked = ["--base", base, "--pairs", str(num_pairs), "--margin", f"{100 * margin:g}%"]
    asked += [*(["--aa"] if is_aa else []), *(option for name in only for option in ("--only", name))]
    reproduce = shlex.join(["python", "-m", "harness.check", *asked])
    try:
        with _terminated_in_order(), worktrees(root, base) as (base_tree, head_tree, notes):
            trees = {"base": base_tree, "head": replace(base_tree, name="head") if is_aa else head_tree}
            benchmarks = head_tree.path / BENCHMARKS
            if not benchmarks.is_dir():
                raise UsageError(f"there are no benchmarks in {BENCHMARKS}")
            with tempfile.TemporaryDirectory(prefix="expertflow-check-") as logs:
                opener = partial(_open, trees, head_tree.path, benchmarks, Path(logs))
                run = PairedRun(opener, num_pairs, on_block)
                run.run(only)
    except EnvironmentFailed as error:
        finding = Finding("environment", Verdict.INVALID, str(error))
        return Report("paired", (finding,), reproduce, figures={"head": {"commit": ""}, "samples": {}})
    return report_of(run, trees, margin=margin, is_aa=is_aa, notes=notes, reproduce=reproduce)


def _open(trees: dict[str, Tree], root: Path, benchmarks: Path, logs: Path, side: str) -> Side:
    return Side(trees[side], root, benchmarks, logs / side)


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """Within: SIGTERM, with which CI systems cancel, is as good as Ctrl-C, so that what was made is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
