"""The families of verifiers that tests cover: what the README lists, and what light commands take as known."""

from __future__ import annotations

import attrs

# What decoding has to take back after a rejected draft, in the README's words.
KEYS = "keys"
WINDOWS = "keys, some within a window"
SHARED = "keys that several layers share"
INDEXED = "keys, and those of a sparse-attention indexer"
STATES = "running states (linear attention, Mamba, convolutions)"


@attrs.frozen
class Family:
    """Models of one architecture.

    Attributes:
        name: as people call them.
        model_type: transformers' name.
        keeps: what decoding has to take back.
    """

    name: str
    model_type: str
    keeps: str


FAMILIES = (
    Family("Llama 2, 3", "llama", KEYS),
    Family("Qwen2, Qwen2.5", "qwen2", KEYS),
    Family("Qwen3", "qwen3", KEYS),
    Family("Qwen3 MoE", "qwen3_moe", KEYS),
    Family("Qwen3-VL", "qwen3_vl", KEYS),
    Family("Mistral, Ministral (2024)", "mistral", KEYS),
    Family("Ministral 3", "ministral3", KEYS),
    Family("Mistral Small 3", "mistral3", KEYS),
    Family("Mixtral", "mixtral", KEYS),
    Family("DeepSeek-V2", "deepseek_v2", KEYS),
    Family("DeepSeek-V3, R1", "deepseek_v3", KEYS),
    Family("GLM-4", "glm4", KEYS),
    Family("GLM-4.5", "glm4_moe", KEYS),
    Family("MiniMax-M2", "minimax_m2", KEYS),
    Family("Phi-3, Phi-4-mini", "phi3", KEYS),
    Family("OLMo 2", "olmo2", KEYS),
    Family("OLMoE", "olmoe", KEYS),
    Family("Granite 3", "granite", KEYS),
    Family("Hunyuan", "hunyuan_v1_dense", KEYS),
    Family("Ernie 4.5", "ernie4_5", KEYS),
    Family("Seed-OSS", "seed_oss", KEYS),
    Family("Command R", "cohere", KEYS),
    Family("SmolLM3", "smollm3", KEYS),
    Family("gpt-oss", "gpt_oss", WINDOWS),
    Family("Llama 4", "llama4", WINDOWS),
    Family("Gemma 2", "gemma2", WINDOWS),
    Family("Gemma 3 (270M, 1B)", "gemma3_text", WINDOWS),
    Family("Gemma 3 (4B, 12B, 27B)", "gemma3", WINDOWS),
    Family("Gemma 4 (26B-A4B)", "gemma4_text", WINDOWS),
    Family("Mistral 7B v0.1", "mistral", WINDOWS),
    Family("OLMo 3", "olmo3", WINDOWS),
    Family("EXAONE 4", "exaone4", WINDOWS),
    Family("Command A, R7B", "cohere2", WINDOWS),
    Family("Gemma 4 (E2B, E4B)", "gemma4_text", SHARED),
    Family("DeepSeek-V3.2", "deepseek_v32", INDEXED),
    Family("GLM-5", "glm_moe_dsa", INDEXED),
    Family("Qwen3-Next", "qwen3_next", STATES),
    Family("Qwen3.5", "qwen3_5_text", STATES),
    Family("Qwen3.5 MoE", "qwen3_5_moe_text", STATES),
    Family("Kimi Linear", "kimi_linear", STATES),
    Family("Granite 4", "granitemoehybrid", STATES),
    Family("Falcon-H1", "falcon_h1", STATES),
    Family("LFM2", "lfm2", STATES),
)

MODEL_TYPES = frozenset(family.model_type for family in FAMILIES)


def families_table() -> str:
    """Lists the families in Markdown, by what decoding has to take back; the README has this text."""
    rows = ["| rejected drafts are taken back from | families |", "|---|---|"]
    for keeps in (KEYS, WINDOWS, SHARED, INDEXED, STATES):
        names = "; ".join(family.name for family in FAMILIES if family.keeps == keeps)
        rows.append(f"| {keeps} | {names} |")
    return "\n".join(rows)
