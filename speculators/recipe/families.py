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
class VerifierFamily:
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
    VerifierFamily("Llama 2, 3", "llama", KEYS),
    VerifierFamily("Qwen2, Qwen2.5", "qwen2", KEYS),
    VerifierFamily("Qwen3", "qwen3", KEYS),
    VerifierFamily("Qwen3 MoE", "qwen3_moe", KEYS),
    VerifierFamily("Qwen3-VL", "qwen3_vl", KEYS),
    VerifierFamily("Mistral, Ministral (2024)", "mistral", KEYS),
    VerifierFamily("Ministral 3", "ministral3", KEYS),
    VerifierFamily("Mistral Small 3", "mistral3", KEYS),
    VerifierFamily("Mixtral", "mixtral", KEYS),
    VerifierFamily("DeepSeek-V2", "deepseek_v2", KEYS),
    VerifierFamily("DeepSeek-V3, R1", "deepseek_v3", KEYS),
    VerifierFamily("GLM-4", "glm4", KEYS),
    VerifierFamily("GLM-4.5", "glm4_moe", KEYS),
    VerifierFamily("MiniMax-M2", "minimax_m2", KEYS),
    VerifierFamily("Phi-3, Phi-4-mini", "phi3", KEYS),
    VerifierFamily("OLMo 2", "olmo2", KEYS),
    VerifierFamily("OLMoE", "olmoe", KEYS),
    VerifierFamily("Granite 3", "granite", KEYS),
    VerifierFamily("Hunyuan", "hunyuan_v1_dense", KEYS),
    VerifierFamily("Ernie 4.5", "ernie4_5", KEYS),
    VerifierFamily("Seed-OSS", "seed_oss", KEYS),
    VerifierFamily("Command R", "cohere", KEYS),
    VerifierFamily("SmolLM3", "smollm3", KEYS),
    VerifierFamily("gpt-oss", "gpt_oss", WINDOWS),
    VerifierFamily("Llama 4", "llama4", WINDOWS),
    VerifierFamily("Gemma 2", "gemma2", WINDOWS),
    VerifierFamily("Gemma 3 (270M, 1B)", "gemma3_text", WINDOWS),
    VerifierFamily("Gemma 3 (4B, 12B, 27B)", "gemma3", WINDOWS),
    VerifierFamily("Gemma 4 (26B-A4B)", "gemma4_text", WINDOWS),
    VerifierFamily("Mistral 7B v0.1", "mistral", WINDOWS),
    VerifierFamily("OLMo 3", "olmo3", WINDOWS),
    VerifierFamily("EXAONE 4", "exaone4", WINDOWS),
    VerifierFamily("Command A, R7B", "cohere2", WINDOWS),
    VerifierFamily("Gemma 4 (E2B, E4B)", "gemma4_text", SHARED),
    VerifierFamily("DeepSeek-V3.2", "deepseek_v32", INDEXED),
    VerifierFamily("GLM-5", "glm_moe_dsa", INDEXED),
    VerifierFamily("Qwen3-Next", "qwen3_next", STATES),
    VerifierFamily("Qwen3.5", "qwen3_5_text", STATES),
    VerifierFamily("Qwen3.5 MoE", "qwen3_5_moe_text", STATES),
    VerifierFamily("Kimi Linear", "kimi_linear", STATES),
    VerifierFamily("Granite 4", "granitemoehybrid", STATES),
    VerifierFamily("Falcon-H1", "falcon_h1", STATES),
    VerifierFamily("LFM2", "lfm2", STATES),
)

MODEL_TYPES = frozenset(family.model_type for family in FAMILIES)


def families_table() -> str:
    """Lists the families in Markdown, by what decoding has to take back; the README has this text."""
    rows = ["| rejected drafts are taken back from | families |", "|---|---|"]
    for keeps in (KEYS, WINDOWS, SHARED, INDEXED, STATES):
        names = "; ".join(family.name for family in FAMILIES if family.keeps == keeps)
        rows.append(f"| {keeps} | {names} |")
    return "\n".join(rows)
