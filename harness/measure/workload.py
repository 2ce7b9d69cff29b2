"""What is measured on: held-out text, cut into prompts and the real tokens that follow them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar

from runtime.errors import ExpertFlowError

HELDOUT = Path(__file__).parents[1] / "demo" / "heldout.jsonl"

Part = Literal["search", "confirm"]
_T = TypeVar("_T")


class WorkloadError(ExpertFlowError):
    """A workload that cannot be read, or that has too little text."""


@dataclass(frozen=True)
class Passage:
    """One text of a workload and the task it belongs to."""

    id: str
    task: str
    text: str


@dataclass(frozen=True)
class Workload:
    """A named set of passages; `sha256` is that of the file's bytes."""

    name: str
    sha256: str
    requests: tuple[Passage, ...]


@dataclass(frozen=True)
class TokenRequest:
    """A prompt and the real tokens that follow it, which a replay feeds back one by one."""

    id: str
    task: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]


def load_workload(path: Path | None = None) -> Workload:
    """Read a workload, by default the bundled held-out text.

    Args:
        path: JSON lines, each `{"id", "task", "text"}` or `{"prompt"}`; `id` and `task` may be left out.

    Raises:
        WorkloadError: the file cannot be read, is empty, or has a line that is not such an object.
    """
    path = HELDOUT if path is None else path
    try:
        data = path.read_bytes()
        lines = data.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"the workload {path} cannot be read: {error}; give a JSON-lines file in UTF-8") from error
    requests = tuple(_passage(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
    if not requests:
        raise WorkloadError(f'the workload {path} is empty; each line must be an object with "text" or "prompt"')
    return Workload(path.stem, hashlib.sha256(data).hexdigest(), requests)


def _passage(path: Path, number: int, line: str) -> Passage:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise WorkloadError(f"the workload {path}, line {number}, is not JSON: {error}") from error
    text = (found.get("text") or found.get("prompt")) if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise WorkloadError(f'the workload {path}, line {number}, has neither "text" nor "prompt": {line[:60]}')
    return Passage(str(found.get("id", number)), str(found.get("task", "default")), text)


def cut(
    workload: Workload,
    tokenizer: Any,
    *,
    prompt_tokens: int,
    output_tokens: int,
    num_requests: int,
    part: Part,
    most_requests: int | None = None,
) -> tuple[TokenRequest, ...]:
    """Take `num_requests` equally long requests out of one part of a workload; deterministic.

    The passages of each task belong alternately to the two parts, so no passage is in both. Tasks take turns. A passage
    gives as many requests as it has room for, but every passage gives its first before any gives its second.

    Args:
        tokenizer: a transformers tokenizer; no special tokens are added.
        prompt_tokens, output_tokens, num_requests: at least 1.
        part: "search" is tuned on, "confirm" is measured on.
        most_requests: take up to so many where there is text for them.

    Raises:
        WorkloadError: that part has too little text; the message says how much there is.
    """
    length = prompt_tokens + output_tokens
    rounds: list[list[list[TokenRequest]]] = []
    total = 0
    for passages in _by_task(workload, part).values():
        pieces = []
        for passage in passages:
            ids = tokenizer(passage.text, add_special_tokens=False, verbose=False)["input_ids"]
            total += len(ids)
            pieces.append(list(_pieces(passage, ids, prompt_tokens, length)))
        rounds.append([list(turn) for turn in _turns(pieces)])
    found = [request for turn in _turns([list(chain.from_iterable(task)) for task in rounds]) for request in turn]
    if len(found) < num_requests:
        raise WorkloadError(
            f"the workload {workload.name} has text for {len(found)} of {num_requests} requests of {length} tokens "
            f"in its {part} part ({total} tokens in all); ask for fewer or shorter requests, or give a longer workload"
        )
    return tuple(found[: max(num_requests, most_requests or 0)])


def segments(
    workload: Workload,
    tokenizer: Any,
    *,
    prompt_tokens: int,
    output_tokens: int,
    num_requests: int,
    num_segments: int,
    part: Part = "confirm",
) -> list[tuple[TokenRequest, ...]]:
    """Up to `num_segments` times `num_requests` requests of one part, no text twice; at least one segment. See `cut`.

    Raises:
        WorkloadError: that part has too little text for one segment.
    """
    found = cut(
        workload,
        tokenizer,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        num_requests=num_requests,
        most_requests=num_requests * num_segments,
        part=part,
    )
    return [found[i : i + num_requests] for i in range(0, len(found) - num_requests + 1, num_requests)]


def passages(workload: Workload, part: Part | None) -> list[Passage]:
    """The passages of one part, None: of both; tasks take turns."""
    return list(chain.from_iterable(_turns(list(_by_task(workload, part).values()))))


def _by_task(workload: Workload, part: Part | None) -> dict[str, list[Passage]]:
    """The passages of one part, or of both. Lines with one id stay together, whatever their task."""
    part_of: dict[str, int] = {}
    num_seen: dict[str, int] = {}
    chosen: dict[str, list[Passage]] = {}
    for passage in workload.requests:
        if passage.id not in part_of:
            part_of[passage.id] = num_seen.get(passage.task, 0) % 2
            num_seen[passage.task] = num_seen.get(passage.task, 0) + 1
        if part is None or part_of[passage.id] == (part == "confirm"):
            chosen.setdefault(passage.task, []).append(passage)
    return chosen


def _pieces(passage: Passage, ids: list[int], prompt_tokens: int, length: int) -> Iterator[TokenRequest]:
    for number, start in enumerate(range(0, len(ids) - length + 1, length)):
        piece = tuple(ids[start : start + length])
        yield TokenRequest(f"{passage.id}#{number}", passage.task, piece[:prompt_tokens], piece[prompt_tokens:])


def _turns(queues: list[list[_T]]) -> Iterator[list[_T]]:
    """The first of every queue, then the second of every queue that has one, and so on."""
    return ([one for one in turn if one is not None] for turn in zip_longest(*queues))
