"""Compares config.json with the verifier: rotary embedding, lengths, head size, eps and sizes.

The draft inherits these values from the verifier. A difference is wrong if training used another value, or if
acceptance rises with the verifier's value. It is a warning if the recipe asks for the difference, or the weights need
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs

from speculators.config import SpeculatorModelConfig
from speculators.doctor.check import Check, Family
from speculators.doctor.paired import TrialComparison
from speculators.doctor.speculator import ExaminedSpeculator, TrainingRun
from speculators.errors import SpeculatorsError
from speculators.facts import VerifierFacts
from speculators.recipe.decoder import draft_decoder_config, rope_values

CONFIG = Family("config")
# Compares other values of `transformer_layer_config` with the configured ones; None if the weights do not fit them or
# nothing could be replayed.
Try = Callable[[Mapping[str, Any]], TrialComparison | None]


@attrs.frozen(kw_only=True)
class Rule:
    """One inherited value.

    Attributes:
        name: name of the check.
        key: key in `transformer_layer_config`, or in its `rope_parameters`.
        rope: whether the key is in `rope_parameters`.
        default: the value if the key is missing.
        means: the consequence of a difference.
        unproven: the result if nothing shows whether the weights need the difference.
    """

    name: str
    key: str
    rope: bool = False
    default: Any = None
    means: str
    unproven: str = "wrong"


SERVED = "a server that uses the verifier's value accepts next to nothing, without any error"
RULES = (
    Rule(name="rope theta", key="rope_theta", rope=True, means=f"positions are rotated at a different speed: {SERVED}"),
    Rule(
        name="rope type",
        key="rope_type",
        rope=True,
        default="default",
        means=f"positions are scaled differently: {SERVED}",
    ),
    Rule(
        name="partial rotary factor",
        key="partial_rotary_factor",
        rope=True,
        default=1.0,
        means=f"a different part of each head is rotated: {SERVED}",
    ),
    Rule(
        name="max positions",
        key="max_position_embeddings",
        means="a server caps the draft's context there: beyond it, drafts end or are no longer accepted",
    ),
    Rule(name="head size", key="head_dim", means="heads are cut differently from the verifier's", unproven="warning"),
    Rule(name="norm eps", key="rms_norm_eps", means="small states are normalised differently", unproven="warning"),
)
# Nothing reads these keys if `rope_parameters` is there.
STALE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def check_config(speculator: ExaminedSpeculator, attempt: Try) -> Iterator[Check]:
    """Yields one check per inherited value."""
    decoder = speculator.decoder
    if not decoder:
        yield CONFIG.wrong("decoder", "config.json has no transformer_layer_config", "import or export it again")
        return
    yield _sizes(speculator)
    try:
        verifier = expected(speculator)
    except SpeculatorsError as error:
        yield CONFIG.skipped("decoder", f"the verifier's values cannot be derived: {error}")
        return
    own, inherited = flat(decoder), flat(verifier)
    for rule in RULES:
        yield _judge(speculator, rule, own.get(rule.name), inherited[rule.name], attempt)
    yield _scaling(speculator, own, inherited, attempt)


def expected(speculator: ExaminedSpeculator) -> dict[str, Any]:
    """Derives the `transformer_layer_config` that a draft of this algorithm inherits from the verifier."""
    decoder = speculator.decoder
    kind = type(speculator.config) if speculator.config else _class_of(speculator.raw)
    own: dict[str, Any] = {key: decoder[key] for key in ("sliding_window",) if decoder.get(key) is not None}
    try:
        config = kind(num_layers=decoder.get("num_hidden_layers", 1), decoder=own)
        return draft_decoder_config(speculator.facts, config)
    except (ValueError, TypeError, SpeculatorsError):
        # The algorithm rejects this number of layers; the inherited values do not depend on it.
        return draft_decoder_config(speculator.facts, kind())


def _class_of(raw: Mapping[str, Any]) -> type[SpeculatorModelConfig]:
    return SpeculatorModelConfig.get_class(str(raw.get("speculators_model_type")))


def flat(decoder: Mapping[str, Any]) -> dict[str, Any]:
    """Collects the value of each rule by its name, and the scaling parameters under "rope scaling"."""
    # VerifierFacts also reads the keys of older layouts.
    view = VerifierFacts(decoder)
    rope = rope_values(view.get("rope_parameters") or {})
    values = {rule.name: (rope if rule.rope else view).get(rule.key, rule.default) for rule in RULES}
    named = {rule.key for rule in RULES if rule.rope}
    return {**values, "rope scaling": {key: value for key, value in sorted(rope.items()) if key not in named}}


def _judge(speculator: ExaminedSpeculator, rule: Rule, own: Any, verifier: Any, attempt: Try) -> Check:
    if own == verifier:
        return CONFIG.ok(rule.name, f"{own}, equal to the verifier's")
    if rule.key == "max_position_embeddings" and isinstance(own, int) and own > verifier:
        evidence = f"{own}, but the verifier has {verifier}: positions beyond that are never served"
        return CONFIG.warning(rule.name, evidence, "nothing, unless this is the wrong verifier")
    path = f"transformer_layer_config.{'rope_parameters.' if rule.rope else ''}{rule.key}"
    changes = _changes(speculator.decoder, rule, verifier)
    return differing(speculator, rule, f"{path} is {own}, the verifier's is {verifier}", path, changes, attempt)


def _changes(decoder: Mapping[str, Any], rule: Rule, value: Any) -> dict[str, Any]:
    if not rule.rope:
        return {rule.key: value}
    rope = {**(decoder.get("rope_parameters") or {}), rule.key: value}
    return {"rope_parameters": {key: part for key, part in rope.items() if part is not None}}


def differing(
    speculator: ExaminedSpeculator, rule: Rule, evidence: str, path: str, changes: Mapping[str, Any], attempt: Try
) -> Check:
    """Judges a value that differs from the verifier's: first by what training used, then by acceptance."""
    origin, compared = speculator.origin, attempt(changes)
    if compared is not None:
        evidence += f"; with the verifier's value the accepted drafts change by {compared.share:+.0%}"
    todo = f"write the verifier's value into config.json ({path})"
    if origin is not None:
        if check := _against_training(speculator, origin, rule, evidence):
            return check
        evidence += ", as the recipe asks (algorithm.decoder)"
    if compared is not None and compared.better:
        return CONFIG.wrong(
            rule.name, f"{evidence}, so the weights were trained with the verifier's: {rule.means}", todo
        )
    keep = "make sure that the server reads the draft's own value"
    if origin is not None:
        return CONFIG.warning(rule.name, f"{evidence}; {rule.means}", keep)
    if compared is not None and compared.worse:
        return CONFIG.warning(rule.name, f"{evidence}, so the weights need the difference; {rule.means}", keep)
    if compared is None and rule.unproven == "warning" and speculator.model is not None:
        return CONFIG.warning(rule.name, f"{evidence}, which does not fit the weights: a decoder of its own", keep)
    if rule.unproven == "warning":
        return CONFIG.warning(rule.name, f"{evidence}: {rule.means}", todo)
    return CONFIG.wrong(rule.name, f"{evidence}, and nothing shows that training used this value: {rule.means}", todo)


