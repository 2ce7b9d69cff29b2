"""Whether batched requests get the tokens that each gets alone, and how close it was where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runtime.engine import Engine
from runtime.prompts import PromptRequest
from runtime.schedulers.base import Scheduler
from runtime.serving import run_batch

MOST_MARGIN = 1e-4
"""Of logits in float32. Sums over several rows are made in another order than over one, which may turn a near tie."""


@dataclass(frozen=True)
class Difference:
    """Where two continuations of a prompt part, and by how much the model preferred its token to the next best."""

    request: str
    position: int
    margin: float


def first_difference(
    model: Any, request: PromptRequest, alone: Sequence[int], batched: Sequence[int]
) -> Difference | None:
    """None where the continuations are equal; the margin is between the two largest logits where they part."""
    equal = [one == other for one, other in zip(alone, batched, strict=False)]
    if all(equal) and len(alone) == len(batched):
        return None
    position = equal.index(False) if False in equal else len(equal)
    with torch.inference_mode():
        text = torch.tensor([[*request.prompt_ids, *alone[:position]]], device=model.device)
        best = model(text).logits[0, -1].float().topk(2).values
    return Difference(request.id, position, float(best[0] - best[1]))


@torch.inference_mode()
def generate_alone(engine: Engine, request: PromptRequest) -> list[int]:
    """What the model makes of the prompt by itself, greedily."""
    model: Any = engine.model
    ids = torch.tensor([request.prompt_ids], device=model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, do_sample=False
    )
    found: list[int] = output[0, ids.shape[1] :].tolist()
    return found


def differences(
    engine: Engine, requests: Sequence[PromptRequest], alone: Sequence[Sequence[int]], scheduler: Scheduler
) -> list[Difference]:
    """Every request whose text differs when all are served together."""
    served = run_batch(engine, requests, scheduler).requests
    found = (
        first_difference(engine.model, request, single, result.token_ids)
        for request, single, result in zip(requests, alone, served, strict=True)
    )
    return [difference for difference in found if difference is not None]
