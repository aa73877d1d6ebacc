"""Converts a draft's decoder, as other programs write it, into our `transformer_layer_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speculators.formats.published import PublishedCheckpoint
from speculators.recipe.decoder import rope_values

_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "vocab_size",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
)
# A file must contain these: the defaults of transformers' classes are the sizes of one large model, never a draft's.
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
# Passed to transformers as well: older keys of the rotary embedding, and keys that select the layers with a window.
_ALSO = (
    "num_hidden_layers",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
)
# Keys on which no network depends: names, versions, token ids, and what only training reads.
_NEUTRAL = (
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "model_type",
    "pad_token_id",
    "pretraining_tp",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
# Keys that change nothing as long as they have these values.
_OFF = {"tie_word_embeddings": False, "bias": False, "qkv_bias": False}
FULL, SLIDING = "full_attention", "sliding_attention"


def unknown_options(raw: Mapping[str, Any], *known: str, off: Mapping[str, Any] = _OFF) -> list[str]:
    """Lists the keys of a flat config.json that could mean another network than the one built here.

    Args:
        raw: its content, or one table of it.
        known: keys that the format reads, besides those of the decoder.
        off: keys that are accepted with one value only.
    """
    read = {*_KEYS, *_ALSO, "layer_types", *_NEUTRAL, *known}
    problems = []
    for key, value in raw.items():
        if key in off and key not in known:
            if value not in (None, off[key]):
                problems.append(f"{key} = {value!r} is not known here; only {off[key]!r} is")
        elif key not in read:
            # An option that is switched off here may be on by default in the project that wrote it.
            remedy = (
                "; remove it from config.json if the draft is the same without it" if value in (None, False) else ""
            )
            problems.append(f"{key} = {value!r} is unknown{remedy}")
    return problems


def decoder_config(
    raw: Mapping[str, Any], kind: str, source: PublishedCheckpoint, *, num_states: int
) -> dict[str, Any]:
    """Builds `transformer_layer_config` from a config with Hugging Face's keys, older or newer.

    Writers omit values that equal the class's defaults (`to_diff_dict`). The omitted values are filled in from
    transformers, not from the verifier: the checkpoint was trained with them.

    Args:
        raw: the decoder's keys.
        kind: "llama" or "qwen3", the kind of layer that the tensors belong to.
        source: the checkpoint, for errors.
        num_states: verifier states that the draft fuses (A).

    Raises:
        ArtifactError: keys are missing or rejected, or full and sliding attention are mixed.
    """
    if missing := [key for key in _REQUIRED if not isinstance(raw.get(key), int)]:
        raise source.error(f"lacks {', '.join(missing)}")
    values = {key: raw[key] for key in (*_KEYS, *_ALSO) if raw.get(key) is not None}
    # Late: `spec validate` imports this module through `layouts.py`, and must start without transformers.
    from transformers import AutoConfig

    from speculators.verifier.quiet import quiet

    try:
        with quiet():
            filled = AutoConfig.for_model(kind, **values).to_dict()
    # transformers validates with classes of its own that change between versions.
    except Exception as error:
        raise source.error(f"transformers rejects it as a {kind} config: {error}") from error
    types = raw.get("layer_types") or filled.get("layer_types") or [FULL] * raw["num_hidden_layers"]
    if len({*types}) > 1:
        raise source.error(f"layer_types mixes {', '.join(sorted({*types}))}: all layers of a draft must have one kind")
    decoder: dict[str, Any] = {"model_type": kind, "num_hidden_layers": raw["num_hidden_layers"]}
    decoder |= {key: filled.get(key) for key in _KEYS}
    decoder["rope_parameters"] = rope_values(decoder["rope_parameters"])
    decoder["mlp_bias"] = bool(decoder["mlp_bias"])
    decoder |= {"layer_types": types, "tie_word_embeddings": False}
    if types[0] == SLIDING:
        if not isinstance(raw.get("sliding_window"), int):
            raise source.error("layer_types is sliding_attention, but sliding_window is missing")
        decoder["sliding_window"] = raw["sliding_window"]
    # vLLM assumes three fused states unless this key says otherwise.
    if num_states != 3:
        decoder["num_aux_hidden_states"] = num_states
    return decoder
