"""What a row of the table of families is, and the settings that make its configuration tiny."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    """A configuration class, of the family's own module or exported by transformers, and its overrides of `SMALL`."""

    cls: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Row:
    """One model directory of transformers.

    `mode`: "generate" when the inputs may go to `generate()`, "forward" when only to the model's forward.
    `representative`: part of the quick tests; together these differ in every structural flag.
    `layouts`: the checkpoint layouts that transformers itself saves and loads again with equal tensors and logits.
    `extra_inputs`: inputs beside `input_ids` and `attention_mask`; token ids too.
    """

    name: str
    config: Config
    model: str
    mode: Literal["generate", "forward"] = "generate"
    representative: bool = False
    layouts: tuple[str, ...] = ("hub", "fused")
    extra_inputs: tuple[str, ...] = ()


# Of these, every field that a configuration class has is set. Hidden, dense and expert widths differ, so that a mix-up
# shows. Top-3, because a sum of two is the same in either order and would hide an error in the order of accumulation.
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "unpadded_vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 6,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"), 3),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "norm_topk_prob": True,
    # latent attention, sparse indexers, linear attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    # vision and audio towers: built, and not given any input
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "image_size": 16,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "num_position_embeddings": 16,
}

MLA = {"num_key_value_heads": 4}
GROUPS = {"n_group": 4, "topk_group": 2}
MLP_TYPES = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
DEEPSEEK_V4 = {
    "num_key_value_heads": 1,
    "o_groups": 2,
    "o_lora_rank": 8,
    "hc_mult": 2,
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
}
DOTS3 = {"shared_experts_intermediate_size": 16, "use_sliding_window": False}
DOTS3_VISION = {
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "num_hidden_layers": 2,
    "mlp_layer_types": ["dense", "sparse"],
    "num_local_experts": 4,
}
DOTS3_AUDIO = {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8}
INKLING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "d_rel": 8,
    "rel_extent": 16,
    "logits_mup_width_multiplier": 1.0,
}
# Two passes over the second and third of four layers.
INKLING_LOOP = {
    "num_hidden_layers": 4,
    "n_layers_per_attn_res_block": 1,
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 3,
    "loop_num_passes": 2,
    "loop_gate_rank": 8,
}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0}
MUSE_AUDIO = {"hidden_sizes": (8,) * 4, "depths": (1,) * 4, "num_hidden_layers": 4}
NEMOTRON = {
    "layers_block_type": ["moe", "full_attention", "linear_attention", "moe"],
    "moe_latent_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
}
OMNI_AUDIO = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "downsample_hidden_size": 8,
    "output_dim": 32,
}
DEEPSTACK = {"deepstack_visual_indexes": [0]}
# The n-gram embedding needs an end-of-text token; generation may stop on it.
QWEN4 = {
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 64,
    "heads_per_ngram": 2,
    "split_ngram_parts": 4,
    "make_ngram_vocab_size_divisible_by": 8,
    "eos_token_id": 2,
}
SAM = {"output_channels": 8, "downsample_channels": [8, 32], "global_attn_indexes": [1]}
DBRX = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "attn_config": Config("DbrxAttentionConfig", {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}),
    "ffn_config": Config("DbrxFFNConfig", {"ffn_hidden_size": 24, "moe_top_k": 3}),
}
LONGCAT = {"num_layers": 2, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 24, "zero_expert_num": 2, "head_dim": 8}
NLLB = {
    "d_model": 32,
    **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_sparse_step", "decoder_sparse_step"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "eos_token_id": 2,
}
SWITCH = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 24,
    **dict.fromkeys(("num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), 1),
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
}
