"""What `harness.record` runs through an engine: held-out text, or prompts and what the model makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from harness.measure.runner import Decoder
from harness.measure.workload import Passage
from runtime.engine import Engine
from runtime.prompts import Prompt, PromptRequest

LEAST_PROMPT_TOKENS = 2  # a pass of one token is a decode step


def text_requests(
    passages: Iterable[Passage], tokenizer: Any, *, prompt_tokens: int, output_tokens: int
) -> list[PromptRequest]:
    """A request for each passage of 2 tokens or more: its first tokens, fewer where it is shorter.

    Args:
        tokenizer: a transformers tokenizer; no special tokens are added.
        prompt_tokens: prefilled in one pass, at least 2.
        output_tokens: real tokens that are decoded after them, one by one; 0: none.
    """
    requests = []
    for number, passage in enumerate(passages):
        ids = tokenizer(passage.text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids[: prompt_tokens + output_tokens]
        if len(ids) >= LEAST_PROMPT_TOKENS:
            requests.append(_replayed(f"{passage.id}#{number}", passage.task, ids[:prompt_tokens], ids[prompt_tokens:]))
    return requests


def prompt_requests(prompts: Iterable[Prompt], tokenizer: Any, max_new_tokens: int) -> list[PromptRequest]:
    """A request for each prompt, as `python -m runtime.generate` would run it."""
    return [
        PromptRequest(
            prompt.id,
            tuple(tokenizer(prompt.text, verbose=False)["input_ids"]),
            prompt.max_new_tokens or max_new_tokens,
            prompt.task,
        )
        for prompt in prompts
    ]


def bounded(requests: Iterable[PromptRequest], max_tokens: int) -> list[PromptRequest]:
    """The first requests, which together compute at most `max_tokens`; the last one is shortened to fit."""
    kept: list[PromptRequest] = []
    for request in requests:
        if fitting := _shortened(request, max_tokens):
            kept.append(fitting)
            max_tokens -= fitting.max_tokens
        if fitting is not request:
            break
    return kept


def run_requests(engine: Engine, requests: Sequence[PromptRequest], batch: int) -> None:
    """Compute `requests` one after the other, or `batch` at a time by continuous batching with the profile's scheduler.

    Raises:
        ExpertFlowError: whatever a pass raises.
    """
    if batch > 1:
        from runtime.schedulers.make import build_scheduler
        from runtime.serving import run_batch

        run_batch(engine, requests, build_scheduler(engine.profile), concurrency=batch)
        return
    for request in requests:
        if request.output_ids is None:
            _generate(engine.model, request)
        else:
            _feed(engine.model, request.prompt_ids, request.output_ids[:-1])


def _replayed(name: str, task: str, prompt: Sequence[int], text: Sequence[int]) -> PromptRequest:
    """Feeds all of `prompt` and `text`: the last of `output_ids` never is."""
    return PromptRequest(name, tuple(prompt), task=task, output_ids=(*text, (*prompt, *text)[-1]))


def _shortened(request: PromptRequest, max_tokens: int) -> PromptRequest | None:
    """`request`, computing at most `max_tokens`; None: it cannot."""
    num_prompt = len(request.prompt_ids)
    if request.max_tokens <= max_tokens:
        return request
    if request.output_ids is None:
        return replace(request, max_new_tokens=max_tokens - num_prompt + 1) if num_prompt <= max_tokens else None
    if max_tokens < LEAST_PROMPT_TOKENS:
        return None
    prompt, text = request.prompt_ids[:max_tokens], request.output_ids[: max(0, max_tokens - num_prompt)]
    return _replayed(request.id, request.task, prompt, text)


@torch.inference_mode()
def _feed(model: Any, prompt: Sequence[int], text: Sequence[int]) -> None:
    decoder = Decoder(model)
    for ids in (prompt, *([token] for token in text)):
        decoder.step(ids)


@torch.inference_mode()
def _generate(model: Any, request: PromptRequest) -> None:
    ids = torch.tensor([request.prompt_ids], device=model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, do_sample=False)
