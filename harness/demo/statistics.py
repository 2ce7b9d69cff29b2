"""Routing statistics of a Qwen3-MoE model on labelled text, against the same model untrained.

`python -m harness.demo.statistics` prints the table of the model card. Hit rates are in it to show that an untrained
model flatters every cache; that routing is learned is shown by the loss, the lookahead and the expert-kind information.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from harness.demo.recipe import Recipe, build_model
from harness.demo.widen import bundled_model
from runtime.errors import cli_main

HELD_OUT = Path(__file__).parent / "heldout.jsonl"


@dataclass(frozen=True)
class Passage:
    """Token ids int64 [tokens] of one kind of text."""

    task: str
    tokens: torch.Tensor


@dataclass(frozen=True)
class Routing:
    """Routes of one passage: experts int64 [layers, tokens, top_k], and the lookahead's guess a layer earlier."""

    task: str
    experts: np.ndarray
    lookahead: np.ndarray
    loss: float


def load_passages(model: Path, per_task: int, max_tokens: int, path: Path = HELD_OUT) -> list[Passage]:
    """The first `per_task` passages of each kind in a workload file, cut to `max_tokens`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    taken: Counter[str] = Counter()
    passages = []
    for row in map(json.loads, path.read_text("utf-8").splitlines()):
        taken[row["task"]] += 1
        if taken[row["task"]] <= per_task:
            ids = tokenizer(row["text"], return_tensors="pt")["input_ids"][0, :max_tokens]
            passages.append(Passage(row["task"], ids))
    return passages


@torch.no_grad()
def observe(model: Qwen3MoeForCausalLM, passage: Passage) -> Routing:
    """Run one passage; `lookahead` [layers - 1, tokens, 2 top_k] is layer l + 1's router applied to layer l's input.

    That input is norm-corrected: divided by its own layer's norm weight and multiplied by the next one's.
    """
    inputs: list[torch.Tensor] = []
    layers = model.model.layers
    hooks = [layer.mlp.gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    output = model(input_ids=passage.tokens[None], output_router_logits=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    top_k = model.config.num_experts_per_tok
    experts = torch.stack([logits.topk(top_k).indices for logits in output.router_logits])
    ahead = []
    for layer, following, hidden in zip(layers[:-1], layers[1:], inputs[:-1], strict=True):
        scale = following.post_attention_layernorm.weight / layer.post_attention_layernorm.weight
        logits = functional.linear(hidden.reshape(-1, scale.shape[0]) * scale, following.mlp.gate.weight)
        ahead.append(logits.topk(2 * top_k).indices)
    loss = functional.cross_entropy(output.logits[0, :-1].float(), passage.tokens[1:]).item()
    return Routing(passage.task, experts.numpy(), torch.stack(ahead).numpy(), loss)


def recall(actual: np.ndarray, predicted: np.ndarray) -> float:
    """Fraction of `actual` [..., k] that is among `predicted` [..., n]."""
    return float((actual[..., :, None] == predicted[..., None, :]).any(-1).mean())


def lookahead_recall(routings: list[Routing], multiple: int = 1) -> float:
    """recall@(multiple * k) of the next layer's experts by gate lookahead, over all layers and tokens."""
    count = multiple * routings[0].experts.shape[-1]
    pairs = [(routing.experts[1:], routing.lookahead[..., :count]) for routing in routings]
    return float(np.mean([recall(actual, predicted) for actual, predicted in pairs]))


def linear_recall(routings: list[Routing], num_experts: int, multiple: int = 1) -> float:
    """recall@(multiple * k) of the next layer from this one's ids: least squares on even passages, tested on odd."""
    top_k = routings[0].experts.shape[-1]
    results = []
    for layer in range(routings[0].experts.shape[0] - 1):
        halves = [
            np.concatenate([routing.experts[layer : layer + 2] for routing in routings[part::2]], 1) for part in (0, 1)
        ]
        fit, test = (multi_hot(half, num_experts) for half in halves)
        weights = np.linalg.lstsq(fit[0], fit[1], rcond=None)[0]
        predicted = np.argsort(-(test[0] @ weights), axis=-1)[:, : multiple * top_k]
        results.append(recall(halves[1][1], predicted))
    return float(np.mean(results))


