"""Tiny verifiers of every family that is tested, by the names that the README's table has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from speculators.recipe.families import FAMILIES
from speculators.verifier.architecture import auto_class
from speculators.verifier.quiet import quiet

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
WINDOW = {"sliding_window": 6, "layer_types": ALTERNATING}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
# Many heads: with few, all scores of some tokens are 0, and which of them are taken depends on the kernel.
INDEXED = {"index_n_heads": 16, "index_head_dim": 8, "index_topk": 6}
GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 64,
}
SPLIT_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA_4 = {
    **WINDOW,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 96,
}
GEMMA_4_SHARED = {**GEMMA_4, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}

# The values of each family that differ from SHAPE. With a text_config the model is multimodal, and the values of SHAPE
# are the language model's.
VALUES: dict[str, dict[str, Any]] = {
    "Llama 2, 3": {},
    "Llama 4": {
        "text_config": {
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 6,
            "no_rope_layers": [1, 0, 1, 0],
            "interleave_moe_layer_step": 2,
        },
        "vision_config": {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "Qwen2, Qwen2.5": {},
    "Qwen3": {},
    "Qwen3 MoE": EXPERTS,
    "Qwen3-Next": {**GATED_DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3.5": GATED_DELTA,
    "Qwen3.5 MoE": {**GATED_DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "gpt-oss": {**LOCAL_EXPERTS, **WINDOW},
    "Gemma 2": {**WINDOW, "final_logit_softcapping": 2.0},
    "Gemma 3 (270M, 1B)": {**WINDOW, "rope_parameters": SPLIT_ROPE},
    "Gemma 3 (4B, 12B, 27B)": {"text_config": {**WINDOW, "rope_parameters": SPLIT_ROPE}, "vision_config": VISION},
    "Gemma 4 (E2B, E4B)": GEMMA_4_SHARED,
    "Gemma 4 (26B-A4B)": {
        **GEMMA_4,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "DeepSeek-V2": {**LATENT, **ROUTED},
    "DeepSeek-V3, R1": {**LATENT, **ROUTED},
    "DeepSeek-V3.2": {**LATENT, **ROUTED, **INDEXED},
    "GLM-4": {},
    "GLM-4.5": ROUTED,
    "GLM-5": {**LATENT, **ROUTED, **INDEXED},
    "MiniMax-M2": LOCAL_EXPERTS,
    "Kimi Linear": {
        **LATENT,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "Mistral, Ministral (2024)": {"sliding_window": None},
    "Mistral 7B v0.1": {"sliding_window": 6},
    "Ministral 3": {},
    "Mistral Small 3": {"text_config": {"model_type": "mistral", "sliding_window": None}, "vision_config": VISION},
    "Mixtral": LOCAL_EXPERTS,
    "Phi-3, Phi-4-mini": {"rope_parameters": LONGROPE},
    "OLMo 2": {},
    "OLMo 3": WINDOW,
    "OLMoE": {"num_experts": 4, "num_experts_per_tok": 2},
    "Granite 3": {"logits_scaling": 7.0},
    "Granite 4": {
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "Hunyuan": {},
    "Ernie 4.5": {},
    "Seed-OSS": {},
    "Falcon-H1": {**MAMBA, "lm_head_multiplier": 0.5},
    "LFM2": {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48},
    "Command R": {"logit_scale": 0.3},
    "Command A, R7B": {**WINDOW, "logit_scale": 0.3},
    "SmolLM3": {},
    "EXAONE 4": WINDOW,
    "Qwen3-VL": {
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
}

# Names are unique, a model_type is not: Gemma 4 has two kinds of layers.
MODEL_TYPE = {family.name: family.model_type for family in FAMILIES}


def config_of(family: str) -> Any:
    """Makes transformers' config of a family at its tiny size."""
    kind, values = MODEL_TYPE[family], VALUES[family]
    if "text_config" not in values:
        return AutoConfig.for_model(kind, **{**SHAPE, **values})
    return AutoConfig.for_model(kind, **{**values, "text_config": {**SHAPE, **values["text_config"]}})


def make(folder: Path, family: str) -> Path:
    """Writes a random verifier of a family, its config.json as published: a difference from its class's defaults."""
    config = config_of(family)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        model = auto_class(config).from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                # Ones would hide the difference between w and 1 + w.
                torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.5)
        model.save_pretrained(folder)
    return folder


def write_whole(folder: Path) -> Path:
    """Writes all values of a folder's config into another file; returns it."""
    config = AutoConfig.from_pretrained(folder)
    path = folder / "whole.json"
    path.write_text(json.dumps(config.to_dict(), default=str))
    return path
