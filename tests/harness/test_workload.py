"""Workloads: reading, and cutting into requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.measure.workload import HELDOUT, Workload, WorkloadError, cut, load_workload


class Characters:
    """A tokenizer with one token per character."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}


def _write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    """Two tasks with four passages each, of 25 characters, each its own letter."""
    lines = [
        {"id": f"{task}{number}", "task": task, "text": chr(ord("a") + 4 * (task == "code") + number) * 25}
        for task in ("prose", "code")
        for number in range(4)
    ]
    return load_workload(_write(tmp_path / "mine.jsonl", lines))


def test_the_default_is_the_bundled_text() -> None:
    if not HELDOUT.exists():
        pytest.skip("the demo's held-out text is not there")
    workload = load_workload(None)
    assert workload.name == "heldout" and len({passage.task for passage in workload.requests}) > 1


def test_a_prompt_is_a_passage_too(tmp_path: Path) -> None:
    workload = load_workload(_write(tmp_path / "w.jsonl", [{"prompt": "hello"}]))
    assert (workload.requests[0].text, workload.requests[0].task) == ("hello", "default")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ('{"text": "a"}\n{"text": \n', "line 2, is not JSON"),
        ('{"id": 1}\n', "line 1, has neither"),
        ("[1]\n", "line 1, has neither"),
        ('{"text": 5}\n', "line 1, has neither"),
    ],
)
def test_a_bad_file_is_told_by_line(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(content)
    with pytest.raises(WorkloadError, match=told):
        load_workload(path)


def test_a_file_that_is_not_there_or_not_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="cannot be read"):
        load_workload(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match="UTF-8"):
        load_workload(tmp_path / "b.jsonl")


def test_requests_have_the_asked_lengths_and_take_turns_over_tasks(workload: Workload) -> None:
    requests = cut(workload, Characters(), prompt_tokens=6, output_tokens=4, num_requests=4, part="search")
    assert [request.task for request in requests] == ["prose", "code", "prose", "code"]
    assert {(len(r.prompt_ids), len(r.output_ids)) for r in requests} == {(6, 4)}
    assert len({request.id.split("#")[0] for request in requests}) == 4  # a second piece only when all gave a first


def test_the_output_continues_the_prompt(tmp_path: Path) -> None:
    workload = load_workload(_write(tmp_path / "w.jsonl", [{"text": "abcdefghij"}]))
    pieces = cut(workload, Characters(), prompt_tokens=3, output_tokens=2, num_requests=2, part="search")
    assert ["".join(map(chr, piece.prompt_ids + piece.output_ids)) for piece in pieces] == ["abcde", "fghij"]


def test_the_parts_share_no_passage(workload: Workload) -> None:
    options = {"prompt_tokens": 3, "output_tokens": 2, "num_requests": 20}
    search = {request.id.split("#")[0] for request in cut(workload, Characters(), part="search", **options)}
    confirm = {request.id.split("#")[0] for request in cut(workload, Characters(), part="confirm", **options)}
    assert len(search) == len(confirm) == 4 and not search & confirm


def test_lines_with_one_id_stay_in_one_part(tmp_path: Path) -> None:
    lines = [{"id": "same", "text": "abcd"}, {"id": "same", "text": "efgh"}, {"id": "other", "text": "ijkl"}]
    workload = load_workload(_write(tmp_path / "w.jsonl", lines))
    pieces = cut(workload, Characters(), prompt_tokens=2, output_tokens=2, num_requests=2, part="search")
    assert {piece.id for piece in pieces} == {"same#0"}


def test_cutting_is_deterministic(workload: Workload) -> None:
    options = {"prompt_tokens": 5, "output_tokens": 3, "num_requests": 7, "part": "confirm"}
    assert cut(workload, Characters(), **options) == cut(workload, Characters(), **options)


def test_too_little_text_says_how_much_there_is(workload: Workload) -> None:
    with pytest.raises(WorkloadError, match=r"for 8 of 9 requests of 10 tokens .* \(100 tokens in all\)"):
        cut(workload, Characters(), prompt_tokens=6, output_tokens=4, num_requests=9, part="search")
