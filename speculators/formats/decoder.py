"""The draft's decoder as other programs write it down, turned into `transformer_layer_config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig

from speculators.formats.foreign import Source
from speculators.verifier.quiet import quiet

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
# What a file must say: the classes' own values for it are those of one model, and no draft's.
_SAID = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
# Read besides: the older keys of the rotary embedding, and those that say which layers have a window.
_ALSO = (
    "num_hidden_layers",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
)
FULL, SLIDING = "full_attention", "sliding_attention"


def decoder_of(raw: Mapping[str, Any], kind: str, source: Source, *, num_states: int) -> dict[str, Any]:
    """Returns `transformer_layer_config` from a config in Hugging Face's keys, older or newer.

    Files leave out what equals the class's own values (`to_diff_dict`), so those are filled in from transformers: they
    are what the checkpoint was trained with, whatever its verifier has.

    Args:
        raw: the decoder's keys.
        kind: "llama" or "qwen3": the layers that the tensors are of.
        num_states: verifier states that the draft fuses (A).

    Raises:
        ArtifactError: keys are missing or not taken, or full and sliding attention are mixed.
    """
    if missing := [key for key in _SAID if not isinstance(raw.get(key), int)]:
        raise source.wrong(f"does not say {', '.join(missing)}")
    told = {key: raw[key] for key in (*_KEYS, *_ALSO) if raw.get(key) is not None}
    try:
        with quiet():
            filled = AutoConfig.for_model(kind, **told).to_dict()
    # transformers validates with classes of its own that change between versions.
    except Exception as error:
        raise source.wrong(f"transformers does not take it for a {kind}: {error}") from error
    types = raw.get("layer_types") or filled.get("layer_types") or [FULL] * raw["num_hidden_layers"]
    if len({*types}) > 1:
        raise source.wrong(f"layer_types mixes {', '.join(sorted({*types}))}: the layers of a draft here have one kind")
    decoder: dict[str, Any] = {"model_type": kind, "num_hidden_layers": raw["num_hidden_layers"]}
    decoder |= {key: filled.get(key) for key in _KEYS}
    decoder["mlp_bias"] = bool(decoder["mlp_bias"])
    decoder |= {"layer_types": types, "tie_word_embeddings": False}
    if types[0] == SLIDING:
        if not isinstance(raw.get("sliding_window"), int):
            raise source.wrong("layer_types says sliding_attention, and no sliding_window is said")
        decoder["sliding_window"] = raw["sliding_window"]
    if num_states != 3:
        decoder["num_aux_hidden_states"] = num_states
    return decoder
