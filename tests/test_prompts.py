"""Files of prompts: what they may hold, and how mistakes in them are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import PromptError
from runtime.prompts import Prompt, PromptRequest, RequestResult, Served, read_prompts


def _file(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_every_field_and_the_defaults(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        '{"id": "a", "prompt": "hello", "task": "chat", "slo_ms": 1500, "max_new_tokens": 7}',
        "",
        '{"prompt": "good\\nbye"}',
        '{"id": 12, "prompt": " "}',
    )
    assert read_prompts(path) == [Prompt("a", "hello", "chat", 1.5, 7), Prompt("3", "good\nbye"), Prompt("12", " ")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "line 2: not JSON"),
        ('"text"', 'line 2: no "prompt" with a text'),
        ('{"text": "hello"}', 'line 2: no "prompt" with a text'),
        ('{"prompt": 3}', 'line 2: no "prompt" with a text'),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        ('{"prompt": "b", "id": "a"}', "line 2: the id 'a' was used before"),
        ('{"prompt": "b", "id": null}', "line 2: id is None, not a text"),
        ('{"prompt": "b", "task": ["x"]}', "line 2: task is"),
        ('{"prompt": "b", "slo_ms": -1}', "line 2: slo_ms is -1, not a number above 0"),
        ('{"prompt": "b", "slo_ms": "1s"}', "line 2: slo_ms is '1s', not a number above 0"),
        ('{"prompt": "b", "max_new_tokens": 0}', "line 2: max_new_tokens is 0, not a number above 0"),
        ('{"prompt": "b", "max_new_tokens": 1.5}', "line 2: max_new_tokens is 1.5, not a whole number"),
        ('{"prompt": "b", "max_tokens": 4}', "line 2: unknown field 'max_tokens'; known are id, prompt"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    with pytest.raises(PromptError) as refused:
        read_prompts(_file(tmp_path, '{"id": "a", "prompt": "hello"}', line))
    assert reason in str(refused.value) and "prompts.jsonl" in str(refused.value)


def test_a_file_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="the file is empty"):
        read_prompts(_file(tmp_path, "", "  "))
    with pytest.raises(PromptError, match="cannot read the prompts"):
        read_prompts(tmp_path / "missing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="in UTF-8"):
        read_prompts(tmp_path / "binary")


@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    lines = [json.dumps({"prompt": text}) for text in texts]
    read = read_prompts(_file(tmp_path_factory.mktemp("prompts"), *lines))
    assert [prompt.text for prompt in read] == texts


def test_a_replay_takes_the_real_tokens() -> None:
    served = Served(PromptRequest("a", (1, 2), output_ids=(7, 8)), number=0, arrival_s=1.0)
    assert [served.take(5), served.take(6)] == [7, 8]
    assert served.context == (1, 2, 7, 8)
    result = served.result(3.0, is_cancelled=False)
    assert (result.token_ids, result.predicted_ids, result.num_tokens) == ((7, 8), (5, 6), 2)


def test_times_of_a_request() -> None:
    result = RequestResult(
        "a", "t", arrival_s=1.0, first_token_s=1.5, finish_s=3.5, token_ids=(1,) * 5, predicted_ids=()
    )
    assert (result.ttft_ms, result.tpot_ms, result.latency_ms, result.total_ms) == (500, 500, 500, 2500)
    single = RequestResult("a", "t", arrival_s=1.0, first_token_s=1.5, finish_s=1.5, token_ids=(1,), predicted_ids=())
    assert single.tpot_ms is None
