"""Checkpoints of the upstream `speculators` project (0.5 to 0.9), whose tensor names ours follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from speculators.config import SpeculatorModelConfig, default_layer_ids
from speculators.facts import VerifierFacts
from speculators.formats.decoder import decoder_config
from speculators.formats.names import TensorNames
from speculators.formats.published import PublishedCheckpoint, PublishedFormat

# Keys in every upstream config.json that an import ignores: it writes them anew, or they do not concern the weights.
_IGNORED = (
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
# Frozen copies of the verifier's tensors, which older versions saved; an import leaves them out.
VERIFIER_COPIES = (("verifier_lm_head.", ""), ("verifier_norm.", ""))

Fields = dict[str, Any]


def upstream_format(
    algorithm: str,
    *,
    names: TensorNames,
    from_verifier: tuple[str, ...],
    layer_ids: str,
    training: tuple[str, ...] = (),
    narrower: bool = False,
    adapt: Callable[[PublishedCheckpoint, Fields], Fields] = lambda source, fields: fields,
) -> PublishedFormat:
    """Describes upstream's checkpoints of one algorithm.

    Args:
        algorithm: `speculators_model_type`.
        names: of the tensors.
        from_verifier: see `PublishedFormat`.
        layer_ids: the key that lists the verifier layers whose states the draft reads.
        training: keys that only training reads.
        narrower: drafts may be narrower than their verifier.
        adapt: adjusts the fields to the algorithm's peculiarities.
    """

    def config(source: PublishedCheckpoint, facts: VerifierFacts) -> Fields:
        config_class = SpeculatorModelConfig.get_class(algorithm)
        fields = shared_fields(source, config_class, (*training, layer_ids))
        ids = source.config.get(layer_ids) or default_layer_ids(facts.num_hidden_layers)
        raw = source.config["transformer_layer_config"]
        kind = raw.get("model_type", config_class.decoder_type)
        decoder = decoder_config(raw, kind, source, num_states=len(ids))
        width = fields.pop("target_hidden_size", None)
        if width not in (None, decoder["hidden_size"]):
            if not narrower:
                raise source.error(
                    f"target_hidden_size = {width}, but hidden_size = {decoder['hidden_size']}: drafts of {algorithm} "
                    "here are as wide as their verifier"
                )
            fields["target_hidden_size"] = width
        fields |= {layer_ids: list(ids), "transformer_layer_config": decoder}
        return adapt(source, {"draft_vocab_size": decoder["vocab_size"], **fields})

    return PublishedFormat(
        name=f"speculators 0.5-0.9, {algorithm}",
        fits=lambda source: source.config.get("speculators_model_type") == algorithm,
        config=config,
        names=names,
        from_verifier=from_verifier,
    )


def shared_fields(
    source: PublishedCheckpoint, config_class: type[SpeculatorModelConfig], ignored: tuple[str, ...]
) -> Fields:
    """Picks the keys of a config.json that our config has too, and K ("speculative_tokens").

    Raises:
        ArtifactError: a key is unknown; it could change what the network computes, so it must not be dropped.
    """
    raw = source.config
    if not isinstance(raw.get("transformer_layer_config"), Mapping):
        raise source.error("lacks transformer_layer_config")
    own = {field.name for field in attrs.fields(config_class) if not field.metadata.get("knob")} - {*_IGNORED}
    known = {*own, *config_class.unsupported, *_IGNORED, *ignored}
    problems = config_class.refusals(raw)
    for key, value in raw.items():
        if key not in known:
            # An option that is switched off here may be on by default in the project that wrote it.
            off = value in (None, False)
            remedy = "; remove it from config.json if the draft is the same without it" if off else ""
            problems.append(f"{key} = {value!r} is unknown{remedy}")
    if problems:
        raise source.error(*problems)
    fields = {key: value for key, value in raw.items() if key in own and key not in ignored}
    methods = (raw.get("speculators_config") or {}).get("proposal_methods") or [{}]
    if tokens := methods[0].get("speculative_tokens"):
        fields["speculative_tokens"] = tokens
    return fields
