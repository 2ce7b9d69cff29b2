"""How much the routing of each layer matters to each task: eMoE's offline measurement (arXiv 2503.06823).

The choice of experts is made random in more and more layers, beginning with the one nearest the input; the router's
weights stay. A layer is insensitive for a task while the output stays what it was. The paper compares generated texts
by BERT similarity, which is high for fluent texts whatever they say; here it is the model's own next-token
distributions on held-out text: the share of tokens whose likeliest next one is the same, and the mean KL divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from harness.fitting.base import FitOptions
from harness.measure.workload import Passage, Workload, load_workload
from runtime.build import load
from runtime.engine import Engine
from runtime.errors import UsageError
from runtime.facts import describe
from runtime.predictors.artifact import RoutingShape
from runtime.profile import Profile

THRESHOLD = 0.85
"""Agreement from which on a layer counts as insensitive; the paper's example."""
TEXTS, TEXT_TOKENS = 8, 128
"""Of each task: passages, and the tokens that are taken of each from its beginning."""

_LEAST_TOKENS = 2


@dataclass(frozen=True)
class Sensitivity:
    """Of one task.

    Attributes:
        num_tokens: next-token distributions that were compared.
        agreement: with the routing of layers 0 … l random, the share of them with the same likeliest token.
        kl_nats: likewise, their mean divergence KL(exact || random).
        threshold: agreement from which on a layer is insensitive.
    """

    num_tokens: int
    agreement: tuple[float, ...]
    kl_nats: tuple[float, ...]
    threshold: float = THRESHOLD

    @property
    def insensitive_layers(self) -> list[int]:
        """The first layers, as far as the agreement stays at the threshold or above."""
        below = (layer for layer, agreement in enumerate(self.agreement) if agreement < self.threshold)
        return list(range(next(below, len(self.agreement))))

    def as_params(self) -> dict[str, Any]:
        """As an artefact of `periodic` holds it."""
        return {
            "insensitive_layers": self.insensitive_layers,
            "agreement": [round(value, 4) for value in self.agreement],
            "kl_nats": [round(value, 4) for value in self.kl_nats],
            "num_tokens": self.num_tokens,
            "threshold": self.threshold,
        }


