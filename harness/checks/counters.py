"""What the engine decides, counted on a virtual clock and compared with what is committed: any difference fails.

The decisions are the engine's own code, no time is measured, and so the same commit counts the same on every machine.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness.checks.goldens import (
    TRACE_NAME,
    Blessing,
    Goldens,
    TraceId,
    described,
    differing,
    read_goldens,
    totals,
    trace_id,
    write_goldens,
)
from harness.checks.report import Finding, Report, Verdict
from harness.checks.scenarios import Counts, count_scenarios, num_scenarios
from harness.measure.provenance import commit
from runtime.errors import UsageError
from runtime.trace import read_trace

_MOST_TOLD = 4
"""Counters of one scenario that its line names."""


def check_counters(goldens: Path) -> Report:
    """Replay every scenario and compare its counters with those in the file `goldens`, beside which its trace lies.

    Raises:
        UsageError, TraceError: there is nothing to compare with, or to replay.
    """
    golden = read_goldens(goldens)
    trace = _trace_id(goldens)
    if trace != golden.trace:
        finding = Finding(
            TRACE_NAME,
            Verdict.INVALID,
            f"not the trace of the goldens (sha256 {trace.sha256[:12]}, golden {golden.trace.sha256[:12]}): every "
            f"counter differs; restore it (git checkout), or {_blessing(goldens)}",
        )
        return Report("counters", (finding,), _command(goldens))
    found = _counted(goldens)
    findings = tuple(_findings(golden.counters, found))
    failed = sum(finding.verdict is not Verdict.PASS for finding in findings)
    return Report("counters", findings, _command(goldens), _notes(golden, found, goldens) if failed else ())


def bless(goldens: Path, reason: str) -> str:
    """Make what the counters are now the committed ones, and keep `reason` with them; what changed, for people.

    Nothing is written where nothing changed. Counters that are the same but for rounding stay as they are in the file.

    Raises:
        UsageError: no reason, or a file that is not one of counters or cannot be written.
        TraceError: there is nothing to replay.
    """
    if not reason.strip():
        raise UsageError("a reason is needed: it is kept with the counters, for those who read the diff")
    golden = read_goldens(goldens) if goldens.exists() else None
    trace, found = _trace_id(goldens), _counted(goldens)
    before: Mapping[str, Counts] = golden.counters if golden else {}
    changed = [name for name in found if name in before and differing(before[name], found[name])]
    added, removed = found.keys() - before.keys(), before.keys() - found.keys()
    if golden is not None and not changed and not added and not removed and trace == golden.trace:
        return f"nothing changed: {len(found)} scenarios are as in {goldens}, which stays as it is"
    sums = totals(before, found)
    numbers: dict[str, Any] = {"scenarios": len(changed), "added": len(added), "removed": len(removed), **sums}
    entry = Blessing(
        date=datetime.now(UTC).date().isoformat(), reason=" ".join(reason.split()), commit=commit(), changed=numbers
    )
    kept = {name: counts if name in changed or name in added else before[name] for name, counts in found.items()}
    write_goldens(
        goldens,
        Goldens(
            trace=trace,
            history=(*(golden.history if golden else ()), entry),
            counters={name: dict(counts) for name, counts in kept.items()},
        ),
    )
    counted = f"{len(changed)} of {len(found)} scenarios changed, {len(added)} added, {len(removed)} removed"
    return "\n".join([counted, *(described(name, *pair) for name, pair in sums.items()), f"written to {goldens}"])


def _trace_id(goldens: Path) -> TraceId:
    path = goldens.with_name(TRACE_NAME)
    if not path.is_file():
        raise UsageError(f"{path}: the trace that is replayed is not there; run this in a checkout of the repository")
    return trace_id(path)


def _counted(goldens: Path) -> dict[str, Counts]:
    trace = read_trace(goldens.with_name(TRACE_NAME))
    with tqdm(total=num_scenarios(), unit="scenario", desc="replaying", disable=not sys.stderr.isatty()) as bar:
        return count_scenarios(trace, bar.update)


def _findings(golden: Mapping[str, Counts], found: Mapping[str, Counts]) -> Iterator[Finding]:
    for name, counts in found.items():
        if name not in golden:
            yield Finding(name, Verdict.REGRESSION, "not in the goldens", {"found": counts})
        elif names := differing(golden[name], counts):
            told = [described(one, golden[name].get(one), counts.get(one)) for one in names[:_MOST_TOLD]]
            more = [f"{len(names) - _MOST_TOLD} more"] if len(names) > _MOST_TOLD else []
            both = {"golden": golden[name], "found": counts}
            yield Finding(name, Verdict.REGRESSION, "; ".join([*told, *more]), both)
        else:
            yield Finding(name, Verdict.PASS, "as committed", {"found": counts})
    for name in [name for name in golden if name not in found]:
        yield Finding(name, Verdict.REGRESSION, "in the goldens, but no longer counted", {"golden": golden[name]})


def _notes(golden: Goldens, found: Mapping[str, Counts], goldens: Path) -> tuple[str, ...]:
    sums = [described(name, *pair) for name, pair in totals(golden.counters, found).items()]
    overall = (f"scenarios that differ, added up: {'; '.join(sums)}",) if sums else ()
    return (*overall, f"if decisions are meant to differ: {_blessing(goldens)}")


def _command(goldens: Path) -> str:
    return shlex.join(["python", "-m", "harness.check", "--goldens", str(goldens)])


def _blessing(goldens: Path) -> str:
    return f'{_command(goldens)} --bless --reason "why"'