def multi_hot(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """[..., k] ids to float32 [..., experts] of zeros and ones."""
    flags = np.zeros((*experts.shape[:-1], num_experts), dtype=np.float32)
    np.put_along_axis(flags, experts, 1.0, axis=-1)
    return flags


def _use_by_kind(routings: list[Routing], num_experts: int) -> np.ndarray:
    """Share of each expert in a kind's choices, [layers, kinds, experts], each row summing to 1."""
    kinds = sorted({routing.task for routing in routings})
    use = np.zeros((routings[0].experts.shape[0], len(kinds), num_experts))
    for routing in routings:
        use[:, kinds.index(routing.task)] += multi_hot(routing.experts, num_experts).sum(1)
    shares: np.ndarray = use / use.sum(-1, keepdims=True)
    return shares


def _information(use: np.ndarray, model: np.ndarray) -> float:
    """Bits about the kind in an expert drawn from `use`, read by Bayes from the shares `model`; mean over layers."""
    kinds = use.shape[1]
    total = np.broadcast_to(model.sum(1, keepdims=True), model.shape)
    ratio = kinds * np.divide(model, total, out=np.full_like(model, 1 / kinds), where=total > 0)
    return float((use / kinds * np.log2(np.where(use > 0, np.maximum(ratio, 1e-9), 1))).sum((1, 2)).mean())


def domain_information(routings: list[Routing], num_experts: int) -> float:
    """Mutual information of expert and kind in bits, plug-in estimate, kinds weighted equally, mean over layers.

    Experts that belong to single passages count too, and an untrained model's do: compare `information_on_unseen_text`.
    """
    use = _use_by_kind(routings, num_experts)
    return _information(use, use)


def information_on_unseen_text(routings: list[Routing], num_experts: int) -> float:
    """Bits about the kind of unseen passages: shares fitted on even passages and read on odd ones, and the reverse.

    The fitted shares are mixed with their mean over kinds by the fraction that serves best, so 0 is the floor.
    Needs at least two passages of each kind.
    """
    even, odd = (_use_by_kind(routings[part::2], num_experts) for part in (0, 1))
    results = []
    for fit, test in ((even, odd), (odd, even)):
        mean = fit.mean(1, keepdims=True)
        results.append(max(_information(test, (1 - mix) * fit + mix * mean) for mix in np.linspace(0.02, 1, 50)))
    return float(np.mean(results))


def gini(use: np.ndarray) -> float:
    """Gini coefficient over the last axis, averaged over the others."""
    ordered = np.sort(use, axis=-1)
    count = use.shape[-1]
    weights = 2 * np.arange(1, count + 1) - count - 1
    return float(((ordered * weights).sum(-1) / (count * ordered.sum(-1))).mean())


def reuse(routings: list[Routing], distance: int) -> float:
    """P(an expert chosen at t is chosen again at t + distance in the same layer)."""
    pairs = [(routing.experts[:, :-distance], routing.experts[:, distance:]) for routing in routings]
    return float(np.mean([recall(earlier, later) for earlier, later in pairs]))


def chance_reuse(use: np.ndarray, top_k: int) -> float:
    """Reuse if tokens were independent: sum over experts of p^2 / k, p the probability that a token uses the expert."""
    probability = top_k * use / use.sum(-1, keepdims=True)
    return float((probability**2).sum(-1).mean() / top_k)


def hit_rate(steps: Iterable[Iterable[int]], slots: int, policy: str) -> float:
    """Hits of one layer's `slots` slots under lru, lfu or belady; a step's own experts are never its victims."""
    history = [list(map(int, step)) for step in steps]
    uses: dict[int, list[int]] = {}
    for time, step in reversed(list(enumerate(history))):
        for expert in step:
            uses.setdefault(expert, []).append(time)
    resident: dict[int, float] = {}
    frequency: Counter[int] = Counter()
    hits = 0
    for time, step in enumerate(history):
        for expert in step:
            hits += expert in resident
            frequency[expert] += 1
            uses[expert].pop()
            following = uses[expert][-1] if uses[expert] else len(history)
            resident[expert] = {"lru": time, "lfu": frequency[expert], "belady": -following}[policy]
            if len(resident) > slots:
                del resident[min((key for key in resident if key not in step), key=resident.__getitem__)]
    return hits / sum(map(len, history))


def _hit_rates(routings: list[Routing], slots: int) -> list[float]:
    together = np.concatenate([routing.experts for routing in routings], axis=1)
    return [
        float(np.mean([hit_rate(layer, slots, policy) for layer in together])) for policy in ("lru", "lfu", "belady")
    ]


def table(model: Qwen3MoeForCausalLM, passages: list[Passage]) -> dict[str, str]:
    """The rows of the model card for one model."""
    routings = [observe(model, passage) for passage in passages]
    experts, top_k = int(model.config.num_experts), int(model.config.num_experts_per_tok)
    within = np.stack([multi_hot(routing.experts, experts).sum(1) for routing in routings])
    overall = within.sum(0)
    pair = "{:.2f} / {:.2f}".format
    return {
        "held-out loss, nats per token": f"{np.mean([routing.loss for routing in routings]):.2f}",
        "gini of expert use: all text / within a passage": pair(gini(overall), gini(within)),
        "P(expert reused) at t+1 / t+8": pair(reuse(routings, 1), reuse(routings, 8)),
        "the same by chance": f"{chance_reuse(overall, top_k):.2f}",
        "hit rate at 25 %: LRU / LFU / Belady, per layer": " / ".join(
            f"{v:.2f}" for v in _hit_rates(routings, experts // 4)
        ),
        "hit rate at 50 %": " / ".join(f"{value:.2f}" for value in _hit_rates(routings, experts // 2)),
        "recall of the next layer from ids, @k / @2k (linear)": pair(
            *(linear_recall(routings, experts, n) for n in (1, 2))
        ),
        "gate lookahead one layer, @k / @2k": pair(*(lookahead_recall(routings, n) for n in (1, 2))),
        "mutual information expert-kind, bits": f"{domain_information(routings, experts):.2f}",
        "the same about unseen passages": f"{information_on_unseen_text(routings, experts):.2f}",
    }


def untrained_control() -> Qwen3MoeForCausalLM:
    """The same architecture with the recipe's initialisation, fixed seed."""
    model = build_model(replace(Recipe(), seed=1))
    model.eval()
    return model


def run(arguments: list[str] | None = None) -> None:
    """Print the table as markdown."""
    parser = argparse.ArgumentParser(prog="python -m harness.demo.statistics", description=__doc__)
    parser.add_argument("--model", type=Path, default=bundled_model())
    parser.add_argument("--passages", type=int, default=10, help="passages per kind")
    parser.add_argument("--max-tokens", type=int, default=600, help="tokens per passage")
    options = parser.parse_args(arguments)
    passages = load_passages(options.model, options.passages, options.max_tokens)
    trained = Qwen3MoeForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    columns = [table(model, passages) for model in (trained, untrained_control())]
    print("| | trained | untrained |\n|---|---|---|")
    for row, value in columns[0].items():
        print(f"| {row} | {value} | {columns[1][row]} |")


if __name__ == "__main__":
    raise SystemExit(cli_main(lambda: run()))
