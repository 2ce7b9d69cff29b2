"""A tiny random checkpoint with a tokenizer, for tests that need a whole model folder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY = ["<unk>", *"abcdefghijklmnopqrstuvwxyz .,!"]
LAYERS, EXPERTS, TOP_K = 3, 8, 2


def save_tiny(folder: Path, *, dtype: torch.dtype = torch.bfloat16, experts: int = EXPERTS) -> Path:
    """Write the checkpoint: 3 layers of 8 experts top-2, hidden 32, the same weights every time."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=experts,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder
