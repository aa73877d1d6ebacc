"""EAGLE-1 as servers and other trainers write it: head, embeddings and final norm stay with the verifier."""

from __future__ import annotations

from typing import Any

from speculators.facts import VerifierFacts
from speculators.formats.decoder import decoder_of
from speculators.formats.foreign import Foreign, Source
from speculators.formats.names import Names
from speculators.formats.served import VLLM, Served, flat_decoder, vllm_draft
from speculators.formats.upstream import Fields

NAMES = Names((("layers.", "layers."), ("fc.", "fc."), ("embed_tokens.", "embed_tokens.")), before=("model.",))
_VERIFIERS = ("lm_head.", "verifier_norm.", "embed_tokens.")


def _fits(source: Source) -> bool:
    others = ("midlayer.", "norm.", "hidden_norm.", "lm_head.")
    return (
        "speculators_model_type" not in source.config
        and source.has("fc.", "layers.0.self_attn.")
        and not any(source.has(name) for name in others)
    )


def _config(source: Source, facts: VerifierFacts) -> Fields:
    return {
        "fc_bias": source.has("fc.bias"),
        "target_layer_ids": [facts.num_hidden_layers],
        "draft_vocab_size": facts.vocab_size,
        "transformer_layer_config": decoder_of(source.config, "llama", source, num_states=1),
    }


def _vllm_config(config: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], **flat_decoder(config.transformer_layer_config)}


def _vllm_refuses(config: Any) -> list[str]:
    decoder, found = config.transformer_layer_config, []
    if config.draft_vocab_size not in (None, decoder["vocab_size"]):
        message = f"draft_vocab_size {config.draft_vocab_size}: vLLM drafts with the verifier's head, over all of its"
        found.append(f"{message} {decoder['vocab_size']} tokens; train without algorithm.draft_vocab_size")
    if decoder["model_type"] != "llama":
        found.append(f"decoder.model_type {decoder['model_type']!r}: vLLM's layer is Llama's, without norms of heads")
    if config.fc_bias:
        found.append("fc_bias: vLLM's fc has no bias")
    return found


SERVED = (
    Served(
        server=VLLM,
        command=vllm_draft("eagle"),
        names=NAMES,
        left_out=_VERIFIERS,
        config=_vllm_config,
        refusals=_vllm_refuses,
    ),
)
FOREIGN = (
    Foreign(name="EAGLE-1 of SafeAILab, HASS", fits=_fits, config=_config, names=NAMES, from_verifier=_VERIFIERS),
)
