"""The rows of the table of families, by model directory."""

from __future__ import annotations

from typing import Any

from family_configs import (
    DBRX,
    DEEPSEEK_V4,
    DEEPSTACK,
    DOTS3,
    DOTS3_AUDIO,
    DOTS3_VISION,
    GROUPS,
    HYBRID,
    INKLING,
    INKLING_LOOP,
    JAMBA,
    LONGCAT,
    MLA,
    MLP_TYPES,
    MUSE_AUDIO,
    NEMOTRON,
    NLLB,
    OMNI_AUDIO,
    QWEN4,
    SAM,
    SWITCH,
    Config,
    Row,
)


def _mrope(*section: int, **rope: Any) -> dict[str, Any]:
    """RoPE over time, height and width; `section` splits half of the rotary dimensions of a head of 16."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section), **rope}
    return {"head_dim": 16, "rope_parameters": rope}


def _causal(name: str, stem: str, *overrides: dict[str, Any], **row: Any) -> Row:
    """A family with a language model of its own; later overrides win."""
    return Row(name, Config(f"{stem}Config", _merged(*overrides)), f"{stem.removesuffix('Text')}ForCausalLM", **row)


def _multimodal(
    name: str, stem: str, *text: dict[str, Any], model: str = "", representative: bool = False, **parts: Any
) -> Row:
    """The whole model, which generates from text alone; `parts` are further fields of its configuration."""
    parts = {"vision_config": Config(f"{stem}VisionConfig")} | parts
    parts["text_config"] = Config(f"{stem}TextConfig", _merged(*text))
    config = Config(f"{stem}Config", parts)
    return Row(name, config, model or f"{stem}ForConditionalGeneration", representative=representative)


def _ocr_vision(stem: str, **sam: Any) -> Config:
    sam_config = Config(f"{stem}SamVisionConfig", SAM | sam)
    encoder_config = Config(f"{stem}VisionEncoderConfig")
    return Config(f"{stem}VisionConfig", {"sam_config": sam_config, "encoder_config": encoder_config})


def _merged(*overrides: dict[str, Any]) -> dict[str, Any]:
    return {key: value for part in overrides for key, value in part.items()}


ROWS: tuple[Row, ...] = (
    _causal("afmoe", "Afmoe"),
    Row("aria", Config("AriaTextConfig"), "AriaTextForCausalLM", representative=True),
    _causal("axk1", "AXK1", MLA, GROUPS),
    _causal("axk2", "AXK2", MLA, GROUPS),
    _causal("bailing_hybrid", "BailingHybrid", MLA, GROUPS, {"layer_group_size": 2}),
    _causal("beam", "Beam", GROUPS, MLP_TYPES),
    _causal("cohere2_moe", "Cohere2Moe", {"logit_scale": 1.0}),
    _multimodal("deepseek_ocr2", "DeepseekOcr2", MLP_TYPES, vision_config=_ocr_vision("DeepseekOcr2")),
    _causal("deepseek_v2", "DeepseekV2", MLA),
    _causal("deepseek_v3", "DeepseekV3", MLA, GROUPS, representative=True),
    _causal("deepseek_v32", "DeepseekV32", MLA, GROUPS),
    _causal("deepseek_v4", "DeepseekV4", DEEPSEEK_V4),
    # Its generation denoises a random canvas; the encoder and the decoder share the experts.
    Row(
        "diffusion_gemma",
        Config(
            "DiffusionGemmaConfig",
            {
                "text_config": Config("DiffusionGemmaTextConfig", {"per_layer_config": {}}),
                "vision_config": Config("Gemma4VisionConfig", {"position_embedding_size": 16}),
                "canvas_length": 8,
            },
        ),
        "DiffusionGemmaForBlockDiffusion",
        mode="forward",
        extra_inputs=("decoder_input_ids",),
    ),
    _causal("dots1", "Dots1"),
    _multimodal(
        "dots3_note",
        "Dots3Note",
        *(MLA, GROUPS, DOTS3),
        vision_config=Config("Dots3NoteVisionConfig", DOTS3_VISION),
        audio_config=Config("Dots3NoteAudioConfig", DOTS3_AUDIO),
    ),
    _causal("ernie4_5_moe", "Ernie4_5_Moe"),
    _multimodal("ernie4_5_vl_moe", "Ernie4_5_VLMoe", {"moe_intermediate_size": [24, 16]}, _mrope(3, 3, 2)),
    _causal("exaone_moe", "ExaoneMoe"),
    _causal("flex_olmo", "FlexOlmo"),
    _causal("flint", "Flint", {"mlp_only_layers": [0]}),
    _causal(
        "gemma4",
        "Gemma4Text",
        {"enable_moe_block": True, "hidden_size_per_layer_input": 0, "per_layer_config": {}},
    ),
    _causal("glm4_moe", "Glm4Moe"),
    _causal("glm4_moe_lite", "Glm4MoeLite", MLA),
    _multimodal("glm4v_moe", "Glm4vMoe", _mrope(2, 1, 1, partial_rotary_factor=0.5)),
    _multimodal(
        "glm5_next",
        "Glm5Next",
        *(MLA, HYBRID, MLP_TYPES, {"qk_rope_head_dim": 0, "index_kpool": 2, "hc_mult": 2}),
        vision_config=Config("Glm5NextVisionConfig", {"projection_intermediate_size": 16}),
    ),
    _causal("glm_moe_dsa", "GlmMoeDsa", MLA),
    _causal("gpt_oss", "GptOss", representative=True),
    _causal("granitemoe", "GraniteMoe", representative=True),
    _causal("granitemoe_swa", "GraniteMoeSWA"),
    _causal("granitemoehybrid", "GraniteMoeHybrid", HYBRID, {"mamba_n_heads": 4, "mamba_d_state": 8}),
    _causal("granitemoeshared", "GraniteMoeShared"),
    _causal("hunyuan_v1_moe", "HunYuanMoEV1"),
    _causal("hy_v3", "HYV3"),
    _causal("hy_v4", "HYV4", MLA),
    _multimodal("hy_v4_vl", "HYV4VL", MLA, _mrope(2, 1, 1)),
    # Not the whole model: its vision tower needs scipy.
    _causal("inkling", "InklingText", INKLING),
    _causal("inkling2", "Inkling2Text", INKLING, representative=True),
    _causal("inkling2_loop", "Inkling2LoopText", INKLING, INKLING_LOOP),
    _causal("jamba", "Jamba", JAMBA, representative=True),
    _causal("kimi_linear", "KimiLinear", MLA, HYBRID),
    _causal("kolibri1", "Kolibri1"),
    _causal("laguna", "Laguna"),
    _causal("lara_mini", "LaraMini", {"layer_types": ["linear_attention", "sliding_attention", "full_attention"]}),
    _causal("lfm2_moe", "Lfm2Moe", {"layer_types": ["conv", "full_attention", "conv"]}),
    _causal("mellum", "Mellum"),
    _causal("mimo_v2_flash", "MiMoV2Flash"),
    _causal("minimax", "MiniMax"),
    _causal("minimax_m2", "MiniMaxM2"),
    _multimodal(
        "minimax_m3_vl",
        "MiniMaxM3VL",
        *(MLP_TYPES, {"dense_intermediate_size": 40}),
        model="MiniMaxM3SparseForConditionalGeneration",
        projector_hidden_size=16,
    ),
    _causal("mistral4", "Mistral4", MLA),
    _multimodal("mistral_large4", "MistralLarge4", MLA, vision_config=Config("PixtralVisionConfig")),
    _causal("mixtral", "Mixtral", representative=True),
    _multimodal(
        "muse_spark",
        "MuseSpark",
        {"moe_hidden_size": 16, "output_multiplier": 1.0},
        vision_config=Config("MuseSparkVisionConfig", {"pos_emb_height": 4, "pos_emb_width": 4}),
        audio_config=Config("MuseSparkAudioConfig", MUSE_AUDIO),
        projector_hidden_size=16,
        representative=True,
    ),
    _causal("nemotron_h", "NemotronH", NEMOTRON, representative=True),
    _causal("olmoe", "Olmoe", representative=True),
    # A token classifier: nothing to generate.
    Row(
        "openai_privacy_filter",
        Config("OpenAIPrivacyFilterConfig"),
        "OpenAIPrivacyFilterForTokenClassification",
        mode="forward",
    ),
    _causal("phimoe", "Phimoe"),
    _causal("qwen2_moe", "Qwen2Moe"),
    _causal("qwen3_5_moe", "Qwen3_5MoeText", HYBRID),
    _causal("qwen3_moe", "Qwen3Moe", representative=True),
    _causal("qwen3_next", "Qwen3Next", HYBRID),
    # The thinker. The talker, which has an experts class of its own, speaks and is not built.
    Row(
        "qwen3_omni_moe",
        Config(
            "Qwen3OmniMoeThinkerConfig",
            {
                "text_config": Config("Qwen3OmniMoeTextConfig"),
                "vision_config": Config("Qwen3OmniMoeVisionEncoderConfig", DEEPSTACK),
                "audio_config": Config("Qwen3OmniMoeAudioEncoderConfig", OMNI_AUDIO),
                "vision_start_token_id": 7,
            },
        ),
        "Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
    _multimodal("qwen3_vl_moe", "Qwen3VLMoe", vision_config=Config("Qwen3VLMoeVisionConfig", DEEPSTACK)),
    _causal("qwen4_exp", "Qwen4ExpText", HYBRID, QWEN4),
    # Computed by DeepSeek-V3's class and GLM-4-MoE's.
    Row("sarvam_mla", Config("SarvamMLAConfig", _merged(MLA, GROUPS)), "DeepseekV3ForCausalLM"),
    Row("sarvam_moe", Config("SarvamMoEConfig", GROUPS), "Glm4MoeForCausalLM"),
    _causal("solar_open", "SolarOpen"),
    _multimodal("unlimited_ocr", "UnlimitedOcr", vision_config=_ocr_vision("UnlimitedOcr", mlp_dim=32)),
    # Top-1 by definition.
    _causal("zaya", "Zaya", {"num_experts_per_tok": 1, "router_hidden_size": 16, "initializer_range": 0.5}),
)

UNDECORATED_ROWS: tuple[Row, ...] = (
    _causal("dbrx", "Dbrx", DBRX),
    _causal("doge", "Doge", {"is_moe": True, "num_experts": 16}),
    _causal("jetmoe", "JetMoe", {"kv_channels": 8}),
    _causal("llama4", "Llama4Text"),
    _causal("longcat_flash", "LongcatFlash", MLA, LONGCAT),
    Row("nllb_moe", Config("NllbMoeConfig", NLLB), "NllbMoeForConditionalGeneration"),
    _multimodal("step3p7", "Step3p7", MLP_TYPES, {"share_expert_dim": 16}),
    Row(
        "switch_transformers",
        Config("SwitchTransformersConfig", SWITCH),
        "SwitchTransformersForConditionalGeneration",
    ),
)
