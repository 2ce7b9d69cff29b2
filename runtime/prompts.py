"""Requests: what is asked of a model, what came of it, and the files that prompts are read from."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import PromptError
from runtime.schedulers.base import Request
from runtime.tasks import DEFAULT, task_of


@dataclass(frozen=True)
class PromptRequest:
    """One request.

    Attributes:
        id: unique among the requests of a run.
        prompt_ids: token ids, at least one.
        max_new_tokens: where generation stops at the latest, at least 1.
        task: what kind of request it is.
        slo_s: its answer should be complete that long after its arrival; None: whenever.
        arrival_s: when it arrives after the start of an open loop.
        output_ids: the real tokens that follow, for a replay (teacher forcing): each is fed instead of the predicted
            one, and the request ends with the last of them. They take the place of `max_new_tokens`.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int = 64
    task: str = DEFAULT
    slo_s: float | None = None
    arrival_s: float = 0.0
    output_ids: tuple[int, ...] | None = None

    @property
    def max_output_tokens(self) -> int:
        """Where it ends at the latest."""
        return self.max_new_tokens if self.output_ids is None else len(self.output_ids)

    @property
    def max_tokens(self) -> int:
        """KV entries that it takes at most: the last token is never fed."""
        return len(self.prompt_ids) + self.max_output_tokens - 1


@dataclass(frozen=True)
class RequestResult:
    """One request that is done; seconds since the start of its run, on the client's clock.

    Attributes:
        token_ids: its text after the prompt; the real one in a replay.
        predicted_ids: what the model found at each step; differs from `token_ids` only in a replay.
        is_cancelled: it was given up before its end.
    """

    id: str
    task: str
    arrival_s: float
    first_token_s: float
    finish_s: float
    token_ids: tuple[int, ...]
    predicted_ids: tuple[int, ...]
    is_cancelled: bool = False

    @property
    def num_tokens(self) -> int:
        """Output tokens."""
        return len(self.token_ids)

    @property
    def total_ms(self) -> float:
        """From its arrival to its last token."""
        return 1e3 * (self.finish_s - self.arrival_s)

    @property
    def latency_ms(self) -> float:
        """(finish - arrival) / output tokens: what a client sees, waiting included."""
        return self.total_ms / self.num_tokens

    @property
    def ttft_ms(self) -> float:
        """Time to first token, waiting included."""
        return 1e3 * (self.first_token_s - self.arrival_s)

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first; None for a request of one token."""
        return 1e3 * (self.finish_s - self.first_token_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None


class Served:
    """A request under way."""

    def __init__(self, request: PromptRequest, number: int, arrival_s: float) -> None:
        self.request, self.number, self.arrival_s = request, number, arrival_s
        self.token_ids: list[int] = []
        self.predicted_ids: list[int] = []
        self.first_token_s = self.last_token_s = 0.0

    def take(self, predicted: int) -> int:
        """The token that follows: the predicted one, in a replay the real one."""
        real = self.request.output_ids
        token = predicted if real is None else real[len(self.token_ids)]
        self.predicted_ids.append(predicted)
        self.token_ids.append(token)
        return token

    @property
    def context(self) -> tuple[int, ...]:
        """Token ids so far."""
        return (*self.request.prompt_ids, *self.token_ids)

    def as_request(self, left_to_prefill: int, coming: int = 0) -> Request:
        """As schedulers see it, once `coming` more tokens are out."""
        return Request(
            id=self.request.id,
            task=self.request.task,
            arrival_s=self.arrival_s,
            prompt_tokens=len(self.request.prompt_ids),
            left_to_prefill=left_to_prefill,
            output_tokens=len(self.token_ids) + coming,
            # A replay's end is no more known beforehand than that of other texts.
            max_output_tokens=max(self.request.max_output_tokens, self.request.max_new_tokens),
            slo_s=self.request.slo_s,
        )

    def result(self, now_s: float, is_cancelled: bool) -> RequestResult:
        """What became of it."""
        return RequestResult(
            id=self.request.id,
            task=self.request.task,
            arrival_s=self.arrival_s,
            first_token_s=self.first_token_s,
            finish_s=now_s,
            token_ids=tuple(self.token_ids),
            predicted_ids=tuple(self.predicted_ids),
            is_cancelled=is_cancelled,
        )


@dataclass(frozen=True)
class Prompt:
    """One line of a file of prompts; None: not said."""

    id: str
    text: str
    task: str = DEFAULT
    slo_s: float | None = None
    max_new_tokens: int | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Read JSON lines: `{"prompt", "id"?, "task"?, "slo_ms"?, "max_new_tokens"?}`; empty lines are skipped.

    A prompt without an id is named by its line number; one without a task has that of its keywords (`tasks.task_of`).

    Raises:
        PromptError: the file cannot be read or holds no prompt; a line is no such object or repeats an id.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not `splitlines`: U+2028 is text within JSON
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise PromptError(f"{path}: cannot read the prompts: {why}; give JSON lines in UTF-8") from error
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt = _prompt(line, number, f"{path}, line {number}")
        if prompt.id in prompts:
            raise PromptError(f"{path}, line {number}: the id {prompt.id!r} was used before; ids must differ")
        prompts[prompt.id] = prompt
    if not prompts:
        raise PromptError(f'{path}: the file is empty; each line must be an object such as {{"prompt": "…"}}')
    return list(prompts.values())


_FIELDS = ("id", "prompt", "task", "slo_ms", "max_new_tokens")


def _prompt(line: str, number: int, where: str) -> Prompt:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{where}: not JSON: {error}") from error
    except RecursionError:
        raise PromptError(f"{where}: not JSON that is read here: nested too deeply") from None
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise PromptError(f'{where}: no "prompt" with a text in it: {line[:60]}')
    if unknown := [name for name in found if name not in _FIELDS]:
        raise PromptError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(_FIELDS)}")
    if not found["prompt"]:
        raise PromptError(f"{where}: the prompt is empty; give at least one token of text")
    _check_text(found["prompt"], "prompt", where)
    slo_ms = _number(found, "slo_ms", where)
    length = _number(found, "max_new_tokens", where)
    if length is not None and length != int(length):
        raise PromptError(f"{where}: max_new_tokens is {length}, not a whole number")
    return Prompt(
        id=_name(found, "id", str(number), where),
        text=found["prompt"],
        task=_name(found, "task", task_of(found["prompt"]), where),
        slo_s=None if slo_ms is None else slo_ms / 1e3,
        max_new_tokens=None if length is None else int(length),
    )


def _name(found: dict[str, Any], name: str, default: str, where: str) -> str:
    value = found.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise PromptError(f"{where}: {name} is {value!r}, not a text")
    _check_text(str(value), name, where)
    return str(value)


def _check_text(text: str, name: str, where: str) -> None:
    """JSON can name half of a surrogate pair, which no file, terminal or tokenizer takes."""
    if half := re.search("[\ud800-\udfff]", text):
        raise PromptError(f"{where}: {name} has {half[0]!a} in it, which is no character")


def _number(found: dict[str, Any], name: str, where: str) -> float | None:
    value = found.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _LEAST <= value <= _MOST:
        raise PromptError(f"{where}: {name} is {value!r}, not a number above 0 (and up to {_MOST:.0e})")
    return value


_LEAST, _MOST = 1e-6, 1e12  # milliseconds or tokens: less is none, more than anyone waits for


def check_requests(requests: Sequence[PromptRequest], context: int | None) -> None:
    """Refuse requests that cannot be run.

    Args:
        context: tokens that the model can attend to; None: not known.

    Raises:
        PromptError: an id is used twice; a request has no prompt, nothing to generate, or more than `context` tokens.
    """
    seen = set()
    for request in requests:
        if request.id in seen:
            raise PromptError(f"the id {request.id!r} is used by two requests; ids must differ")
        seen.add(request.id)
        if not request.prompt_ids:
            raise PromptError(f"prompt {request.id!r} is empty; give at least one token of text")
        if request.max_output_tokens < 1:
            raise PromptError(f"prompt {request.id!r}: {request.max_output_tokens} new tokens; at least 1 is needed")
        length = len(request.prompt_ids) + request.max_output_tokens
        if context is not None and length > context:
            raise PromptError(
                f"prompt {request.id!r} has {len(request.prompt_ids)} tokens and {request.max_output_tokens} new ones, "
                f"more than the {context} of the model's context; shorten it or lower max_new_tokens"
            )
