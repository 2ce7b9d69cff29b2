"""The report of a check, and the command around its layers."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from harness import check
from harness.checks.report import Finding, Report, Verdict


def _report(*verdicts: Verdict) -> Report:
    findings = tuple(Finding(f"n{i}", verdict, f"because | of {i}") for i, verdict in enumerate(verdicts))
    return Report("counters", findings, "python -m harness.check", ("a note",), (("measured", "1"),), {"more": 1})


P, R, N, X = Verdict.PASS, Verdict.REGRESSION, Verdict.INCONCLUSIVE, Verdict.INVALID


@pytest.mark.parametrize(
    ("verdicts", "worst"),
    [([P, P], P), ([P, N], N), ([N, X, P], X), ([X, R, N], R), ([R, P], R), ([], X)],
)
def test_the_weightiest_finding_decides(verdicts: list[Verdict], worst: Verdict) -> None:
    report = _report(*verdicts)
    assert report.verdict is worst
    assert report.as_dict()["verdict"] == worst.name.lower() and report.as_dict()["more"] == 1
    assert f"verdict    {worst.name.lower()}: " in report.describe()
    assert f"### counters: {worst.name.lower()}: " in report.markdown()


def test_exit_codes_are_those_of_the_design() -> None:
    assert [int(one) for one in (P, R, N, X)] == [0, 1, 3, 4]


def test_people_read_what_failed_and_json_has_everything() -> None:
    report = _report(*[P] * 30, R)
    assert "n30: because" in report.describe() and "n3:" not in report.describe()
    assert "regression: 1 of 31" in report.describe()
    assert "| n30 | regression | because \\| of 30 |" in report.markdown() and "- a note" in report.markdown()
    assert len(report.as_dict()["findings"]) == 31
    many = _report(*[R] * 30).describe()
    assert "and 10 more" in many and many.count("because") == 20


def test_junit_counts_every_verdict() -> None:
    suite = ET.fromstring(_report(P, R, N, X, R).junit())
    assert {name: suite.get(name) for name in ("tests", "failures", "skipped", "errors")} == {
        "tests": "5",
        "failures": "2",
        "skipped": "1",
        "errors": "1",
    }
    kinds = [[child.tag for child in case] for case in suite]
    assert kinds == [[], ["failure"], ["skipped"], ["error"], ["failure"]]
    assert suite[1][0].get("message") == "because | of 1"


def test_junit_is_xml_whatever_a_process_printed_last() -> None:
    words = "its last words: \x1b[31m\x00 \ud800 <no> & 'more'\nBye"
    (case,) = ET.fromstring(Report("paired", (Finding("n", R, words),), "again").junit())
    assert case[0].get("message") == r"its last words: \x1b[31m\x00 \ud800 <no> & 'more' Bye"


def test_the_command_writes_what_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [_report(P), _report(R)]
    (tmp_path / "s.md").write_bytes(b"others' \xff\n")
    monkeypatch.setattr(check, "_counters", lambda options: found.pop(0))
    files = ["--markdown", str(tmp_path / "s.md"), "--junit", str(tmp_path / "j.xml")]
    assert check.main(files) == 0 and check.main([*files, "--json"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1])["verdict"] == "regression"
    summary = (tmp_path / "s.md").read_bytes()
    assert summary.startswith(b"others' \xff\n### counters")
    assert summary.count(b"### counters") == 2  # several layers in one summary
    assert ET.parse(tmp_path / "j.xml").getroot().get("failures") == "1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bless"], "--bless needs --reason"),
        (["--bless", "--reason", " "], "--bless needs --reason"),
        (["--reason", "x"], "belongs to --bless"),
        (["--bless", "--reason", "x", "--junit", "x.xml"], "--bless checks nothing"),
        (["--pairs", "9"], "belongs to --base or --profile"),
        (["--base", "HEAD", "--pairs", "0"], "at least 1"),
        (["--base", "HEAD", "--pairs", "9"], "at least 10 are needed to decide"),
        (["--base", "HEAD", "--margin", "much"], "--margin 'much'"),
        (["--base", "HEAD", "--margin", "200%"], "--margin '200%'"),
        (["--aa"], "belongs to --base"),
        (["--series", "--model", "m"], "belongs to --profile"),
        (["--benchmark-json", "f"], "belongs to --base or --series"),
        (["--junit", "/dev/null/x"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_layers_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check.main(["--base", "HEAD", "--series"])
    assert ended.value.code == 2 and "not allowed with" in capsys.readouterr().err
