"""Medusa in vLLM's format. FasterDecoding publishes pickles (`medusa_lm_head.pt`), which are not read."""

from __future__ import annotations

from typing import Any

from speculators.facts import VerifierFacts
from speculators.formats.decoder import unknown_options
from speculators.formats.names import TensorNames, unchanged
from speculators.formats.published import PublishedCheckpoint, PublishedFormat, Tensors
from speculators.formats.server_layout import VLLM, ServerLayout, vllm_draft
from speculators.formats.upstream import Fields
from speculators.models.medusa.config import MedusaSpeculatorConfig
from speculators.recipe.decoder import draft_decoder_config

NAMES = TensorNames(
    (*unchanged("blocks.", "lm_heads.", "token_map", "verifier_norm."),),
    before=("medusa_heads.",),
)


# Keys of vLLM's own config of Medusa. Those of a tree (`topk`, `max_paths`) concern only how it drafts.
_READ = (
    "base_model_name_or_path",
    "logit_scale",
    "max_paths",
    "max_seq_len",
    "medusa_fc_bias",
    "original_lm_head",
    "topk",
    "truncated_vocab_size",
)


def _fits(source: PublishedCheckpoint) -> bool:
    is_ours = source.config.get("speculators_model_type", "medusa") == "medusa"
    return is_ours and source.config.get("model_type") == "medusa"


def _config(source: PublishedCheckpoint, facts: VerifierFacts) -> Fields:
    raw = source.config
    # vLLM accepts any key that contains "num" and "heads" or "layers".
    heads = [value for key, value in raw.items() if "num" in key and "heads" in key]
    layers = [value for key, value in raw.items() if "num" in key and "layers" in key]
    wrong = [f"lacks {key}" for key, values in (("num_heads", heads), ("num_hidden_layers", layers)) if not values]
    wrong += [f"lacks {key}" for key in ("hidden_size", "vocab_size") if key not in raw]
    if raw.get("logit_scale") not in (None, 1.0):
        wrong.append(f"logit_scale = {raw['logit_scale']!r} is not known here")
    wrong += unknown_options(raw, *_READ, *(key for key in raw if "num" in key and key.endswith(("heads", "layers"))))
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
    """Completes what vLLM's format may leave out: a projection per head over the draft vocabulary, and biases."""
    # Late, so that `spec validate` starts without torch.
    import torch

    completed = dict(tensors)
    if "lm_heads.0.weight" in completed:
        for head in range(1, config.num_heads):
            # original_lm_head: one projection for all heads.
            completed.setdefault(f"lm_heads.{head}.weight", completed["lm_heads.0.weight"])
    if "token_map" in completed and config.truncated_vocab_size < config.vocab_size:
        rows = completed["token_map"].long()
        # Our draft ids are in the order of the target ids.
        order = rows.argsort()
        for name in [name for name in completed if name.startswith("lm_heads.")]:
            whole = len(completed[name]) > len(rows)
            completed[name] = completed[name][rows[order] if whole else order]
        completed["token_map"] = rows[order]
    for name, weight in tensors.items():
        if name.startswith("blocks.") and name.endswith(".weight"):
            # A block without a bias equals one with zeros.
            bias = torch.zeros(weight.shape[0], dtype=weight.dtype)
            completed.setdefault(f"{name.removesuffix('weight')}bias", bias)
    return completed


def _vllm_refuses(config: Any) -> list[str]:
    tokens = config.speculators_config.proposal_methods[0].speculative_tokens
    return (
        [f"speculative_tokens {tokens}: there are {config.num_heads} heads, one per token"]
        if tokens > config.num_heads
        else []
    )


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
