"""EAGLE-3 in the formats of servers and other trainers: the layer is `midlayer`, or with NVIDIA `layers.0`."""

from __future__ import annotations

import re
from typing import Any

from speculators.facts import VerifierFacts
from speculators.formats.decoder import decoder_config, unknown_options
from speculators.formats.names import TensorNames, unchanged
from speculators.formats.published import PublishedCheckpoint, PublishedFormat, Tensors
from speculators.formats.server_layout import (
    SGLANG,
    VLLM,
    ServerLayout,
    activation_refusals,
    flat_decoder,
    sglang_draft,
    vllm_draft,
    vllm_serve,
)
from speculators.formats.upstream import VERIFIER_COPIES, Fields, upstream_format

_SHARED = unchanged("fc.", "input_norm.", "fc_norm.", "norm.", "lm_head.", "embed_tokens.", "d2t", "t2d")
MIDLAYER = TensorNames(
    (
        ("midlayer.", "layers.0."),
        ("layers.", "layers."),
        *_SHARED,
        # SGLang's older names for the norm of each state.
        ("aux_norm_low.", "fc_norm.0."),
        ("aux_norm_mid.", "fc_norm.1."),
        ("aux_norm_high.", "fc_norm.2."),
    ),
    before=("model.",),
)
LAYERS = TensorNames((("layers.", "layers."), *_SHARED, *VERIFIER_COPIES))


def _sglang_config(config: Any) -> dict[str, Any]:
    decoder = config.transformer_layer_config
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **flat_decoder(decoder),
        "draft_vocab_size": config.draft_vocab_size or decoder["vocab_size"],
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "num_aux_hidden_states": len(config.eagle_aux_hidden_state_layer_ids),
        # SGLang counts the layer that a state leaves, we the one that it enters.
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [id - 1 for id in config.eagle_aux_hidden_state_layer_ids],
        },
    }


def _sglang_refuses(config: Any) -> list[str]:
    decoder = config.transformer_layer_config
    reasons = activation_refusals(config)
    if config.norm_before_residual:
        reasons.append(
            "norm_before_residual: SGLang adds the state before its norm to the attention's output; train with "
            "algorithm.norm_before_residual = false"
        )
    if config.norm_before_fc:
        reasons.append(
            "norm_before_fc: SGLang has no norm over all states; train with algorithm.fc_norm = true, which norms each"
        )
    if decoder["model_type"] != "llama":
        reasons.append(f"decoder.model_type {decoder['model_type']!r}: SGLang's layer is Llama's, without head norms")
    if decoder["num_hidden_layers"] != 1:
        reasons.append(
            f"num_layers {decoder['num_hidden_layers']}: SGLang loads drafts of one layer only in this layout"
        )
    if config.target_hidden_size is not None:
        reasons.append("target_hidden_size: this layout has no embeddings, and a narrower draft needs its own")
    if decoder["attention_bias"] or decoder["mlp_bias"]:
        reasons.append("decoder.attention_bias, decoder.mlp_bias: SGLang's layer has no biases")
    return reasons


def _fits_midlayer(source: PublishedCheckpoint) -> bool:
    # NVIDIA's current files name the layer as ours do.
    layer = source.has_tensors("midlayer.", "fc.") or source.has_tensors("layers.0.hidden_norm.", "fc.")
    return layer and "speculators_model_type" not in source.config


# Top-level keys that the format has beside the decoder's.
_MIDLAYER_KEYS = (
    "draft_vocab_size",
    "eagle_aux_hidden_state_layer_ids",
    "eagle_config",
    "fc_norm",
    "norm_before_fc",
    "norm_before_residual",
    "norm_output",
    "num_aux_hidden_states",
    "target_hidden_size",
    "use_aux_norm",
)
# Keys of `eagle_config` that NVIDIA writes, with the only values that mean a draft of ours.
_EAGLE_TABLE = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "next_layer_regular": True,
    "eh_proj_before_attn": False,
    "parallel_draft_step": 1,
}
# Its second key counts the layers of heads that exist from the second parallel step on.
_TABLE_KEYS = ("eagle_aux_hidden_state_layer_ids", "parallel_draft_heads_num_layers")


