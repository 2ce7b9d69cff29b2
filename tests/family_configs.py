"""The rows of the table of families: which classes, and how each configuration is made tiny."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Config:
    """A nested configuration: its class in the family's configuration module (or in transformers), and its overrides."""

    cls: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One family. `overrides` come on top of the fields of `SMALL` that the configuration class has."""

    name: str
    config: str
    model: str
    overrides: dict[str, Any] = field(default_factory=dict)
    mode: Literal["generate", "forward"] = "generate"
    representative: bool = False
    layouts: tuple[str, ...] = ("hub", "fused")
    extra_inputs: tuple[str, ...] = ()


# Any of these that a configuration class knows is set; hidden, dense and expert widths differ so that a mix-up shows.
SMALL: dict[str, Any] = {
    "vocab_size": 128,
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
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "top_k_experts": 3,
    "moe_topk": 3,
    "moe_k": 3,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
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
    # vision and audio towers: built, and left out of the test inputs
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "num_position_embeddings": 16,
    "image_size": 16,
}
_MLA = {"num_key_value_heads": 4}
_MLA_GROUPS = {**_MLA, "n_group": 4, "topk_group": 2}


def _causal(name: str, stem: str, overrides: dict[str, Any] | None = None, **kwargs: Any) -> Row:
    return Row(name, f"{stem}Config", f"{stem}ForCausalLM", overrides or {}, **kwargs)


def _text(name: str, stem: str, overrides: dict[str, Any] | None = None, **kwargs: Any) -> Row:
    return Row(name, f"{stem}TextConfig", f"{stem}ForCausalLM", overrides or {}, **kwargs)


_MLP_TYPES = ["dense", "sparse", "sparse"]
_HYBRID = ["linear_attention", "full_attention", "linear_attention"]
_NLLB: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "encoder_ffn_dim": 24, "encoder_attention_heads": 4, "encoder_sparse_step": 2,
    "decoder_layers": 2, "decoder_ffn_dim": 24, "decoder_attention_heads": 4, "decoder_sparse_step": 2,
}
_SAM = {"output_channels": 8, "downsample_channels": [8, 32], "global_attn_indexes": [1]}
_INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "d_rel": 8, "rel_extent": 16, "logits_mup_width_multiplier": 1.0}


def _mrope(*section: int) -> dict[str, Any]:
    """RoPE over time, height and width; `section` splits half of the rotary dimensions."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}


def _multimodal(name: str, stem: str, text: dict[str, Any] | None = None, model: str = "", **towers: Any) -> Row:
    """The whole model, its towers included, which generates from text alone."""
    towers = {"vision_config": Config(f"{stem}VisionConfig")} | towers
    parts = {"text_config": Config(f"{stem}TextConfig", text or {}), **towers}
    return Row(name, f"{stem}Config", model or f"{stem}ForConditionalGeneration", parts)


