"""Derives the draft's decoder config from the verifier's. Most silent failures in the field begin here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import attrs
from attrs import field

from speculators.config import SpeculatorModelConfig, positive
from speculators.errors import Problem, RecipeError
from speculators.facts import VerifierFacts
from speculators.registry import near_miss
from speculators.structure.converter import structure
from speculators.structure.validators import one_of

# Copied unchanged: with a rotary embedding or norm other than the verifier's, a draft trains and fails in a server.
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
# The shape of a draft whose verifier's own cannot be taken over: sizes of published drafts.
_HEAD_DIM, _KEY_HEADS, _WIDEST_MLP = 128, 8, 4
# Set elsewhere, or fixed by the verifier that the draft is attached to.
_FIXED = {
    "num_hidden_layers": "set algorithm.num_layers",
    "num_aux_hidden_states": "set algorithm.target_layer_ids",
    "hidden_size": "the draft reads and writes the verifier's states",
    "vocab_size": "the draft reads the verifier's tokens; algorithm.draft_vocab_size limits which it drafts",
    "tie_word_embeddings": "the draft's head has its own rows",
    "layer_types": "set sliding_window: with it all layers slide, without it all attend to everything",
    # Nothing reads these beside rope_parameters, and "nothing errors" (Model-Optimizer#2221).
    "rope_theta": "set rope_parameters",
    "rope_scaling": "set rope_parameters",
    "partial_rotary_factor": "set rope_parameters",
}
# The kinds of rotary embedding that transformers computes, with the values that each must have besides theta.
_ROPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
# Beside these, every kind reads rope_type, rope_theta and partial_rotary_factor; the values here may be absent.
_LENGTH = "original_max_position_embeddings"
_ROPE_OPTIONS: dict[str, tuple[str, ...]] = {
    "yarn": (_LENGTH, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": (_LENGTH, "factor", "attention_factor"),
    "llama3": (_LENGTH,),
    "proportional": ("factor",),
}
# The activations of transformers without weights of their own.
_ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "quick_gelu"),
    *("silu", "swish", "mish", "hardswish", "relu", "relu2", "relu6", "leaky_relu", "sigmoid", "tanh", "linear"),
)


def _even(_: object, __: attrs.Attribute[Any], value: int | None) -> None:
    if value is not None and value % 2:
        raise ValueError(f"must be even, got {value}: the rotary embedding turns pairs of a head's values")


def _known_activation(_: object, __: attrs.Attribute[Any], value: str | None) -> None:
    if value is not None:
        one_of(*_ACTIVATIONS)(_, __, value)


def _known_rope(_: object, __: attrs.Attribute[Any], value: dict[str, Any] | None) -> None:
    if value is None:
        return
    theta, kind = value.get("rope_theta"), value.get("rope_type", "default")
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        raise ValueError(f"must have rope_theta, a number > 0, got {theta!r}")
    if kind not in _ROPES:
        raise ValueError(f"must have a rope_type of {', '.join(_ROPES)}, got {kind!r}")
    if lacking := [key for key in _ROPES[kind] if key not in value]:
        raise ValueError(f"must have {', '.join(lacking)}, which rope_type {kind!r} reads")
    if unread := sorted(value.keys() - rope_values(value).keys()):
        raise ValueError(f"must not have {', '.join(unread)}: no layer of a draft reads it with rope_type {kind!r}")


def rope_values(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Picks the rotary parameters that a draft's layers read.

    A text token has the same place on all axes of a multimodal embedding (M-RoPE), which is then the plain one. Its
    other keys must not remain: vLLM refuses every draft that has `mrope_section`.
    """
    # Qwen2-VL's files call the plain kind "mrope".
    kept = {**rope, "rope_type": "default"} if rope.get("rope_type") == "mrope" else dict(rope)
    kind = kept.get("rope_type", "default")
    if kind not in _ROPES:
        return kept
    read = {"rope_type", "rope_theta", "partial_rotary_factor", *_ROPES[kind], *_ROPE_OPTIONS.get(kind, ())}
    return {key: value for key, value in kept.items() if key in read}


@attrs.frozen(kw_only=True)
class _Values:
    """The values of a decoder that the draft's layers read, with types and bounds; None stands for a missing value."""

    hidden_size: int = field(default=None, validator=positive)
    intermediate_size: int = field(default=None, validator=positive)
    num_attention_heads: int = field(default=None, validator=positive)
    num_key_value_heads: int = field(default=None, validator=positive)
    head_dim: int = field(default=None, validator=[positive, _even])
    max_position_embeddings: int = field(default=None, validator=positive)
    rms_norm_eps: float = field(default=None, validator=positive)
    vocab_size: int = field(default=None, validator=positive)
    model_type: str = field(default=None)
    hidden_act: str = field(default=None, validator=_known_activation)
    rope_parameters: dict[str, Any] = field(default=None, validator=_known_rope)
    attention_bias: bool = field(default=None)
    mlp_bias: bool = field(default=None)
    sliding_window: int = field(default=None, validator=positive)

    @num_key_value_heads.validator
    def _divides_the_heads(self, _: attrs.Attribute[Any], value: int | None) -> None:
        heads = self.num_attention_heads
        if value and heads and heads % value:
            raise ValueError(f"must divide the {heads} attention heads, got {value}")


