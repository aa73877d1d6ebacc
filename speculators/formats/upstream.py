"""Checkpoints of the `speculators` project (0.5 to 0.9), whose layout of names ours follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from speculators.config import SpeculatorModelConfig, default_layer_ids
from speculators.facts import VerifierFacts
from speculators.formats.decoder import decoder_of
from speculators.formats.foreign import Foreign, Source
from speculators.formats.names import Names

# Of every config.json of that project: said by us anew, or about no weights.
_PASSED_OVER = (
    "speculators_config",
    "transformer_layer_config",
    "speculators_version",
    "architectures",
    "auto_map",
    "dtype",
    "has_no_defaults_at_init",
    "model_type",
    "torch_dtype",
    "transformers_version",
    "tie_word_embeddings",
)
# Frozen copies of the verifier's, which older versions saved.
VERIFIERS_OWN = (("verifier_lm_head.", ""), ("verifier_norm.", ""))

Fields = dict[str, Any]


def upstream(
    algorithm: str,
    *,
    names: Names,
    from_verifier: tuple[str, ...],
    layer_ids: str,
    training: tuple[str, ...] = (),
    adapt: Callable[[Source, Fields], Fields] = lambda source, fields: fields,
) -> Foreign:
    """Returns the format of an algorithm's checkpoints.

    Args:
        algorithm: `speculators_model_type`.
        names: of the tensors.
        from_verifier: as `Foreign` has it.
        layer_ids: the key that holds the ids of the verifier's states.
        training: keys that training alone reads.
        adapt: what is special about the algorithm's fields.
    """

    def config(source: Source, facts: VerifierFacts) -> Fields:
        config_class = SpeculatorModelConfig.get_class(algorithm)
        fields = taken_over(source, config_class, (*training, layer_ids))
        ids = source.config.get(layer_ids) or default_layer_ids(facts.num_hidden_layers)
        raw = source.config["transformer_layer_config"]
        kind = raw.get("model_type", config_class.decoder_type)
        decoder = decoder_of(raw, kind, source, num_states=len(ids))
        fields |= {layer_ids: list(ids), "transformer_layer_config": decoder}
        return adapt(source, {"draft_vocab_size": decoder["vocab_size"], **fields})

    return Foreign(
        name=f"speculators 0.5-0.9, {algorithm}",
        fits=lambda source: source.config.get("speculators_model_type") == algorithm,
        config=config,
        names=names,
        from_verifier=from_verifier,
    )


def taken_over(source: Source, config_class: type[SpeculatorModelConfig], passed_over: tuple[str, ...]) -> Fields:
    """Returns the keys of a config.json that our config has, and K; one that nobody here knows is an error."""
    raw = source.config
    if not isinstance(raw.get("transformer_layer_config"), Mapping):
        raise source.wrong("has no transformer_layer_config")
    own = {field.name for field in attrs.fields(config_class) if not field.metadata.get("knob")} - {*_PASSED_OVER}
    known = {*own, *config_class.others, *_PASSED_OVER, *passed_over}
    found = config_class.refusals(raw)
    for key, value in raw.items():
        if key not in known:
            # What is off may be on by default where it comes from.
            off = value in (None, False)
            mend = "; take it out of config.json if the draft is the same without it" if off else ""
            found.append(f"{key} = {value!r} is not known here{mend}")
    if found:
        raise source.wrong(*found)
    fields = {key: value for key, value in raw.items() if key in own and key not in passed_over}
    methods = (raw.get("speculators_config") or {}).get("proposal_methods") or [{}]
    if tokens := methods[0].get("speculative_tokens"):
        fields["speculative_tokens"] = tokens
    return fields
