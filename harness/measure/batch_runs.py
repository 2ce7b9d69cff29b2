"""Schedulers side by side: one engine in a process of its own serves the same requests with each, interleaved.

One engine for all, because the processes of one configuration differ by as much as the schedulers do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.measure.blocks import Asked, block_order
from harness.measure.pages import drop_pages
from harness.measure.stats import median
from harness.measure.workload import TokenRequest
from runtime.prompts import PromptRequest

TIMEOUT_S = 900.0
Sample = dict[str, Any]


@dataclass
class Arm:
    """One scheduler and its measurements: `samples[b]` is block b's.

    Attributes:
        scheduler: keys of a profile's `scheduler` section.
        artifact: a trained routing path predictor that tells it the routes.
    """

    name: str
    scheduler: Mapping[str, Any]
    artifact: str | None = None
    samples: dict[int, Sample] = field(default_factory=dict)

    def figures(self, name: str) -> dict[int, float]:
        """One figure per block."""
        return {block: sample[name] for block, sample in self.samples.items()}


def replayed(text: TokenRequest, num_tokens: int, max_new_tokens: int) -> PromptRequest:
    """A replay of the first output tokens of a text; the scheduler is told how many it may have at most."""
    return PromptRequest(text.id, text.prompt_ids, max_new_tokens, text.task, output_ids=text.output_ids[:num_tokens])


def serve(
    process: Asked, requests: Sequence[PromptRequest], scheduler: Mapping[str, Any], concurrency: int | None,
    artifact: str | None = None,
) -> Sample:  # fmt: skip
    """One run. Adds to what the contender answers: `latency_ms_p50`, over requests of (finish - arrival) / tokens, and
    `loads_per_token`, experts loaded per output token, those of the prompts included.

    Raises:
        ContenderFailed: as `ask`.
    """
    sample = process.ask(
        "serve",
        timeout_s=TIMEOUT_S,
        requests=[asdict(request) for request in requests],
        scheduler=dict(scheduler),
        concurrency=concurrency,
        artifact=artifact,
    )
    latencies = [1e3 * (one["finish_s"] - one["arrival_s"]) / one["num_tokens"] for one in sample["requests"]]
    num_tokens = sum(one["num_tokens"] for one in sample["requests"])
    loads_per_token = sample["stats"]["num_loads"] / num_tokens
    return {**sample, "latency_ms_p50": median(latencies), "loads_per_token": loads_per_token}


def run_arms(
    process: Asked,
    arms: Sequence[Arm],
    blocks: Sequence[Sequence[PromptRequest]],
    concurrency: int | None,
    files: Sequence[Path],
    on_sample: Callable[[], object],
    on_block: Callable[[], object],
) -> None:
    """Serve every block with every arm: A B B A, and so on.

    Args:
        files: of the checkpoint; their page cache is dropped before each run.
        on_sample, on_block: called after each run and each block.
    """
    for block, requests in enumerate(blocks):
        for arm in block_order(arms, block):
            drop_pages(files)
            arm.samples[block] = serve(process, requests, arm.scheduler, concurrency, arm.artifact)
            on_sample()
        on_block()
