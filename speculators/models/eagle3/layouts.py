"""EAGLE-3 in the formats of servers and other trainers; SGLang, SpecForge and SafeAILab call the layer `midlayer`."""

from __future__ import annotations

from typing import Any

from speculators.facts import VerifierFacts
from speculators.formats.decoder import decoder_config
from speculators.formats.names import TensorNames, unchanged
from speculators.formats.published import PublishedCheckpoint, PublishedFormat, Tensors
from speculators.formats.server_layout import SGLANG, VLLM, ServerLayout, flat_decoder, sglang_draft, vllm_serve
from speculators.formats.upstream import VERIFIER_COPIES, Fields, upstream_format

_SHARED = unchanged("fc.", "input_norm.", "fc_norm.", "norm.", "lm_head.", "embed_tokens.", "d2t", "t2d")
MIDLAYER = TensorNames(
    (
        ("midlayer.", "layers.0."),
        ("layers.0.", "layers.0."),
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
    reasons = []
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
    if decoder["attention_bias"] or decoder["mlp_bias"]:
        reasons.append("decoder.attention_bias, decoder.mlp_bias: SGLang's layer has no biases")
    return reasons


def _fits_midlayer(source: PublishedCheckpoint) -> bool:
    return "speculators_model_type" not in source.config and source.has_tensors("midlayer.", "fc.")


def _midlayer_config(source: PublishedCheckpoint, facts: VerifierFacts) -> Fields:
    raw = source.config
    table = raw.get("eagle_config") or {}
    if table.get("use_aux_hidden_state") is False:
        raise source.error(
            "eagle_config.use_aux_hidden_state is false: such a draft reads one state, but EAGLE-3 several"
        )
    if (before := table.get("eagle_aux_hidden_state_layer_ids")) is not None:
        ids = [layer + 1 for layer in before]
    else:
        # The default of SafeAILab, SpecForge, SGLang and vLLM.
        count = facts.num_hidden_layers
        ids = raw.get("eagle_aux_hidden_state_layer_ids") or [2, count // 2, count - 3]
    heads = source.has_tensors("midlayer.self_attn.q_norm.")
    fields = {name: bool(raw.get(name)) for name in ("norm_before_residual", "norm_before_fc", "norm_output")}
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
    ServerLayout(server=VLLM, command=vllm_serve),
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
        name="EAGLE-3 of SafeAILab, SpecForge and SGLang",
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
        adapt=_check_residual,
    ),
)
