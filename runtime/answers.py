"""What became of requests, for people or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from runtime.prompts import PromptRequest, RequestResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runtime.batch_stats import BatchResult


def answer(
    tokenizer: PreTrainedTokenizerBase, request: PromptRequest, result: RequestResult | None, as_json: bool
) -> str:
    """One request and what came of it, for people or as JSON. None: it was stopped before its first token."""
    token_ids = [] if result is None else list(result.token_ids)
    text = str(tokenizer.decode(token_ids, skip_special_tokens=True))
    if not as_json:
        return f"== {request.id} ({_figures(result)})\n{text}\n"
    slo_ms = None if request.slo_s is None else 1e3 * request.slo_s
    is_whole = result is not None and not result.is_cancelled
    return json.dumps(
        {
            "id": request.id,
            "task": request.task,
            "text": text,
            "token_ids": token_ids,
            "interrupted": not is_whole,
            "num_prompt_tokens": len(request.prompt_ids),
            "ttft_ms": result and result.ttft_ms,
            "tpot_ms": result and result.tpot_ms,
            "latency_ms_per_token": result and result.latency_ms,
            "total_ms": result and result.total_ms,
            "slo_ms": slo_ms,
            "slo_met": result.total_ms <= slo_ms if result is not None and is_whole and slo_ms is not None else None,
        }
    )


def batch_summary(run: BatchResult) -> str:
    """The run as a whole, for people."""
    decode = ""
    if run.decode_batch is not None and run.distinct_experts is not None:
        decode = f", {run.decode_batch:.1f} requests and {run.distinct_experts:.1f} experts per layer in a decode pass"
    return (
        f"requests   {len(run.requests)}, {run.tokens_per_s:.1f} tokens/s{decode}\n"
        f"planning   {run.planning_s:.3f} s, {run.hidden_planning_s:.3f} s of it beside a pass"
    )


def _figures(result: RequestResult | None) -> str:
    if result is None:
        return "interrupted before its first token"
    tpot = "" if result.tpot_ms is None else f", TPOT {result.tpot_ms:.1f} ms"
    cut = "interrupted, " if result.is_cancelled else ""
    return f"{cut}TTFT {result.ttft_ms:.0f} ms{tpot}, {result.num_tokens} tokens"
