"""The demo model's recipe: shape, schedule, initialisation and losses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

# Fractions of the training sequences per kind: german is small (about four passes over it), so it gets less.
KIND_WEIGHTS = {
    "english": 0.19,
    "spanish": 0.15,
    "german": 0.06,
    "python": 0.18,
    "go": 0.16,
    "docs": 0.14,
    "maths": 0.12,
}

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


@dataclass(frozen=True)
class Stage:
    """`steps` optimiser steps at `batch` sequences of `sequence` tokens per process."""

    steps: int
    batch: int
    sequence: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result. Token counts assume `processes` data-parallel processes."""

    stages: tuple[Stage, ...] = (Stage(2170, 8, 256), Stage(300, 1, 2048))
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


def build_model(recipe: Recipe) -> Qwen3MoeForCausalLM:
    """The fp32 model that training starts from; with another seed, the untrained control of the tests."""
    torch.manual_seed(recipe.seed)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**recipe.model))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            small = "embed" in name or name.endswith("mlp.gate.weight")
            torch.nn.init.normal_(parameter, std=recipe.small_init_std if small else recipe.init_std)
    model.set_experts_implementation("grouped_mm")
    return model


def routing_losses(router_logits: tuple[torch.Tensor, ...], top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(balance, z), means over layers: E * sum_e f_e P_e (Switch Transformer, eq. 4), logsumexp^2 (ST-MoE, eq. 5).

    `router_logits` is one [tokens, experts] per layer. Balancing the average over layers, as
    transformers does, lets one layer's collapse hide behind another's.
    """
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
