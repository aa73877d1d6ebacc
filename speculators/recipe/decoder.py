"""The draft's decoder config, inherited from the verifier's: most silent failures in the field begin here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import attrs
from attrs import field

from speculators.config import SpeculatorModelConfig, VerifierFacts, positive
from speculators.errors import Problem, RecipeError
from speculators.recipe.converter import structure
from speculators.recipe.validators import between
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
# Said elsewhere, or fixed by what the draft is attached to.
_FIXED = {
    "num_hidden_layers": "set algorithm.num_layers",
    "num_aux_hidden_states": "set algorithm.target_layer_ids",
    "hidden_size": "the draft reads and writes the verifier's states",
    "vocab_size": "the draft reads the verifier's tokens; algorithm.draft_vocab_size says which it drafts",
    "tie_word_embeddings": "the draft's head has rows of its own",
    "layer_types": "sliding_window says it: with one all layers slide, without one all attend to everything",
    # Beside rope_parameters these would be read by nobody, and "nothing errors" (Model-Optimizer#2221).
    "rope_theta": "set rope_parameters",
    "rope_scaling": "set rope_parameters",
    "partial_rotary_factor": "set rope_parameters",
}


def _even(_: object, __: attrs.Attribute[Any], value: int | None) -> None:
    if value is not None and value % 2:
        raise ValueError(f"must be even, got {value}: the rotary embedding turns pairs of a head's values")


def _has_theta(_: object, __: attrs.Attribute[Any], value: dict[str, Any] | None) -> None:
    theta = None if value is None else value.get("rope_theta")
    if value is not None and (isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0):
        raise ValueError(f"must have rope_theta, a number > 0, got {theta!r}")


@attrs.frozen(kw_only=True)
class _Values:
    """The types and bounds of a decoder's values; None stands for one that is not there."""

    hidden_size: int = field(default=None, validator=positive)
    intermediate_size: int = field(default=None, validator=positive)
    num_attention_heads: int = field(default=None, validator=positive)
    num_key_value_heads: int = field(default=None, validator=positive)
    head_dim: int = field(default=None, validator=[positive, _even])
    max_position_embeddings: int = field(default=None, validator=positive)
    rms_norm_eps: float = field(default=None, validator=positive)
    vocab_size: int = field(default=None, validator=positive)
    model_type: str = field(default=None)
    hidden_act: str = field(default=None)
    rope_parameters: dict[str, Any] = field(default=None, validator=_has_theta)
    attention_bias: bool = field(default=None)
    mlp_bias: bool = field(default=None)
    sliding_window: int = field(default=None, validator=positive)
    attention_dropout: float = field(default=0.0, validator=between(0, 1))
    initializer_range: float = field(default=None, validator=positive)

    @num_key_value_heads.validator
    def _divides_the_heads(self, _: attrs.Attribute[Any], value: int | None) -> None:
        heads = self.num_attention_heads
        if value and heads and heads % value:
            raise ValueError(f"must divide the {heads} attention heads, got {value}")


_VALUE_KEYS = tuple(key.name for key in attrs.fields(_Values))


def draft_decoder_config(facts: VerifierFacts, config: SpeculatorModelConfig) -> dict[str, Any]:
    """Returns `transformer_layer_config`: the verifier's values, then those of `config.decoder` over them.

    Raises:
        RecipeError: a value that neither the verifier's config.json nor `algorithm.decoder` has, one that no decoder
            can have, or a key that does not exist.
    """
    own = dict(config.decoder)
    problems = [*_wrong_keys(facts, own), *wrong_values(own)]
    if problems:
        raise RecipeError(problems)
    ids = config.layer_ids(facts.num_hidden_layers)
    kind = "full_attention" if own.get("sliding_window") is None else "sliding_attention"
    decoder: dict[str, Any] = {"model_type": config.decoder_type, "num_hidden_layers": config.num_layers}
    decoder |= {key: facts[key] for key in _INHERITED if facts.get(key) is not None}
    # Gemma's files say hidden_activation.
    decoder["hidden_act"] = facts.get("hidden_act") or facts.get("hidden_activation")
    decoder["rope_parameters"] = _rope(facts, kind)
    decoder |= {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
    decoder["layer_types"] = [kind] * config.num_layers
    if len(ids) != 3:
        decoder["num_aux_hidden_states"] = len(ids)
    decoder |= own
    for key in (*_INHERITED, "hidden_act", "rope_parameters"):
        if decoder.get(key) is None:
            hint = "set it" if key not in _FIXED else "is this the config.json of a language model?"
            problems.append(Problem(f"algorithm.decoder.{key}", f"{facts.source} has no {key!r} to inherit", hint))
    # Those of `own` were right by themselves: what is wrong now is the verifier's, or does not go with it.
    for problem in wrong_values(decoder):
        inherited = problem.path.removeprefix("algorithm.decoder.") not in own
        problems.append(dataclasses.replace(problem, hint=f"inherited from {facts.source}") if inherited else problem)
    if problems:
        raise RecipeError(problems)
    return decoder


def wrong_values(decoder: Mapping[str, Any]) -> list[Problem]:
    """Returns the problems of values that no decoder can have, whatever its verifier is."""
    told = {key: decoder[key] for key in _VALUE_KEYS if decoder.get(key) is not None}
    return structure(told, _Values, path=("algorithm", "decoder"))[1]


def _wrong_keys(facts: VerifierFacts, own: Mapping[str, Any]) -> list[Problem]:
    known = sorted({*_VALUE_KEYS, *facts} - set(_FIXED))
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
    # Older files keep these outside of the rotary parameters, where they are lost when only those are copied.
    outside = ("partial_rotary_factor", *(["original_max_position_embeddings"] if "long_factor" in rope else []))
    return {**rope, **{key: facts[key] for key in outside if facts.get(key) is not None}}