def _midlayer_config(source: PublishedCheckpoint, facts: VerifierFacts) -> Fields:
    raw = source.config
    table = raw.get("eagle_config") or {}
    wrong = unknown_options(raw, *_MIDLAYER_KEYS)
    # Norms that no draft here has.
    norms = dict.fromkeys((key for key in table if re.fullmatch(r"use_\w+_layernorm", key)), False)
    off = {**norms, **_EAGLE_TABLE}
    wrong += [f"eagle_config.{each}" for each in unknown_options(table, *_TABLE_KEYS, off=off)]
    if wrong:
        raise source.error(*wrong)
    if (before := table.get("eagle_aux_hidden_state_layer_ids")) is not None:
        ids = [layer + 1 for layer in before]
    else:
        # The default of SafeAILab, SpecForge, SGLang and vLLM.
        count = facts.num_hidden_layers
        ids = raw.get("eagle_aux_hidden_state_layer_ids") or [2, count // 2, count - 3]
    heads = source.has_tensors("midlayer.self_attn.q_norm.")
    fields: Fields = {name: bool(raw.get(name)) for name in ("norm_before_residual", "norm_before_fc", "norm_output")}
    if raw.get("target_hidden_size") not in (None, raw.get("hidden_size")):
        fields["target_hidden_size"] = raw["target_hidden_size"]
    return {
        **fields,
        "fc_norm": bool(raw.get("fc_norm") or raw.get("use_aux_norm")),
        "eagle_aux_hidden_state_layer_ids": list(ids),
        "draft_vocab_size": _draft_vocab_size(source),
        "transformer_layer_config": decoder_config(raw, "qwen3" if heads else "llama", source, num_states=len(ids)),
    }


def _draft_vocab_size(source: PublishedCheckpoint) -> int:
    rows = [shape[0] for name, shape in source.shapes.items() if name.endswith("lm_head.weight")]
    if not rows:
        raise source.error("there is no lm_head.weight beside it, but an EAGLE-3 draft has its own head")
    return rows[0]


def _without_identity_map(config: Any, tensors: Tensors) -> Tensors:
    """Drops the maps of a whole vocabulary, which some writers save as zeros and ones."""
    whole = config.draft_vocab_size == config.transformer_layer_config["vocab_size"]
    if whole and "d2t" in tensors and not tensors["d2t"].any():
        return {name: tensor for name, tensor in tensors.items() if name not in ("d2t", "t2d")}
    return tensors


def _check_residual(source: PublishedCheckpoint, fields: Fields) -> Fields:
    if "norm_before_residual" not in source.config:
        message = "lacks norm_before_residual, whose default differs between trainers and servers: add it"
        raise source.error(message)
    return fields


SERVER_LAYOUTS = (
    ServerLayout(server=VLLM, command=vllm_serve, with_k=vllm_draft("eagle3"), refusals=activation_refusals),
    ServerLayout(
        server=SGLANG,
        command=sglang_draft("EAGLE3"),
        names=MIDLAYER,
        from_verifier=("embed_tokens.",),
        config=_sglang_config,
        refusals=_sglang_refuses,
    ),
)
PUBLISHED_FORMATS = (
    PublishedFormat(
        name="EAGLE-3 of SafeAILab, SpecForge, NVIDIA and SGLang",
        fits=_fits_midlayer,
        config=_midlayer_config,
        names=MIDLAYER,
        from_verifier=("embed_tokens.",),
        amend=_without_identity_map,
    ),
    upstream_format(
        "eagle3",
        names=LAYERS,
        from_verifier=("embed_tokens.",),
        layer_ids="eagle_aux_hidden_state_layer_ids",
        training=("enable_sp_ulysses",),
        narrower=True,
        adapt=_check_residual,
    ),
)