ROWS: tuple[Row, ...] = (
    _causal("afmoe", "Afmoe"),
    _causal("aria", "AriaText", representative=True),
    _causal("axk1", "AXK1", _MLA_GROUPS),
    _causal("axk2", "AXK2", _MLA_GROUPS),
    _causal("bailing_hybrid", "BailingHybrid", {**_MLA_GROUPS, "layer_group_size": 2}),
    _causal("beam", "Beam", {"n_group": 4, "topk_group": 2, "mlp_layer_types": _MLP_TYPES}),
    _causal("cohere2_moe", "Cohere2Moe", {"logit_scale": 1.0}),
    _causal("deepseek_v2", "DeepseekV2", _MLA),
    _causal("deepseek_v3", "DeepseekV3", _MLA_GROUPS, representative=True),
    _causal("deepseek_v32", "DeepseekV32", _MLA_GROUPS),
    _causal("deepseek_v4", "DeepseekV4", {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2, "mlp_layer_types": ["hash_moe", "moe", "moe"], "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"], "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}}),
    _causal("dots1", "Dots1"),
    _causal("ernie4_5_moe", "Ernie4_5_Moe"),
    _causal("exaone_moe", "ExaoneMoe"),
    _causal("flex_olmo", "FlexOlmo"),
    _causal("flint", "Flint", {"mlp_only_layers": [0]}),
    _text("gemma4", "Gemma4", {"enable_moe_block": True, "hidden_size_per_layer_input": 0, "per_layer_config": {}}),
    _causal("glm4_moe", "Glm4Moe"),
    _causal("glm4_moe_lite", "Glm4MoeLite", _MLA),
    _causal("glm_moe_dsa", "GlmMoeDsa", _MLA),
    _causal("gpt_oss", "GptOss", representative=True),
    _causal("granitemoe", "GraniteMoe", representative=True),
    _causal("granitemoe_swa", "GraniteMoeSWA"),
    _causal("granitemoehybrid", "GraniteMoeHybrid", {"mamba_n_heads": 4, "mamba_d_state": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    _causal("granitemoeshared", "GraniteMoeShared"),
    _causal("hunyuan_v1_moe", "HunYuanMoEV1"),
    _causal("hy_v3", "HYV3"),
    _causal("hy_v4", "HYV4", _MLA),
    # Not the whole model: its vision tower needs scipy.
    _text("inkling", "Inkling", _INKLING),
    _text("inkling2", "Inkling2", _INKLING),
    _causal("jamba", "Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0}, representative=True),
    _causal("kimi_linear", "KimiLinear", {**_MLA, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    _causal("kolibri1", "Kolibri1"),
    _causal("laguna", "Laguna"),
    _causal("lfm2_moe", "Lfm2Moe", {"layer_types": ["conv", "full_attention", "conv"]}),
    _causal("mellum", "Mellum"),
    _causal("mimo_v2_flash", "MiMoV2Flash"),
    _causal("minimax", "MiniMax"),
    _causal("minimax_m2", "MiniMaxM2"),
    _causal("mistral4", "Mistral4", _MLA),
    _causal("mixtral", "Mixtral", representative=True),
    _causal("nemotron_h", "NemotronH", {"layers_block_type": ["moe", "full_attention", "linear_attention", "moe"], "moe_latent_size": 16, "moe_shared_expert_intermediate_size": 16, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2}, representative=True),
    _causal("olmoe", "Olmoe", representative=True),
    _causal("phimoe", "Phimoe"),
    _causal("qwen2_moe", "Qwen2Moe"),
    _text("qwen3_5_moe", "Qwen3_5Moe", {"layer_types": _HYBRID}),
    _causal("qwen3_moe", "Qwen3Moe", representative=True),
    _causal("qwen3_next", "Qwen3Next", {"layer_types": _HYBRID}),
    _text("qwen4_exp", "Qwen4Exp", {"layer_types": _HYBRID, "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4, "indexer_compress_ratio": 2, "ple_layer_ids": [1], "ngram_vocab_size_base": 64, "heads_per_ngram": 2, "split_ngram_parts": 4, "make_ngram_vocab_size_divisible_by": 8, "eos_token_id": 2}),
    _causal("solar_open", "SolarOpen"),
    _causal("zaya", "Zaya", {"num_experts_per_tok": 1, "router_hidden_size": 16, "initializer_range": 0.5}),
    # multimodal only
    _multimodal("dots3_note", "Dots3Note", {**_MLA, "shared_experts_intermediate_size": 16, "n_group": 4, "topk_group": 2, "use_sliding_window": False}, vision_config=Config("Dots3NoteVisionConfig", {"adapter_in_dim": 32, "adapter_out_dim": 32, "num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4}), audio_config=Config("Dots3NoteAudioConfig", {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8})),
    _multimodal("minimax_m3_vl", "MiniMaxM3VL", {"dense_intermediate_size": 40, "mlp_layer_types": _MLP_TYPES}, model="MiniMaxM3SparseForConditionalGeneration", projector_hidden_size=16),
    _multimodal("deepseek_ocr2", "DeepseekOcr2", {"mlp_layer_types": _MLP_TYPES}, vision_config=Config("DeepseekOcr2VisionConfig", {"sam_config": Config("DeepseekOcr2SamVisionConfig", _SAM), "encoder_config": Config("DeepseekOcr2VisionEncoderConfig")})),
    Row("diffusion_gemma", "DiffusionGemmaConfig", "DiffusionGemmaForBlockDiffusion", {"text_config": Config("DiffusionGemmaTextConfig", {"per_layer_config": {}}), "vision_config": Config("Gemma4VisionConfig", {"position_embedding_size": 16}), "canvas_length": 8}, mode="forward", extra_inputs=("decoder_input_ids",)),
    _multimodal("ernie4_5_vl_moe", "Ernie4_5_VLMoe", {"moe_intermediate_size": [24, 16], "head_dim": 16, "rope_parameters": _mrope(3, 3, 2)}),
    _multimodal("glm4v_moe", "Glm4vMoe", {"head_dim": 16, "rope_parameters": _mrope(2, 1, 1) | {"partial_rotary_factor": 0.5}}),
    _multimodal("glm5_next", "Glm5Next", {**_MLA, "qk_rope_head_dim": 0, "index_kpool": 2, "hc_mult": 2, "layer_types": _HYBRID, "mlp_layer_types": _MLP_TYPES}, vision_config=Config("Glm5NextVisionConfig", {"projection_intermediate_size": 16})),
    _multimodal("mistral_large4", "MistralLarge4", _MLA, vision_config=Config("PixtralVisionConfig")),
    _multimodal("muse_spark", "MuseSpark", {"moe_hidden_size": 16, "output_multiplier": 1.0}, audio_config=Config("MuseSparkAudioConfig", {"hidden_sizes": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_hidden_layers": 4, "out_hidden_size": 32}), vision_config=Config("MuseSparkVisionConfig", {"pos_emb_height": 4, "pos_emb_width": 4}), projector_hidden_size=16),
    Row("openai_privacy_filter", "OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterForTokenClassification", mode="forward"),
    Row("qwen3_omni_moe", "Qwen3OmniMoeThinkerConfig", "Qwen3OmniMoeThinkerForConditionalGeneration", {"text_config": Config("Qwen3OmniMoeTextConfig"), "vision_config": Config("Qwen3OmniMoeVisionEncoderConfig", {"deepstack_visual_indexes": [0]}), "audio_config": Config("Qwen3OmniMoeAudioEncoderConfig", {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16, "downsample_hidden_size": 8, "output_dim": 32}), "vision_start_token_id": 7}),
    _multimodal("qwen3_vl_moe", "Qwen3VLMoe", vision_config=Config("Qwen3VLMoeVisionConfig", {"deepstack_visual_indexes": [0]})),
    _multimodal("unlimited_ocr", "UnlimitedOcr", vision_config=Config("UnlimitedOcrVisionConfig", {"sam_config": Config("UnlimitedOcrSamVisionConfig", {**_SAM, "mlp_dim": 32}), "encoder_config": Config("UnlimitedOcrVisionEncoderConfig")})),
)

UNDECORATED_ROWS: tuple[Row, ...] = (
    _causal("dbrx", "Dbrx", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "attn_config": Config("DbrxAttentionConfig", {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}), "ffn_config": Config("DbrxFFNConfig", {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 3})}),
    _causal("doge", "Doge", {"is_moe": True, "num_experts": 16}),
    _causal("jetmoe", "JetMoe", {"kv_channels": 8}),
    _text("llama4", "Llama4"),
    _causal("longcat_flash", "LongcatFlash", {**_MLA, "num_layers": 2, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 24, "zero_expert_num": 2, "head_dim": 8}),
    Row("nllb_moe", "NllbMoeConfig", "NllbMoeForConditionalGeneration", {**_NLLB, "eos_token_id": 2}),
    _multimodal("step3p7", "Step3p7", {"mlp_layer_types": _MLP_TYPES, "share_expert_dim": 16}),
    Row("switch_transformers", "SwitchTransformersConfig", "SwitchTransformersForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_sparse_encoder_layers": 1, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0, "eos_token_id": 1}),
)
