"""Train the demo model: `python -m harness.demo.train --out DIR [--root DEBIAN_ROOT]`.

A byte-level BPE of 4,096 and a Qwen3-MoE of 8 layers x 32 experts, top-4. Data-parallel over processes of one thread each (threads
scale badly at these sizes). Batches are a pure function of (seed, step, rank) and checkpoints hold the optimiser, so a run that was
stopped resumes exactly: the same command again. The recipe: AdamW (.9, .95), cosine, per-layer balance loss, router z-loss.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from harness.demo import corpus as text
from harness.demo.errors import DemoError

END_OF_TEXT = "<|endoftext|>"
# Fractions of the training sequences per kind: german is small (about four passes over it), so it gets less.
KIND_WEIGHTS = {"english": 0.19, "spanish": 0.15, "german": 0.06, "python": 0.18, "go": 0.16, "docs": 0.14, "maths": 0.12}


@dataclass(frozen=True)
class Stage:
    """`steps` optimiser steps at `batch` sequences of `sequence` tokens per process."""

    steps: int
    batch: int
    sequence: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result. Token counts assume `processes` data-parallel processes."""

    stages: tuple[Stage, ...] = (Stage(1930, 8, 256), Stage(640, 1, 2048))
    processes: int = 2
    seed: int = 0
    learning_rate: float = 3e-3
    final_fraction: float = 0.05
    warmup_steps: int = 60
    weight_decay: float = 0.05
    clip: float = 1.0
    balance: float = 0.01
    z_loss: float = 1e-3
    init_std: float = 0.08
    small_init_std: float = 0.02
    checkpoint_every: int = 100
    evaluate_every: int = 100
    model: dict[str, Any] = field(default_factory=lambda: dict(MODEL))

    @property
    def num_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(step)

    def tokens_at(self, step: int) -> int:
        """Tokens seen after `step` steps, over all processes."""
        total = 0
        for stage in self.stages:
            total += min(step, stage.steps) * stage.batch * stage.sequence * self.processes
            step = max(step - stage.steps, 0)
        return total

    def rate(self, step: int) -> float:
        warm = min((step + 1) / self.warmup_steps, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
        return self.learning_rate * warm * (self.final_fraction + (1 - self.final_fraction) * cosine)


MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def build_model(recipe: Recipe) -> Qwen3MoeForCausalLM:
    """A freshly initialised fp32 model; the untrained control of the tests is this with the same seed."""
    torch.manual_seed(recipe.seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**recipe.model)).float()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            small = "embed" in name or name.endswith("mlp.gate.weight")
            torch.nn.init.normal_(parameter, std=recipe.small_init_std if small else recipe.init_std)
    model.set_experts_implementation("grouped_mm")
    return model


