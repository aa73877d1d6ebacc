"""Medusa as vLLM writes it; what FasterDecoding publishes are pickles (`medusa_lm_head.pt`)."""

from __future__ import annotations

from typing import Any

import torch

from speculators.facts import VerifierFacts
from speculators.formats.names import TensorNames
from speculators.formats.published import PublishedCheckpoint, PublishedFormat, Tensors
from speculators.formats.server_layout import VLLM, ServerLayout, vllm_draft
from speculators.formats.upstream import Fields
from speculators.models.medusa.config import MedusaSpeculatorConfig
from speculators.recipe.decoder import draft_decoder_config

NAMES = TensorNames(
    (
        ("blocks.", "blocks."),
        ("lm_heads.", "lm_heads."),
        ("token_map", "token_map"),
        ("verifier_norm.", "verifier_norm."),
    ),
    before=("medusa_heads.",),
)


def _fits(source: PublishedCheckpoint) -> bool:
    is_ours = source.config.get("speculators_model_type", "medusa") == "medusa"
    return is_ours and source.config.get("model_type") == "medusa"


def _config(source: PublishedCheckpoint, facts: VerifierFacts) -> Fields:
    raw = source.config
    # vLLM takes any key with "num" and "heads" or "layers" in it.
    heads = [value for key, value in raw.items() if "num" in key and "heads" in key]
    layers = [value for key, value in raw.items() if "num" in key and "layers" in key]
    wrong = [f"does not say {key}" for key, found in (("num_heads", heads), ("num_hidden_layers", layers)) if not found]
    wrong += [f"does not say {key}" for key in ("hidden_size", "vocab_size") if key not in raw]
    if raw.get("logit_scale") not in (None, 1.0):
        wrong.append(f"logit_scale = {raw['logit_scale']!r} is not known here")
    if wrong:
        raise source.error(*wrong)
    own = MedusaSpeculatorConfig(num_layers=layers[0], num_heads=heads[0])
    return {
        "hidden_size": raw["hidden_size"],
        "vocab_size": raw["vocab_size"],
        "truncated_vocab_size": raw.get("truncated_vocab_size") or raw["vocab_size"],
        "draft_vocab_size": raw.get("truncated_vocab_size") or raw["vocab_size"],
        "num_hidden_layers": layers[0],
        "num_heads": heads[0],
        "target_layer_ids": [facts.num_hidden_layers],
        "transformer_layer_config": draft_decoder_config(facts, own),
        "speculative_tokens": heads[0],
    }


def _amend(config: Any, tensors: Tensors) -> Tensors:
    """Gives every head its own projection over the draft vocabulary, and every block a bias."""
    found = dict(tensors)
    if "lm_heads.0.weight" in found:
        for head in range(1, config.num_heads):
            # original_lm_head: one projection for all.
            found.setdefault(f"lm_heads.{head}.weight", found["lm_heads.0.weight"])
    if "token_map" in found and config.truncated_vocab_size < config.vocab_size:
        rows = found["token_map"].long()
        # Our draft ids ascend with the tokens they stand for.
        order = rows.argsort()
        for name in [name for name in found if name.startswith("lm_heads.")]:
            whole = len(found[name]) > len(rows)
            found[name] = found[name][rows[order] if whole else order]
        found["token_map"] = rows[order]
    for name, weight in tensors.items():
        if name.startswith("blocks.") and name.endswith(".weight"):
            # A block without biases computes what one with zeros does.
            bias = torch.zeros(weight.shape[0], dtype=weight.dtype)
            found.setdefault(f"{name.removesuffix('weight')}bias", bias)
    return found


def _vllm_refuses(config: Any) -> list[str]:
    tokens = config.speculators_config.proposal_methods[0].speculative_tokens
    return [f"speculative_tokens {tokens}: there are {config.num_heads} heads"] if tokens > config.num_heads else []


SERVER_LAYOUTS = (ServerLayout(server=VLLM, command=vllm_draft("medusa"), refusals=_vllm_refuses),)
PUBLISHED_FORMATS = (
    PublishedFormat(
        name="Medusa of vLLM",
        fits=_fits,
        config=_config,
        names=NAMES,
        from_verifier=("verifier_norm.",),
        amend=_amend,
    ),
)