def sensitivity_of(
    checkpoint: str, texts: Path | None, shape: RoutingShape, options: FitOptions, *, threshold: float, quiet: bool
) -> dict[str, Sensitivity]:
    """`measure` a checkpoint, its experts offloaded where they do not fit the memory.

    Args:
        checkpoint: folder or hub id. texts: a workload with tasks; None: the bundled held-out text.
        shape: that it must have.

    Raises:
        ExpertFlowError: it cannot be loaded, is of another shape, or the texts cannot be used.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    workload, identity = load_workload(texts), describe(checkpoint).identity
    if (identity.layers, identity.experts, identity.top_k) != shape:
        raise UsageError(
            f"--sensitivity {checkpoint}: {identity.layers} layers x {identity.experts} experts, top-{identity.top_k}; "
            f"the traces are of a model of {shape.layers} x {shape.experts}, top-{shape.top_k}: give the same model"
        )
    overrides = {"predictor.kind": "none", "compute.threads": options.threads}
    with load(Profile.default(), checkpoint, overrides=overrides) as engine:
        return measure(engine, workload, threshold=threshold, seed=options.seed, quiet=quiet)


def measure(
    engine: Engine, workload: Workload, *, threshold: float = THRESHOLD, seed: int = 0, quiet: bool
) -> dict[str, Sensitivity]:
    """Measure every task of `workload`, with a progress bar on stderr unless `quiet`.

    Args:
        engine: offloaded or resident; its profile's kernels compute.

    Raises:
        UsageError: no passage has 2 tokens.
    """
    texts = _texts(engine, workload)
    num_layers = engine.routing_shape[0]
    generator = torch.Generator().manual_seed(seed)
    total = sum(map(len, texts.values())) * (1 + num_layers)
    with tqdm(total=total, unit="pass", desc="sensitivity", disable=quiet) as bar:
        found = {}
        for task, of_task in texts.items():
            bar.set_postfix_str(task)
            counted = [_compare(engine, ids, generator, bar.update) for ids in of_task]
            found[task] = _mean(counted, threshold)
    return found


def sensitivity_text(found: Mapping[str, Sensitivity]) -> str:
    """A table for people: by task and number of layers routed at random."""
    rows = {
        task: {
            "insensitive": f"{len(one.insensitive_layers)} of {len(one.agreement)}",
            **{
                str(layer): f"{agreement:.3f} ({kl_nats:.2f})"
                for layer, (agreement, kl_nats) in enumerate(zip(one.agreement, one.kl_nats, strict=True), 1)
            },
        }
        for task, one in found.items()
    }
    title = "agreement of the likeliest next token (KL divergence, nats), the first 1, 2, … layers routed at random"
    return f"{title}\n{pd.DataFrame.from_dict(rows, orient='index').to_string()}"


def _texts(engine: Engine, workload: Workload) -> dict[str, list[torch.Tensor]]:
    """Token ids [1, tokens] of some passages of each task."""
    texts: dict[str, list[torch.Tensor]] = {}
    for passage in workload.requests:
        of_task = texts.setdefault(passage.task, [])
        if len(of_task) == TEXTS:
            continue
        ids = _ids(engine, passage)
        if len(ids) >= _LEAST_TOKENS:
            of_task.append(torch.tensor([ids], device=engine.model.device))
    texts = {task: of_task for task, of_task in texts.items() if of_task}
    if not texts:
        raise UsageError(f"the texts of {workload.name} are too short to measure sensitivity on; 2 tokens are needed")
    return texts


def _ids(engine: Engine, passage: Passage) -> list[int]:
    ids: list[int] = engine.tokenizer(passage.text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[:TEXT_TOKENS]


class _Counted(NamedTuple):
    """Sums over the tokens of a text, by number of layers at random from 1."""

    num_tokens: int
    agreeing: list[float]
    kl_nats: list[float]


@torch.inference_mode()
def _compare(engine: Engine, ids: torch.Tensor, generator: torch.Generator, on_pass: Callable[[], object]) -> _Counted:
    num_layers, num_experts = engine.routing_shape
    exact = _log_probabilities(engine, ids)
    on_pass()
    agreeing, divergences = [], []
    for num_random in range(1, num_layers + 1):
        shuffle = partial(random_experts, num_experts, generator)
        with engine.rerouted(dict.fromkeys(range(num_random), shuffle)):
            other = _log_probabilities(engine, ids)
        on_pass()
        agreeing.append(float((exact.argmax(dim=-1) == other.argmax(dim=-1)).sum()))
        divergences.append(float((exact.exp() * (exact - other)).sum()))
    return _Counted(ids.shape[1], agreeing, divergences)


def _log_probabilities(engine: Engine, ids: torch.Tensor) -> torch.Tensor:
    """Of the next token after each, float32 [tokens, vocabulary]."""
    logits: torch.Tensor = engine.model(ids, use_cache=False).logits[0]
    return logits.float().log_softmax(dim=-1)


def random_experts(
    num_experts: int, generator: torch.Generator, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `Reroute`: as many distinct experts per token, drawn uniformly, with the router's weights."""
    drawn = torch.rand(len(index), num_experts, generator=generator).topk(index.shape[1], dim=1).indices
    return drawn.to(index), weights


def _mean(texts: Sequence[_Counted], threshold: float) -> Sensitivity:
    num_tokens = sum(text.num_tokens for text in texts)
    agreement, kl_nats = (
        tuple(sum(sums) / num_tokens for sums in zip(*(getattr(text, name) for text in texts), strict=True))
        for name in ("agreeing", "kl_nats")
    )
    return Sensitivity(num_tokens, agreement, kl_nats, threshold)
