"""EAGLE-1 in the formats of servers and other trainers; head, embeddings and final norm stay with the verifier."""

from __future__ import annotations

from typing import Any

from speculators.facts import VerifierFacts
from speculators.formats.decoder import decoder_config, unknown_options
from speculators.formats.names import TensorNames, unchanged
from speculators.formats.published import PublishedCheckpoint, PublishedFormat
from speculators.formats.server_layout import VLLM, ServerLayout, activation_refusals, flat_decoder, vllm_draft
from speculators.formats.upstream import Fields

NAMES = TensorNames(unchanged("layers.", "fc.", "embed_tokens."), before=("model.",))
_VERIFIERS = ("lm_head.", "verifier_norm.", "embed_tokens.")


def _fits(source: PublishedCheckpoint) -> bool:
    others = ("midlayer.", "norm.", "hidden_norm.", "lm_head.")
    return (
        "speculators_model_type" not in source.config
        and source.has_tensors("fc.", "layers.0.self_attn.")
        and not any(source.has_tensors(name) for name in others)
    )


def _config(source: PublishedCheckpoint, facts: VerifierFacts) -> Fields:
    # `bias` is about `fc`, whose tensor says the same; an EAGLE-1 draft reads one state, whatever the number says.
    if wrong := unknown_options(source.config, "bias", "num_aux_hidden_states"):
        raise source.error(*wrong)
    return {
        "fc_bias": source.has_tensors("fc.bias"),
        "target_layer_ids": [facts.num_hidden_layers],
        "draft_vocab_size": facts.vocab_size,
        "transformer_layer_config": decoder_config(source.config, "llama", source, num_states=1),
    }


def _vllm_config(config: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], **flat_decoder(config.transformer_layer_config)}


def _vllm_refuses(config: Any) -> list[str]:
    decoder, reasons = config.transformer_layer_config, activation_refusals(config)
    if config.draft_vocab_size not in (None, decoder["vocab_size"]):
        message = f"draft_vocab_size {config.draft_vocab_size}: vLLM drafts all {decoder['vocab_size']} tokens with the"
        reasons.append(f"{message} verifier's head; train without algorithm.draft_vocab_size")
    if decoder["model_type"] != "llama":
        reasons.append(f"decoder.model_type {decoder['model_type']!r}: vLLM's layer is Llama's, without head norms")
    if config.fc_bias:
        reasons.append("fc_bias: vLLM's fc has no bias")
    return reasons


SERVER_LAYOUTS = (
    ServerLayout(
        server=VLLM,
        command=vllm_draft("eagle"),
        names=NAMES,
        from_verifier=_VERIFIERS,
        config=_vllm_config,
        refusals=_vllm_refuses,
    ),
)
PUBLISHED_FORMATS = (
    PublishedFormat(
        name="EAGLE-1 of SafeAILab, HASS", fits=_fits, config=_config, names=NAMES, from_verifier=_VERIFIERS
    ),
)
