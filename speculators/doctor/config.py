"""Does config.json agree with the verifier: rotary embedding, lengths, head size, eps, sizes.

These values are inherited from the verifier. What differs is wrong if training had another value, or if acceptance
rises with the verifier's; it is a warning where the recipe, or the weights, want the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs

from speculators.config import SpeculatorModelConfig
from speculators.doctor.check import Check, Family
from speculators.doctor.subject import Origin, Patient
from speculators.doctor.trials import Comparison
from speculators.errors import SpeculatorsError
from speculators.facts import VerifierFacts
from speculators.recipe.decoder import draft_decoder_config

CONFIG = Family("config")
# Gives, for values of `transformer_layer_config`, how they compare with the configured ones; None: the weights do not
# fit them, or nothing could be tried.
Try = Callable[[Mapping[str, Any]], Comparison | None]


@attrs.frozen(kw_only=True)
class Rule:
    """One value that is inherited.

    Attributes:
        name: of the check.
        key: in `transformer_layer_config`, or in its `rope_parameters`.
        rope: it is in `rope_parameters`.
        default: stands for a value that is not written.
        means: what a difference leads to.
        unproven: the result where nothing tells whether the weights want the difference.
    """

    name: str
    key: str
    rope: bool = False
    default: Any = None
    means: str
    unproven: str = "wrong"


SERVED = "a server that takes the verifier's value accepts next to nothing, and nothing errors"
RULES = (
    Rule(name="rope theta", key="rope_theta", rope=True, means=f"every position is turned at another speed: {SERVED}"),
    Rule(
        name="rope type",
        key="rope_type",
        rope=True,
        default="default",
        means=f"positions are scaled otherwise: {SERVED}",
    ),
    Rule(
        name="partial rotary factor",
        key="partial_rotary_factor",
        rope=True,
        default=1.0,
        means=f"another part of each head is turned: {SERVED}",
    ),
    Rule(
        name="max positions",
        key="max_position_embeddings",
        means="a server caps the draft's context there: drafts end, or are accepted no more, beyond it",
    ),
    Rule(name="head size", key="head_dim", means="heads are cut otherwise than the verifier's", unproven="warning"),
    Rule(name="norm eps", key="rms_norm_eps", means="small states are normed otherwise", unproven="warning"),
)
# Beside `rope_parameters` these are read by nobody.
STALE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def check_config(patient: Patient, attempt: Try) -> Iterator[Check]:
    """Yields the checks of config.json against the verifier's."""
    decoder = patient.decoder
    if not decoder:
        yield CONFIG.wrong("decoder", "config.json has no transformer_layer_config", "import or export it again")
        return
    yield _sizes(patient)
    try:
        verifier = expected(patient)
    except SpeculatorsError as error:
        yield CONFIG.skipped("decoder", f"what the verifier has cannot be told: {error}")
        return
    here = flat(decoder)
    for rule in RULES:
        yield _judge(patient, rule, here.get(rule.name), flat(verifier)[rule.name], attempt)
    yield _scaling(patient, here, flat(verifier), attempt)


def expected(patient: Patient) -> dict[str, Any]:
    """Returns the `transformer_layer_config` that the verifier's values give."""
    held = patient.decoder
    kind = type(patient.config) if patient.config else _class_of(patient.raw)
    own: dict[str, Any] = {key: held[key] for key in ("sliding_window",) if held.get(key) is not None}
    try:
        config = kind(num_layers=held.get("num_hidden_layers", 1), decoder=own)
        return draft_decoder_config(patient.facts, config)
    except (ValueError, TypeError, SpeculatorsError):
        # The number of layers is not one that the algorithm takes; the values sought do not depend on it.
        return draft_decoder_config(patient.facts, kind())


def _class_of(raw: Mapping[str, Any]) -> type[SpeculatorModelConfig]:
    return SpeculatorModelConfig.get_class(str(raw.get("speculators_model_type")))


