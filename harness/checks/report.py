"""What a check found: verdicts, and the report that people, pull requests and CI systems read."""

from __future__ import annotations

import enum
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import one_line


class Verdict(enum.IntEnum):
    """Of a check; the value is the exit code (2 is a wrong command line)."""

    PASS = 0
    REGRESSION = 1
    INCONCLUSIVE = 3
    INVALID = 4
    """The environment does not let anything be measured."""


_WEIGHT = (Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.INVALID, Verdict.REGRESSION)
"""What decides where findings differ, the last one most: a regression stays one however noisy the rest is."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        reason: one line for people; what was expected and what was found where that differs.
        figures: for JSON.
    """

    name: str
    verdict: Verdict
    reason: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """A reason may quote what a process printed last: XML has no place for its control characters."""
        object.__setattr__(self, "reason", one_line(self.reason))


@dataclass(frozen=True)
class Report:
    """What one layer found.

    Attributes:
        layer: its name, such as "counters".
        notes: what the reader has to know beside the findings.
        reproduce: the command that does the same again.
        facts: what was measured and how, as names and values, for people.
        figures: of the whole layer, for JSON.
    """

    layer: str
    findings: tuple[Finding, ...]
    reproduce: str
    notes: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The weightiest of the findings; that nothing was checked is no pass."""
        return max((one.verdict for one in self.findings), key=_WEIGHT.index, default=Verdict.INVALID)

    @property
    def told(self) -> list[Finding]:
        """What is worth reading: everything that did not pass; where all did and they are few, those."""
        failed = [one for one in self.findings if one.verdict is not Verdict.PASS]
        return failed or (list(self.findings) if len(self.findings) <= _FEW else [])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        findings = [
            {"name": one.name, "verdict": one.verdict.name.lower(), "reason": one.reason, **one.figures}
            for one in self.findings
        ]
        return {
            "layer": self.layer,
            "verdict": self.verdict.name.lower(),
            "findings": findings,
            "notes": list(self.notes),
            "reproduce": self.reproduce,
            **self.figures,
        }

    def describe(self) -> str:
        """For people."""
        lines = [f"{name:<10} {value}" for name, value in (*(("note", note) for note in self.notes), *self.facts)]
        lines += [f"{one.verdict.name.lower():<12} {one.name}: {one.reason}" for one in self.told[:_MOST]]
        if len(self.told) > _MOST:
            lines.append(f"             … and {len(self.told) - _MOST} more (--json names all)")
        return "\n".join([*lines, f"verdict    {self._headline()}", f"again      {self.reproduce}"])

    def markdown(self) -> str:
        """A section for the summary of a pull request."""
        lines = [f"### {self.layer}: {self._headline()}", ""]
        if self.told:
            lines += ["| | verdict | |", "|---|---|---|"]
            lines += [
                f"| {_cell(one.name)} | {one.verdict.name.lower()} | {_cell(one.reason)} |" for one in self.told[:_MOST]
            ]
            if len(self.told) > _MOST:
                lines.append(f"| … | | {len(self.told) - _MOST} more |")
            lines.append("")
        lines += [f"- {name}: {value}" for name, value in self.facts]
        lines += [f"- {note}" for note in self.notes]
        return "\n".join([*lines, f"- again: `{self.reproduce}`", ""])

    def junit(self) -> str:
        """One test suite of JUnit XML: a regression is a failure, what could not be decided is skipped, what could not
        be measured an error."""
        suite = ET.Element("testsuite", name=f"harness.check.{self.layer}", tests=str(len(self.findings)))
        for verdict, attribute in (
            (Verdict.REGRESSION, "failures"),
            (Verdict.INVALID, "errors"),
            (Verdict.INCONCLUSIVE, "skipped"),
        ):
            suite.set(attribute, str(sum(one.verdict is verdict for one in self.findings)))
        for one in self.findings:
            case = ET.SubElement(suite, "testcase", classname=f"harness.check.{self.layer}", name=one.name)
            if (kind := _JUNIT.get(one.verdict)) is not None:
                ET.SubElement(case, kind, message=one.reason)
        return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"

    def _headline(self) -> str:
        bad = [one for one in self.findings if one.verdict is self.verdict]
        if not self.findings:
            return "invalid: nothing was checked"
        if self.verdict is Verdict.PASS:
            return f"pass: {len(self.findings)} checked"
        return f"{self.verdict.name.lower()}: {len(bad)} of {len(self.findings)}"


_FEW, _MOST = 12, 20
_JUNIT = {Verdict.REGRESSION: "failure", Verdict.INVALID: "error", Verdict.INCONCLUSIVE: "skipped"}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