def routing_losses(router_logits: tuple[torch.Tensor, ...], top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(balance, z): mean over layers of E * sum_e f_e P_e (Switch Transformer eq. 4, per layer) and of logsumexp^2 (ST-MoE eq. 5)."""
    balance, z_loss = [], []
    for logits in router_logits:
        experts = logits.shape[-1]
        chosen = logits.topk(top_k, dim=-1).indices.flatten()
        share = torch.bincount(chosen, minlength=experts).to(logits.dtype) / chosen.numel()
        balance.append(experts * (share * logits.softmax(-1).mean(0)).sum())
        z_loss.append(logits.logsumexp(-1).square().mean())
    return torch.stack(balance).mean(), torch.stack(z_loss).mean()


def forward_losses(model: Qwen3MoeForCausalLM, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cross-entropy in nats per token, balance, z) of int64 tokens [batch, sequence + 1]."""
    output = model.model(input_ids=tokens[:, :-1], use_cache=False, output_router_logits=True)
    logits = model.lm_head(output.last_hidden_state)
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss, *routing_losses(output.router_logits, model.config.num_experts_per_tok)


class Streams:
    """Token streams per kind, memory-mapped uint16, and the batches drawn from them."""

    def __init__(self, folder: Path, weights: dict[str, float]) -> None:
        self.weights = weights
        self.train = {kind: np.load(folder / f"train_{kind}.npy", mmap_mode="r") for kind in weights}
        self.held_out = {kind: np.load(folder / f"held_out_{kind}.npy", mmap_mode="r") for kind in weights}

    def batch(self, seed: int, step: int, rank: int, stage: Stage) -> torch.Tensor:
        """int64 [batch, sequence + 1]; each sequence from one kind; a pure function of the arguments."""
        generator = np.random.default_rng([seed, step, rank])
        kinds = generator.choice(list(self.weights), size=stage.batch, p=list(self.weights.values()))
        rows = []
        for kind in kinds:
            stream = self.train[str(kind)]
            start = int(generator.integers(0, len(stream) - stage.sequence))
            rows.append(stream[start : start + stage.sequence + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))

    def evaluation(self, kind: str, sequence: int, max_tokens: int) -> torch.Tensor:
        """The first held-out windows of a kind, int64 [n, sequence + 1]."""
        stream = self.held_out[kind][: max_tokens + 1]
        rows = [stream[at : at + sequence + 1] for at in range(0, len(stream) - sequence, sequence)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def train_tokenizer(documents: list[text.Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on at most 600,000 characters of each kind, so that no kind crowds out another."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    budget = dict.fromkeys(KIND_WEIGHTS, 600_000)
    sample = []
    for document in documents:
        if budget.get(document.kind, 0) > 0:
            budget[document.kind] -= len(document.text)
            sample.append(document.text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=4096
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """uint16 stream of all texts, each followed by the end-of-text token."""
    ids = tokenizer(texts)["input_ids"] if texts else []
    return np.array([token for row in ids for token in [*row, tokenizer.eos_token_id]], dtype=np.uint16)


def prepare(out: Path, root: Path) -> None:
    """Corpus, tokenizer and token streams under `out`; done once (a later start finds `out/streams/done`)."""
    streams = out / "streams"
    if (streams / "done").exists():
        return
    streams.mkdir(parents=True, exist_ok=True)
    corpus = text.build(root)
    tokenizer = train_tokenizer(corpus.train, MODEL["vocab_size"])
    tokenizer.save_pretrained(out / "tokenizer")
    for kind in text.KINDS:
        for side, documents in (("train", corpus.train), ("held_out", corpus.held_out)):
            np.save(streams / f"{side}_{kind}.npy", encode(tokenizer, [d.text for d in documents if d.kind == kind]))
    with (streams / "held_out.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in corpus.held_out)
    (streams / "done").touch()


@torch.no_grad()
def evaluate(model: Qwen3MoeForCausalLM, streams: Streams, sequence: int, max_tokens: int = 4096) -> dict[str, float]:
    """Held-out cross-entropy per kind, nats per token, over the same windows every time."""
    model.eval()
    losses = {}
    for kind in streams.weights:
        windows = streams.evaluation(kind, sequence, max_tokens)
        losses[kind] = float(np.mean([forward_losses(model, part)[0].item() for part in windows.split(8)]))
    model.train()
    return losses


def _average_gradients(model: torch.nn.Module, processes: int) -> None:
    if processes == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= processes
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class Trainer:
    """One process of the run: model, optimiser, batches, and on rank 0 the checkpoint and the loss curve."""

    def __init__(self, recipe: Recipe, out: Path, rank: int, streams: Streams) -> None:
        self.recipe, self.out, self.rank, self.streams = recipe, out, rank, streams
        self.model = build_model(recipe)
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
        self.curve: list[dict[str, float]] = []
        self.first_step = 0
        self._resume()

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        if state["recipe"] != json.dumps(asdict(self.recipe), sort_keys=True):
            raise DemoError(f"{self.checkpoint} was made with another recipe: remove it, or choose another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curve, self.first_step = state["curve"], state["step"]

    def save(self, step: int) -> None:
        """Checkpoint and loss_curve.csv, each replaced in one rename."""
        state = {
            "recipe": json.dumps(asdict(self.recipe), sort_keys=True),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curve": self.curve,
            "step": step,
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)
        write_curve(self.curve, self.out / "loss_curve.csv")

    def step(self, step: int) -> float:
        """One optimiser step; returns this process's cross-entropy."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss, balance, z_loss = forward_losses(
            self.model, self.streams.batch(recipe.seed, step, self.rank, recipe.stage(step))
        )
        (loss + recipe.balance * balance + recipe.z_loss * z_loss).backward()
        _average_gradients(self.model, recipe.processes)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _record(self, step: int, train_loss: float) -> None:
        sequence = self.recipe.stage(step - 1).sequence
        held_out = evaluate(self.model, self.streams, min(sequence, 1024))
        point = {"step": step, "tokens": self.recipe.tokens_at(step), "sequence": sequence, "train": train_loss}
        self.curve.append(point | held_out)

    def run(self, stop_after: int | None = None) -> None:
        """Train from the checkpoint's step to the end, or for `stop_after` steps."""
        last = self.recipe.num_steps if stop_after is None else min(self.first_step + stop_after, self.recipe.num_steps)
        progress = tqdm(range(self.first_step, last), initial=self.first_step, total=self.recipe.num_steps,
                        disable=self.rank > 0, unit="step", mininterval=5, file=sys.stderr)  # fmt: skip
        recent: list[float] = []
        for step in progress:
            recent = [*recent[-49:], self.step(step)]
            progress.set_postfix(loss=f"{np.mean(recent):.3f}", refresh=False)
            done, due = step + 1, step + 1 == last
            if self.rank == 0 and (due or done % self.recipe.evaluate_every == 0):
                self._record(done, float(np.mean(recent)))
            if self.rank == 0 and (due or done % self.recipe.checkpoint_every == 0):
                self.save(done)


def write_curve(curve: list[dict[str, float]], path: Path) -> None:
    """step, tokens, sequence length, train loss (mean of the last 50 steps), held-out loss per kind."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(curve[0]))
        writer.writeheader()
        writer.writerows({key: round(value, 4) for key, value in point.items()} for point in curve)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def export(out: Path, target: Path) -> None:
    """Write the checkpoint under `out` as a bf16 model folder that plain transformers loads."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    recipe = json.loads(state["recipe"])
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**recipe["model"]))
    model.load_state_dict(state["model"])
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(target)
    PreTrainedTokenizerFast.from_pretrained(out / "tokenizer").save_pretrained(target)


def _worker(rank: int, recipe: Recipe, out: Path, rendezvous: str) -> None:
    torch.set_num_threads(1)
    if recipe.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=recipe.processes)
    Trainer(recipe, out, rank, Streams(out / "streams", KIND_WEIGHTS)).run()
    if recipe.processes > 1:
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Prepare, train (or resume), export to OUT/model."""
    parser = argparse.ArgumentParser(prog="python -m harness.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of this run; the same folder resumes it")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the Debian packages are unpacked (default /)")
    parser.add_argument("--export-only", action="store_true", help="write OUT/model from the last checkpoint and stop")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    if not options.export_only:
        prepare(options.out, options.root)
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe()
            torch.multiprocessing.spawn(_worker, (recipe, options.out, f"{folder}/rendezvous"), nprocs=recipe.processes)
    export(options.out, options.out / "model")
    print(f"{options.out / 'model'} written after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except DemoError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
