"""The kinds of decoder layer that an MTP head may have, without torch: `spec validate` asks which server reads one."""

from __future__ import annotations

from typing import Any

import attrs

from speculators.errors import ContractError
from speculators.facts import VerifierFacts

# Begins the names of a native head's tensors in the verifier's own checkpoint.
PREFIX = "mtp."


@attrs.frozen
class Kind:
    """How a decoder layer differs from Qwen3's.

    Attributes:
        shape_of: the `model_type` whose sizes and head norms it has.
        hybrid: norms multiply by 1 + w, and a gate from the query projection scales the attention's output.
        experts: the feed-forward is a mixture of experts with a shared one beside it.
    """

    shape_of: str
    hybrid: bool = False
    experts: bool = False


KINDS = {
    "llama": Kind("llama"),
    "qwen3": Kind("qwen3"),
    "qwen3_next": Kind("qwen3", hybrid=True, experts=True),
    "qwen3_5_text": Kind("qwen3", hybrid=True),
    "qwen3_5_moe_text": Kind("qwen3", hybrid=True, experts=True),
}
_EXPERT_KEYS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")


def kind_of(model_type: str) -> Kind:
    """Looks up the kind of an architecture; raises ContractError if no layer here implements it."""
    if model_type not in KINDS:
        raise ContractError(f"no layer of type {model_type!r}", hint=f"the types are: {', '.join(KINDS)}")
    return KINDS[model_type]


def native_decoder(decoder: dict[str, Any], facts: VerifierFacts) -> dict[str, Any]:
    """Completes `transformer_layer_config` with the architecture, and the experts, of the verifier's own layers.

    Raises:
        ContractError: no layer here implements the verifier's architecture.
    """
    own: dict[str, Any] = {"model_type": facts["model_type"]}
    if kind_of(facts["model_type"]).experts:
        own |= {key: facts[key] for key in _EXPERT_KEYS}
        # Qwen3.5's files lack this key; its router always normalises.
        own["norm_topk_prob"] = facts.get("norm_topk_prob", True)
    return {**decoder, **own}
