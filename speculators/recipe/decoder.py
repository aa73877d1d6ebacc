"""The draft's decoder config, inherited from the verifier's: most silent failures in the field begin here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speculators.config import SpeculatorModelConfig, VerifierFacts
from speculators.errors import Problem, RecipeError
from speculators.registry import near_miss

# Taken over as they are: with another rotary embedding or norm than the verifier's, a draft trains and fails served.
_INHERITED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "vocab_size",
)
_OTHER_KEYS = ("model_type", "hidden_act", "rope_parameters", "attention_bias", "mlp_bias", "layer_types")
_OPTIONAL_KEYS = ("sliding_window", "attention_dropout", "initializer_range")
# Said elsewhere, or fixed by what the draft is attached to.
_FIXED = {
    "num_hidden_layers": "set algorithm.num_layers",
    "num_aux_hidden_states": "set algorithm.target_layer_ids",
    "hidden_size": "the draft reads and writes the verifier's states",
    "vocab_size": "the draft reads the verifier's tokens; algorithm.draft_vocab_size says which it drafts",
    "tie_word_embeddings": "the draft's head has rows of its own",
    # Beside rope_parameters these would be read by nobody, and "nothing errors" (Model-Optimizer#2221).
    "rope_theta": "set rope_parameters",
    "rope_scaling": "set rope_parameters",
    "partial_rotary_factor": "set rope_parameters",
}


def draft_decoder_config(facts: VerifierFacts, config: SpeculatorModelConfig) -> dict[str, Any]:
    """Returns `transformer_layer_config`: the verifier's values, then those of `config.decoder` over them.

    Raises:
        RecipeError: a value that neither the verifier's config.json nor `algorithm.decoder` has, or a key that does
            not exist; all of them together.
    """
    own = dict(config.decoder)
    problems = _wrong_keys(facts, own)
    ids = config.layer_ids(facts.num_hidden_layers)
    kind = "full_attention" if own.get("sliding_window") is None else "sliding_attention"
    layer_types = own.get("layer_types", [kind] * config.num_layers)
    decoder: dict[str, Any] = {"model_type": config.decoder_type, "num_hidden_layers": config.num_layers}
    decoder |= {key: facts[key] for key in _INHERITED if facts.get(key) is not None}
    # Gemma's files say hidden_activation.
    decoder["hidden_act"] = facts.get("hidden_act") or facts.get("hidden_activation")
    decoder["rope_parameters"] = _rope(facts, layer_types[0] if layer_types else kind)
    decoder |= {"attention_bias": False, "mlp_bias": False, "layer_types": layer_types, "tie_word_embeddings": False}
    if len(ids) != 3:
        decoder["num_aux_hidden_states"] = len(ids)
    decoder |= own
    for key in (*_INHERITED, "hidden_act", "rope_parameters"):
        if decoder.get(key) is None:
            hint = "set it" if key not in _FIXED else "is this the config.json of a language model?"
            problems.append(Problem(f"algorithm.decoder.{key}", f"{facts.source} has no {key!r} to inherit", hint))
    if len(layer_types) != config.num_layers:
        message = f"must have one type a layer: {config.num_layers}, got {len(layer_types)}"
        problems.append(Problem("algorithm.decoder.layer_types", message))
    if problems:
        raise RecipeError(problems)
    return decoder


def _wrong_keys(facts: VerifierFacts, own: Mapping[str, Any]) -> list[Problem]:
    known = sorted({*_INHERITED, *_OTHER_KEYS, *_OPTIONAL_KEYS, *facts} - set(_FIXED))
    problems = []
    for key in own:
        path = f"algorithm.decoder.{key}"
        if key in _FIXED:
            problems.append(Problem(path, "cannot be replaced", _FIXED[key]))
        elif key not in known:
            problems.append(Problem(path, f"unknown key {key!r}", near_miss(key, known)))
    return problems


def _rope(facts: VerifierFacts, layer_type: str) -> dict[str, Any] | None:
    """Returns the verifier's rotary embedding; where it has one a layer type, that of the draft's first layer."""
    rope = facts.get("rope_parameters")
    if not rope:
        return None
    if layer_type in rope:
        rope = rope[layer_type]
    partial = facts.get("partial_rotary_factor")
    # Older files keep the factor outside of the rotary parameters, where it is lost when only those are copied.
    return {**rope, "partial_rotary_factor": partial} if partial is not None else dict(rope)
