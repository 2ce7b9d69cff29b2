"""One side of a soak, in a process of its own: `python -m harness.measure.soak_worker SPEC`, JSON lines on its output.

Each line gives the tokens of requests that are done, or a sample of the process; the last one what became of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from harness.measure.soak import Piece, Sample, Soak, rounds
from harness.measure.workload import load_workload, passages
from runtime import machine
from runtime.build import load, load_reference
from runtime.engine import Engine
from runtime.errors import ExpertFlowError
from runtime.facts import BUFFER_BYTES, describe, wanted_slots
from runtime.model import read_tokenizer
from runtime.profile import Profile, load_profile
from runtime.prompts import PromptRequest
from runtime.serving import run_batch


def main(arguments: Sequence[str]) -> int:
    """Run what the one argument says."""
    asked = json.loads(arguments[0])
    is_offloaded = asked.pop("kind") == "offloaded"
    soak = Soak(**asked)
    try:
        profile = Profile.default() if soak.profile is None else load_profile(soak.profile)
        text = _text(soak.model)  # before the promise: what this takes is not the engine's
        overrides = {**soak.overrides, **_promise(soak, profile.with_overrides(soak.overrides))}
        source = profile if soak.profile is None else soak.profile
        with (load if is_offloaded else load_reference)(source, soak.model, overrides=overrides) as engine:
            _run(engine, soak, text)
    except ExpertFlowError as error:
        _tell({"error": str(error)})
        return 2
    return 0


def _text(model: str) -> list[int]:
    """Token ids of the held-out text, all passages in a row."""
    tokenizer, texts = read_tokenizer(model), passages(load_workload(), None)
    return [token for one in texts for token in tokenizer(one.text, verbose=False)["input_ids"]]


def _tell(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _promise(soak: Soak, profile: Profile) -> dict[str, int]:
    """The limit of memory where the profile has none: what its slots, KV cache and everything else need."""
    if soak.max_memory_bytes is not None:
        return {"limits.max_memory_bytes": soak.max_memory_bytes}
    if profile.max_memory_bytes is not None:
        return {}
    facts, context = describe(soak.model), soak.prompt_tokens[1] + soak.output_tokens[1]
    kv_bytes = profile.cache.kv_bytes or machine.kv_cache_bytes(
        facts.config, context, profile.scheduler.num_sequences, facts.dtype.itemsize
    )
    needed = machine.required_bytes(
        facts.dense_bytes,
        min(wanted_slots(profile.cache.slots, facts.num_experts_total), facts.num_experts_total),
        facts.slot_bytes,
        kv_bytes,
        machine.resident_bytes() + BUFFER_BYTES,
    )
    return {"limits.max_memory_bytes": needed.total_bytes, "cache.kv_bytes": kv_bytes}


def _run(engine: Engine, soak: Soak, text: Sequence[int]) -> None:
    _tell({"sample": _sample(0)})
    done = 0
    for pieces in rounds(soak):
        requests = [_request(text, piece, done + number) for number, piece in enumerate(pieces)]
        _tell({"tokens": _alone(engine, requests[0]) if len(requests) == 1 else _together(engine, requests)})
        before, done = done, done + len(requests)
        if done // soak.sample_every > before // soak.sample_every or done == soak.num_requests:
            _tell({"sample": _sample(done)})
    integrity = ""
    try:
        engine.check_integrity()
    except AssertionError as error:
        integrity = str(error) or "an assertion failed"
    limits = engine.profile.limits
    assert limits is not None
    _tell(
        {
            "end": {
                "promise_bytes": limits.max_memory_bytes,
                "integrity": integrity,
                "facts": {"slots": engine.profile.cache.slots, "hit_rate": engine.stats().cache.hit_rate},
            }
        }
    )


def _request(text: Sequence[int], piece: Piece, number: int) -> PromptRequest:
    start = int(piece.start * (len(text) - piece.prompt_tokens))
    return PromptRequest(str(number), tuple(text[start : start + piece.prompt_tokens]), piece.output_tokens)


def _alone(engine: Engine, request: PromptRequest) -> dict[str, list[int]]:
    model: Any = engine.model
    ids = torch.tensor([request.prompt_ids], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, do_sample=False
        )
    return {request.id: output[0, ids.shape[1] :].tolist()}


def _together(engine: Engine, requests: Sequence[PromptRequest]) -> dict[str, list[int]]:
    return {result.id: list(result.token_ids) for result in run_batch(engine, requests).requests}


def _sample(num_requests: int) -> Sample:
    return Sample(
        num_requests,
        machine.resident_bytes(),
        machine.peak_resident_bytes(),
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
