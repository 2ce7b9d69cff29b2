"""Train the demo model: `python -m harness.demo.train --out DIR [--root DEBIAN_ROOT]`.

Data-parallel over processes of one thread each (threads scale badly at these sizes). Batches are a pure function of
(seed, step, rank) and checkpoints hold the optimiser, so a stopped run resumes exactly: give the same command again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from harness.demo.corpus import Document
from harness.demo.recipe import KIND_WEIGHTS, Recipe, build_model, forward_losses
from harness.demo.streams import Streams, held_out_passages, prepare
from runtime.errors import ExpertFlowError, cli_main
from runtime.files import write_atomic


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
        self.recent: list[float] = []
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
            raise ExpertFlowError(f"{self.checkpoint} was made with another recipe: remove it, or choose another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curve, self.recent, self.first_step = state["curve"], state.get("recent", []), state["step"]

    def save(self, step: int) -> None:
        """Checkpoint and loss_curve.csv, each replaced in one rename."""
        state = {
            "recipe": json.dumps(asdict(self.recipe), sort_keys=True),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curve": self.curve,
            "recent": self.recent,
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

    def _record(self, step: int) -> None:
        sequence = self.recipe.stage(step - 1).sequence
        held_out = evaluate(self.model, self.streams, min(sequence, 1024))
        train = float(np.mean(self.recent))
        point = {"step": step, "tokens": self.recipe.tokens_at(step), "sequence": sequence, "train": train}
        self.curve.append(point | held_out)

    def run(self) -> None:
        """Train from the checkpoint's step to the end."""
        last = self.recipe.num_steps
        progress = tqdm(
            range(self.first_step, last),
            initial=self.first_step,
            total=last,
            disable=self.rank > 0,
            unit="step",
            mininterval=5,
        )
        for step in progress:
            self.recent = [*self.recent[-49:], self.step(step)]
            progress.set_postfix(loss=f"{np.mean(self.recent):.3f}", refresh=False)
            done = step + 1
            if self.rank == 0 and (done == last or done % self.recipe.evaluate_every == 0):
                self._record(done)
            if self.rank == 0 and (done == last or done % self.recipe.checkpoint_every == 0):
                self.save(done)


def write_curve(curve: list[dict[str, float]], path: Path) -> None:
    """step, tokens, sequence length, train loss (mean of the last 50 steps), held-out loss per kind."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(curve[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: round(value, 4) for key, value in point.items()} for point in curve)
    write_atomic(path, text.getvalue())


def export(out: Path) -> None:
    """Write OUT/model (bf16, for plain transformers) and OUT/heldout.jsonl from the last checkpoint."""
    target = out / "model"
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    recipe = json.loads(state["recipe"])
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**recipe["model"]))
    model.load_state_dict(state["model"])
    model.bfloat16()
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(target)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    tokenizer.save_pretrained(target)
    os.chmod(target / "model.safetensors", 0o644)
    lines = (out / "streams" / "held_out.jsonl").read_text("utf-8").splitlines()
    rows = held_out_passages(tokenizer, [Document(**json.loads(line)) for line in lines])
    write_atomic(out / "heldout.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
    parser.add_argument(
        "--root", type=Path, default=Path("/"), help="where the Debian packages are unpacked (default /)"
    )
    parser.add_argument("--export-only", action="store_true", help="write OUT/model from the last checkpoint and stop")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    if not options.export_only:
        prepare(options.out, options.root)
        with tempfile.TemporaryDirectory() as folder:
            recipe = Recipe()
            spawn(_worker, (recipe, options.out, f"{folder}/rendezvous"), nprocs=recipe.processes)
    export(options.out)
    print(f"{options.out / 'model'} written after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    raise SystemExit(cli_main(main))