_VALUE_KEYS = tuple(key.name for key in attrs.fields(_Values))


def draft_decoder_config(facts: VerifierFacts, config: SpeculatorModelConfig) -> dict[str, Any]:
    """Builds `transformer_layer_config`: the verifier's values, overridden by those of `config.decoder`.

    Raises:
        RecipeError: a value is missing in both the verifier's config.json and `algorithm.decoder`, a value is not
            possible, or no layer reads a key.
    """
    own = dict(config.decoder)
    problems = wrong_values(own)
    if problems:
        raise RecipeError(problems)
    ids = config.layer_ids(facts.num_hidden_layers)
    kind = "full_attention" if own.get("sliding_window") is None else "sliding_attention"
    decoder: dict[str, Any] = {"model_type": config.decoder_type, "num_hidden_layers": config.num_layers}
    decoder |= {key: facts[key] for key in _INHERITED if facts.get(key) is not None}
    decoder |= {key: value for key, (value, _) in own_shape(facts).items()}
    decoder["hidden_act"] = facts.get("hidden_act")
    decoder["rope_parameters"] = inherited_rope(facts, kind)
    decoder |= {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False}
    decoder["layer_types"] = [kind] * config.num_layers
    if len(ids) != 3:
        decoder["num_aux_hidden_states"] = len(ids)
    decoder |= own
    for key in (*_INHERITED, "hidden_act", "rope_parameters"):
        if decoder.get(key) is None:
            hint = "set it" if key not in _FIXED else "is this the config.json of a language model?"
            problems.append(Problem(f"algorithm.decoder.{key}", f"{facts.source} has no {key!r} to inherit", hint))
    # `own` was valid by itself, so a problem now comes from the verifier's values or from the combination.
    for problem in _wrong_values(decoder):
        inherited = problem.path.removeprefix("algorithm.decoder.") not in own
        problems.append(dataclasses.replace(problem, hint=f"inherited from {facts.source}") if inherited else problem)
    if problems:
        raise RecipeError(problems)
    return decoder


def own_shape(facts: VerifierFacts) -> dict[str, tuple[int, str]]:
    """Chooses the sizes in which a draft's decoder departs from its verifier's unless the recipe sets them.

    Returns:
        For each key of the decoder its value, and the reason as a clause.
    """
    shape: dict[str, tuple[int, str]] = {}
    hidden, width = facts.get("hidden_size"), facts.get("intermediate_size")
    if facts.get("kv_lora_rank") and hidden and hidden % _HEAD_DIM == 0:
        heads = hidden // _HEAD_DIM
        key_heads = max(count for count in range(1, _KEY_HEADS + 1) if heads % count == 0)
        why = "the verifier's heads share one latent, a draft's would each keep keys of their own"
        shape |= {
            "num_attention_heads": (heads, why),
            "num_key_value_heads": (key_heads, why),
            "head_dim": (_HEAD_DIM, why),
        }
    _, met = facts.experts()
    if met and not facts.get("moe_intermediate_size") and isinstance(width, int) and hidden and width < 2 * hidden:
        widened = min(met * width, _WIDEST_MLP * hidden)
        if widened > width:
            why = f"the verifier's {width:,} is one expert's width, and a token meets {met}"
            shape["intermediate_size"] = (widened, why)
    return shape


def wrong_values(own: Mapping[str, Any]) -> list[Problem]:
    """Checks `algorithm.decoder` without its verifier: keys that no layer reads, and impossible values."""
    return [*_wrong_keys(own), *_wrong_values(own)]


def _wrong_values(decoder: Mapping[str, Any]) -> list[Problem]:
    values = {key: decoder[key] for key in _VALUE_KEYS if decoder.get(key) is not None}
    return structure(values, _Values, path=("algorithm", "decoder"))[1]


def _wrong_keys(own: Mapping[str, Any]) -> list[Problem]:
    known = sorted({*_VALUE_KEYS} - {*_FIXED})
    problems = []
    for key in own:
        path = f"algorithm.decoder.{key}"
        if key in _FIXED:
            problems.append(Problem(path, "cannot be replaced", _FIXED[key]))
        elif key not in known:
            hint = near_miss(key, known) or f"available: {', '.join(known)}"
            problems.append(Problem(path, f"no layer of a draft reads {key!r}", hint))
    return problems


def inherited_rope(facts: VerifierFacts, layer_type: str) -> dict[str, Any] | None:
    """Finds the verifier's rotary embedding; of several, the one for layers of `layer_type`."""
    rope = facts.get("rope_parameters")
    if not rope:
        return None
    if layer_type in rope:
        rope = rope[layer_type]
    # Older files keep these outside of the rotary parameters, where a copy of the parameters alone would lose them.
    outside = ("partial_rotary_factor", *(["original_max_position_embeddings"] if "long_factor" in rope else []))
    return rope_values({**rope, **{key: facts[key] for key in outside if facts.get(key) is not None}})