def flat(decoder: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the value of each rule, by its name, and the parameters of the scaling under "rope scaling"."""
    # The view fills in what older layouts write elsewhere.
    view = VerifierFacts(decoder)
    rope = dict(view.get("rope_parameters") or {})
    found = {rule.name: (rope if rule.rope else view).get(rule.key, rule.default) for rule in RULES}
    named = {rule.key for rule in RULES if rule.rope}
    return {**found, "rope scaling": {key: value for key, value in sorted(rope.items()) if key not in named}}


def _judge(patient: Patient, rule: Rule, here: Any, verifier: Any, attempt: Try) -> Check:
    """Returns the check of one value."""
    if here == verifier:
        return CONFIG.ok(rule.name, f"{here}, as the verifier")
    if rule.key == "max_position_embeddings" and isinstance(here, int) and here > verifier:
        words = f"{here}, the verifier has {verifier}: what is beyond is never served"
        return CONFIG.warning(rule.name, words, "nothing, unless the verifier is another one")
    path = f"transformer_layer_config.{'rope_parameters.' if rule.rope else ''}{rule.key}"
    changes = _changes(patient.decoder, rule, verifier)
    return differing(patient, rule, f"{path} is {here}, the verifier's is {verifier}", path, changes, attempt)


def _changes(decoder: Mapping[str, Any], rule: Rule, value: Any) -> dict[str, Any]:
    if not rule.rope:
        return {rule.key: value}
    rope = {**(decoder.get("rope_parameters") or {}), rule.key: value}
    return {"rope_parameters": {key: held for key, held in rope.items() if held is not None}}


def differing(patient: Patient, rule: Rule, words: str, path: str, changes: Mapping[str, Any], attempt: Try) -> Check:
    """Returns the check of a value that is not the verifier's: what training had, then what acceptance says."""
    origin, compared = patient.origin, attempt(changes)
    if compared is not None:
        words += f"; with the verifier's the accepted drafts change by {compared.share:+.0%}"
    todo = f"write the verifier's value into config.json ({path})"
    if origin is not None:
        if found := _against_training(patient, origin, rule, words):
            return found
        words += ", as the recipe says (algorithm.decoder)"
    if compared is not None and compared.better:
        return CONFIG.wrong(rule.name, f"{words}, so the weights were trained with that: {rule.means}", todo)
    keep = "see that the server reads the draft's own value"
    if origin is not None:
        return CONFIG.warning(rule.name, f"{words}; {rule.means}", keep)
    if compared is not None and compared.worse:
        return CONFIG.warning(rule.name, f"{words}, so the weights want the difference; {rule.means}", keep)
    if compared is None and rule.unproven == "warning" and patient.model is not None:
        return CONFIG.warning(rule.name, f"{words}, which the weights do not fit: a decoder of its own", keep)
    if rule.unproven == "warning":
        return CONFIG.warning(rule.name, f"{words}: {rule.means}", todo)
    return CONFIG.wrong(rule.name, f"{words}, and nothing shows that training had it so: {rule.means}", todo)


def _against_training(patient: Patient, origin: Origin, rule: Rule, words: str) -> Check | None:
    """Returns what is wrong with a value by the run's own account; None if its recipe wanted it so."""
    trained, here = (flat(side)[rule.name] for side in (origin.trained["decoder"], patient.decoder))
    if trained != here:
        words += f"; training had {trained}: config.json was changed after it"
        return CONFIG.wrong(rule.name, f"{words}: {rule.means}", f"write {trained} back, or export again")
    if {rule.key, "rope_parameters"} & set(origin.recipe.algorithm.config.decoder):
        return None
    todo = "give the verifier that it was trained for (--verifier), or train again"
    return CONFIG.wrong(rule.name, f"{words}: the verifier is another one than in training", todo)


def _scaling(patient: Patient, here: Mapping[str, Any], verifier: Mapping[str, Any], attempt: Try) -> Check:
    """Compares factors and lengths of the scaling; looks for values where nobody reads them."""
    name, decoder = "rope scaling", patient.decoder
    rope = decoder.get("rope_parameters") or {}
    if other := [key for key in STALE if rope and _contradicts(decoder.get(key), key, rope)]:
        told = ", ".join(f"{key} {decoder[key]}" for key in other)
        words = f"{told} beside rope_parameters: read by nobody, as rope_parameters says otherwise"
        return CONFIG.wrong(name, words, "write it into rope_parameters, and nowhere else")
    if here[name] == verifier[name]:
        return CONFIG.ok(name, f"{here[name] or 'none'}, as the verifier")
    rule = Rule(name=name, key="rope_parameters", means=f"positions are scaled otherwise: {SERVED}")
    words = f"rope_parameters has {here[name] or 'no scaling'}, the verifier {verifier[name] or 'none'}"
    own: dict[str, Any] = {key: value for key, value in rope.items() if key not in here[name]}
    changes = {"rope_parameters": {**own, **verifier[name]}}
    return differing(patient, rule, words, "transformer_layer_config.rope_parameters", changes, attempt)


def _contradicts(value: Any, key: str, rope: Mapping[str, Any]) -> bool:
    """Whether a value of an older layout says something else than `rope_parameters`, which is what is read."""
    said = value if isinstance(value, Mapping) else {key: value}
    older = {"type": "rope_type"}
    return value is not None and any(rope.get(older.get(name, name)) != held for name, held in said.items())


def _sizes(patient: Patient) -> Check:
    """Compares what cannot differ: width and vocabulary."""
    decoder, facts = patient.decoder, patient.facts
    keys = ("hidden_size", "vocab_size")
    differ = [
        f"{key} {decoder.get(key)}, the verifier's is {facts[key]}" for key in keys if decoder.get(key) != facts[key]
    ]
    if differ:
        todo = "give the verifier that it was trained for (--verifier), or write the verifier's sizes into config.json"
        return CONFIG.wrong("sizes", f"{'; '.join(differ)}: a draft for another verifier", todo)
    return CONFIG.ok("sizes", f"{', '.join(f'{key} {facts[key]}' for key in keys)}, as the verifier")
