"""What the tuner tells a user in words: the plan, how a trial ended, the verdict, and why nothing can be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.report.run_file import RunFile, count_outcomes
from harness.search.objective import Objective
from harness.search.outcome import Kind, Limits, Outcome, Record, Tried
from harness.search.space import Knob, Space, Value
from runtime.machine import format_bytes

_MOST_CHOICES = 8


def configuration_text(params: Mapping[str, Value], default: Mapping[str, Value] | None = None) -> str:
    """Knobs and their values: "slots 40, group 8"; beside a `default`, those in which it differs."""
    known = {} if default is None else default
    shown = ", ".join(f"{name} {value}" for name, value in params.items() if known.get(name) != value)
    return shown or ("the only one" if default is None else "the default")


def duration_text(seconds: float) -> str:
    """ "1:05" or "2:00:05"."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def outcome_text(outcome: Outcome) -> str:
    """Latency and peak memory, or in words how it ended."""
    if outcome.kind is not Kind.OK:
        return _words(outcome.kind)
    measured = outcome.measurement
    return f"{measured.latency_ms_p50:7.1f} ms  {measured.peak_memory_bytes / 1e6:6.0f} MB"


def outcomes_text(outcomes: Mapping[str, int]) -> str:
    """ "31 ok, 2 out of memory"."""
    return ", ".join(f"{number} {_words(kind)}" for kind, number in outcomes.items()) or "no trial"


def limits_text(limits: Limits) -> str:
    """The limits as options of the command line; empty without any."""
    return ", ".join(text for text, _ in _limits(limits).values())


def infeasible_text(tried: Sequence[Tried], limits: Limits) -> str:
    """Which limits the closest configuration exceeds and by how much, where none of `tried` (at least one) is within.

    The closest is that with the least sum of what is above the limits, as shares of them.
    """
    closest = min(tried, key=lambda one: sum(max(0.0, value) for value in limits.excess(one).values()))
    excess = limits.excess(closest)
    values = {
        "memory": f"{closest.peak_memory_bytes / 1e6:.0f} MB",
        "slo_tpot": f"{closest.tpot_ms_p50 or 0:.1f} ms",
        "slo_ttft": f"{closest.ttft_ms_p50:.1f} ms",
    }
    above = " and ".join(
        f"{text} by {excess[name]:.1%} ({values[name]})"
        for name, (text, _) in _limits(limits).items()
        if excess[name] > 0
    )
    each = all(any(limits.excess(one)[name] <= 0 for one in tried) for name in excess)
    apart = "; each limit alone can be kept, but not all at once" if each else ""
    return f"the closest configuration ({configuration_text(closest.params)}) exceeds {above}{apart}"


def failures_text(records: Sequence[Record]) -> str:
    """Where nothing ran to its end: how often it ended how, and the last reason."""
    failed = [record.outcome for record in records if record.outcome.kind is not Kind.OK]
    if not failed:
        return "nothing was tried"
    return f"{outcomes_text(count_outcomes(records))}; the last one: {failed[-1].message or _words(failed[-1].kind)}"


def asked_text(run: RunFile) -> str:
    """What was tuned, and for what."""
    identity, text = run.match.model, run.workload
    model = "" if identity is None else f" ({identity.architecture}, {run.num_experts} experts)"
    limits = limits_text(run.limits) or f"none beyond the {run.memory} that was free"
    return (
        f"model      {run.provenance.model}{model}\n"
        f"device     {run.match.device}\n"
        f"wanted     {run.objective}; limits: {limits}\n"
        f"workload   {text.name}, {text.concurrency} requests outstanding"
    )


def verdict_text(run: RunFile) -> str:
    """What was chosen and how sure that is, in four lines at most."""
    what = "" if run.chosen is None else f"{configuration_text(run.chosen, run.default)}: "
    lines = [f"chosen     {what}{run.reason}"]
    if (confirmed := run.confirmed) is not None:
        ratio, name = confirmed.ratio, "latency" if confirmed.params == run.chosen else "the finalist's latency"
        sure = f"{ratio.confidence:.1%} interval, {confirmed.pairs} interleaved pairs"
        interval = f"{ratio.estimate:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
        lines.append(f"ratio      {name} {interval} of the default's ({sure})")
    if run.drift is not None:
        lines.append(f"drift      the default at the end took {run.drift:.2f} of its time at the start")
    lines.append(f"ended      {run.stop_reason}")
    return "\n".join(lines)


def plan_text(
    space: Space,
    *,
    fixed: Mapping[str, Any],
    objective: Objective,
    limits: Limits,
    trial: str,
    trial_s: float,
    budget_s: float,
    num_trials: int | None,
    confirm_s: float,
    share_infeasible: float,
) -> str:
    """What `--dry-run` prints.

    Args:
        fixed: profile keys that the user set. trial: what one trial runs; trial_s: how long by default.
        num_trials: most trials, or None. confirm_s: at most, after the search.
        share_infeasible: of the space, predicted not to fit into memory.
    """
    within = limits_text(limits) or "none beyond the memory that is free"
    most = max(1, int(budget_s / trial_s)) if trial_s > 0 else 1
    expected = most if num_trials is None else min(most, num_trials)
    search_s = min(budget_s, expected * trial_s)
    knobs = [(f"  {knob.name}", knob.key, _choices(knob)) for knob in space.knobs]
    kept = [("  fixed", key, str(value)) for key, value in fixed.items()]
    widths = [max(len(row[column]) for row in [*knobs, *kept, ("", "", "")]) for column in (0, 1)]
    rows = [f"{name:{widths[0]}}  {key:{widths[1]}}  {choices}" for name, key, choices in (*knobs, *kept)]
    return "\n".join(
        [
            f"objective  {objective}; limits: {within}",
            f"space      {space.size():,} configurations, {share_infeasible:.0%} of them predicted not to fit",
            *rows,
            f"trial      {trial}, about {trial_s:.0f} s by default",
            f"plan       the default first, then about {expected - 1} others within {duration_text(budget_s)},",
            "           then the best beside the default on other text",
            f"time       about {duration_text(search_s + confirm_s)}: {duration_text(search_s)} to search, "
            f"{duration_text(confirm_s)} to confirm",
        ]
    )


def _choices(knob: Knob) -> str:
    """The choices, the default in brackets."""
    shown = [f"[{value}]" if value == knob.default else str(value) for value in knob.choices]
    if len(shown) <= _MOST_CHOICES:
        return " ".join(shown)
    return f"{knob.choices[0]} … {knob.choices[-1]}, {len(shown)} choices [{knob.default}]"


def _words(kind: str) -> str:
    return str(kind).replace("_", " ")


def _limits(limits: Limits) -> dict[str, tuple[str, float]]:
    """Name in `Limits.excess` → option and value, those that are set."""
    options = {
        "memory": (f"--max-memory {format_bytes(limits.max_memory_bytes or 0)}", limits.max_memory_bytes),
        "slo_tpot": (f"--slo-tpot {limits.slo_tpot_ms or 0:g} ms", limits.slo_tpot_ms),
        "slo_ttft": (f"--slo-ttft {limits.slo_ttft_ms or 0:g} ms", limits.slo_ttft_ms),
    }
    return {name: (text, value) for name, (text, value) in options.items() if value is not None}
