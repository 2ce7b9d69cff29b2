"""The task of a prompt that does not name it: keywords in real phrasing, the named one first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.measure.workload import load_workload
from runtime.prompts import read_prompts
from runtime.tasks import DEFAULT, task_of


@pytest.mark.parametrize(
    ("task", "prompt"),
    [
        ("summarise", "Summarize the following article in two sentences: The full cost of damage in Newton Stewart…"),
        ("summarise", "Write a summary of this meeting."),
        ("summarise", "Please give me the TL;DR of the thread below."),
        ("classify", "What is the sentiment of this tweet? 'i cannot wait for tonight'"),
        ("classify", "Is the review positive or negative? I loved every minute of it."),
        ("classify", "Classify the email as spam or not spam."),
        ("classify", "Analyze the questions and assign them to one of these categories."),
        ("compare", "Compare the antitrust laws in US and China along with some case studies."),
        ("compare", "How similar are these two headlines, from 0 to 5?"),
        ("compare", "Do these sentences have the same meaning?"),
        ("compare", "Please explain the differences between exothermic and endothermic reactions."),
        ("converse", "Hi there! How are you today?"),
        ("converse", "User: my order has not arrived\nAssistant: I am sorry to hear that.\nUser: what now?"),
        ("converse", "Act as a math teacher. I will provide some mathematical equations."),
        ("converse", "Please assume the role of an English translator."),
        ("answer", "Which NFL team represented the AFC at Super Bowl 50?"),
        ("answer", "David has three sisters. Each of them has one brother. How many brothers does David have?"),
        ("answer", "Passage: The Normans were a people in Normandy.\nQuestion: their homeland"),
        ("answer", "What is the role of mitochondria in a cell?"),
        (DEFAULT, "Compose an engaging travel blog post about a recent trip to Hawaii."),
        (DEFAULT, "def has_close_elements(numbers, threshold):\n"),
        (DEFAULT, "Highland cattle graze in Chicago"),  # hi, chat and how are parts of words here
        (DEFAULT, " "),
    ],
)
def test_a_task_is_told_by_its_keywords(task: str, prompt: str) -> None:
    assert task_of(prompt) == task


def test_what_is_to_be_done_counts_more_than_what_with() -> None:
    assert task_of("Summarise this conversation: Hi, how are you?") == "summarise"
    assert task_of("What are the differences between a sentiment and an emotion?") == "classify"


def test_only_the_ends_of_a_long_prompt_are_looked_at() -> None:
    text = "the company reported its results for the third quarter " * 40
    assert task_of(f"Summarise: {text}") == "summarise"
    assert task_of(f"{text} Summarise the above.") == "summarise"
    assert task_of(f"{text} a summary {text}") == DEFAULT


def test_a_named_task_is_kept_and_others_are_told(tmp_path: Path) -> None:
    prompt = "Summarise the following article."
    lines = [{"prompt": prompt, "task": "mine"}, {"prompt": prompt}, {"prompt": "Once upon a time"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert [read.task for read in read_prompts(path)] == ["mine", "summarise", DEFAULT]


def test_the_bundled_text_keeps_its_own_labels() -> None:
    tasks = {passage.task for passage in load_workload().requests}
    assert tasks == {"english", "python", "go", "docs", "maths", "spanish", "german"}