def _against_training(speculator: ExaminedSpeculator, origin: TrainingRun, rule: Rule, evidence: str) -> Check | None:
    """Reports a value that contradicts the run's lock; None if its recipe asked for the value."""
    trained, own = (flat(side)[rule.name] for side in (origin.trained["decoder"], speculator.decoder))
    if trained != own:
        evidence += f"; training used {trained}: config.json was changed afterwards"
        return CONFIG.wrong(rule.name, f"{evidence}: {rule.means}", f"write {trained} back, or export again")
    if {rule.key, "rope_parameters"} & set(origin.recipe.algorithm.config.decoder):
        return None
    todo = "give the verifier that it was trained for (--verifier), or train again"
    return CONFIG.wrong(rule.name, f"{evidence}: this is not the verifier of training", todo)


def _scaling(
    speculator: ExaminedSpeculator, own: Mapping[str, Any], verifier: Mapping[str, Any], attempt: Try
) -> Check:
    """Compares factors and lengths of the scaling, and finds values in places where nothing reads them."""
    name, decoder = "rope scaling", speculator.decoder
    rope = decoder.get("rope_parameters") or {}
    if ignored := [key for key in STALE if rope and _contradicts(decoder.get(key), key, rope)]:
        values = ", ".join(f"{key} {decoder[key]}" for key in ignored)
        evidence = f"{values} contradicts rope_parameters and is ignored, since only rope_parameters is read"
        return CONFIG.wrong(name, evidence, "write it into rope_parameters, and nowhere else")
    if own[name] == verifier[name]:
        return CONFIG.ok(name, f"{own[name] or 'none'}, equal to the verifier's")
    rule = Rule(name=name, key="rope_parameters", means=f"positions are scaled differently: {SERVED}")
    evidence = f"rope_parameters has {own[name] or 'no scaling'}, the verifier {verifier[name] or 'none'}"
    unscaled: dict[str, Any] = {key: value for key, value in rope.items() if key not in own[name]}
    changes = {"rope_parameters": {**unscaled, **verifier[name]}}
    return differing(speculator, rule, evidence, "transformer_layer_config.rope_parameters", changes, attempt)


def _contradicts(value: Any, key: str, rope: Mapping[str, Any]) -> bool:
    """Whether a value of an older layout disagrees with `rope_parameters`, which takes precedence."""
    values = value if isinstance(value, Mapping) else {key: value}
    older = {"type": "rope_type"}
    return value is not None and any(rope.get(older.get(name, name)) != part for name, part in values.items())


def _sizes(speculator: ExaminedSpeculator) -> Check:
    """Compares width and vocabulary, which must be equal."""
    decoder, facts = speculator.decoder, speculator.facts
    keys = ("hidden_size", "vocab_size")
    differ = [
        f"{key} {decoder.get(key)}, the verifier's is {facts[key]}" for key in keys if decoder.get(key) != facts[key]
    ]
    if differ:
        todo = "give the verifier that it was trained for (--verifier), or write the verifier's sizes into config.json"
        return CONFIG.wrong("sizes", f"{'; '.join(differ)}: this draft belongs to another verifier", todo)
    return CONFIG.ok("sizes", f"{', '.join(f'{key} {facts[key]}' for key in keys)}, equal to the verifier's")
