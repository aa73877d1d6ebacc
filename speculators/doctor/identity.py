"""Is the verifier the one of training: layers, logits, weights, tokenizer, chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from speculators.data.template import ChatTemplate
from speculators.doctor.check import Check, Family, listed
from speculators.doctor.subject import Patient
from speculators.errors import SpeculatorsError
from speculators.files.disk import file_sha256
from speculators.verifier.engine import Engine
from speculators.verifier.tokens import load_tokenizer
from speculators.verifier.weights import load_head

CONFIG = Family("config")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
# Hashing reads every byte: a minute for so many on a slow disk.
MOST_BYTES = 8e9


def check_layers(patient: Patient) -> Check:
    """Checks the ids of the states that are read: there, in order, and those of training."""
    name, ids, last = "layer ids", patient.layer_ids, int(patient.facts["num_hidden_layers"])
    if not ids:
        return CONFIG.skipped(name, "the draft reads no states of the verifier")
    if outside := [layer for layer in ids if not 0 <= layer <= last]:
        words = f"{list(ids)}: the verifier has ids 0 to {last}, and not {outside}"
        return CONFIG.wrong(name, words, "id l is the stream entering layer l, id N the last layer's output")
    if sorted(set(ids)) != list(ids):
        words = f"{list(ids)} are not sorted and distinct: a server hands states over in the order of layers"
        return CONFIG.wrong(name, words, "sort them, and the columns of the first projection with them")
    if patient.origin is not None:
        trained = tuple(patient.origin.trained["target_layer_ids"])
        if trained != ids:
            words = f"{list(ids)}, and training read {list(trained)}: config.json was changed after it"
            return CONFIG.wrong(name, words, f"write {list(trained)} back, or export again")
    told = patient.decoder.get("num_aux_hidden_states")
    if told is not None and told != len(ids):
        words = f"num_aux_hidden_states is {told}, and {len(ids)} layers are read: a server projects as many as it says"
        return CONFIG.wrong(name, words, f"write {len(ids)}")
    trained_too = ", as in training" if patient.origin is not None else ""
    return CONFIG.ok(name, f"{list(ids)} of 0 to {last}{trained_too}")


def check_head(engine: Engine) -> Check:
    """Checks that final norm and head, as they are read here, give the verifier's own logits."""
    name = "verifier's logits"
    try:
        head = load_head(engine.folder, engine.facts, dtype=engine.dtype).to(engine.device)
        engine.check_head(head)
    except SpeculatorsError as error:
        return CONFIG.wrong(
            name, str(error), "every target and every acceptance is made from them: use another verifier"
        )
    norm = "x * (1 + w)" if head.unit_offset else "x * w"
    rules = [f"final norm {norm}", f"eps {head.eps:g}"]
    if head.scale != 1.0:
        rules.append(f"logits times {head.scale:g}")
    if head.softcap is not None:
        rules.append(f"soft cap {head.softcap:g}")
    return CONFIG.ok(name, f"{', '.join(rules)}: recomputed logits are the model's own")


def check_identity(patient: Patient) -> Iterator[Check]:
    """Compares the verifier's files with those of training."""
    yield _architecture(patient)
    yield _weights(patient)
    yield _files(patient)
    yield _template(patient)


def _architecture(patient: Patient) -> Check:
    held = patient.config.speculators_config if patient.config else None
    told = list(held.verifier.architectures) if held else []
    here = list(patient.facts.get("architectures") or [])
    if not told:
        return CONFIG.skipped("architecture", "config.json does not say which architecture it drafts for")
    if told == here:
        return CONFIG.ok("architecture", f"{', '.join(here)}, as config.json says")
    words = f"the verifier is {', '.join(here) or 'unnamed'}, config.json says {', '.join(told)}"
    return CONFIG.wrong("architecture", words, "give the verifier that it was trained for (--verifier)")


def _weights(patient: Patient) -> Check:
    name = "verifier's weights"
    files = sorted(patient.verifier.glob("*.safetensors"))
    if sum(file.stat().st_size for file in files) > MOST_BYTES:
        return CONFIG.skipped(name, f"more than {MOST_BYTES / 1e9:g} GB: not hashed")
    return _compared(patient, name, files, "other weights: their hidden states are not those of training")


def _files(patient: Patient) -> Check:
    name = "tokenizer"
    try:
        tokenizer = load_tokenizer(patient.verifier, trust_remote_code=patient.trust_remote_code)
    except SpeculatorsError as error:
        return CONFIG.wrong(name, str(error), "give the verifier that it was trained for (--verifier)")
    size = int(patient.facts["vocab_size"])
    if len(tokenizer) > size:
        words = f"it has {len(tokenizer)} tokens, the verifier's embeddings {size}: the tokenizer of another model"
        return CONFIG.wrong(name, words, "put the verifier's own tokenizer into its folder")
    if (patient.folder / "tokenizer.json").is_file():
        try:
            own = load_tokenizer(patient.folder)
        except SpeculatorsError as error:
            return CONFIG.wrong(name, str(error), "remove it: the verifier's tokenizer is the one that counts")
        if own.get_vocab() != tokenizer.get_vocab():
            words = "the checkpoint brings a tokenizer with other tokens than the verifier's"
            return CONFIG.wrong(name, words, "give the verifier that it was trained for (--verifier)")
    files = [patient.verifier / one for one in TOKENIZER if (patient.verifier / one).is_file()]
    return _compared(patient, name, files, "another tokenizer: ids mean other text than in training")


def _compared(patient: Patient, name: str, files: list[Path], means: str) -> Check:
    """Compares files of the verifier by hash with those that the run's lock names."""
    if patient.origin is None:
        return CONFIG.skipped(name, f"nothing records what it was trained with: {patient.no_origin}")
    locked = patient.origin.lock.verifier.files
    kinds = {".safetensors"} if name != "tokenizer" else set()
    wanted = {one for one in locked if Path(one).suffix in kinds or (not kinds and one in TOKENIZER)}
    found = {file.name: file_sha256(file) for file in files}
    differ = sorted(one for one in {*wanted, *found} if locked.get(one) != found.get(one))
    if not differ:
        return CONFIG.ok(name, f"{len(found)} files, as in training (sha256)")
    one = differ[0]
    words = f"{listed(differ)}: {means} (sha256 {_short(found.get(one))}, in training {_short(locked.get(one))})"
    return CONFIG.wrong(name, words, "give the verifier that it was trained for (--verifier), or train again")


def _template(patient: Patient) -> Check:
    name = "chat template"
    try:
        template = ChatTemplate.of(load_tokenizer(patient.verifier, trust_remote_code=patient.trust_remote_code))
    except SpeculatorsError as error:
        return CONFIG.warning(name, str(error), "put the template that it was trained with into the verifier's folder")
    if patient.origin is None:
        return CONFIG.skipped(name, f"nothing records what it was trained with: {patient.no_origin}")
    locked, found = patient.origin.lock.verifier.chat_template, hashlib.sha256(template.source.encode()).hexdigest()
    if locked == found:
        return CONFIG.ok(name, f"{len(template.source):,} characters, as in training (sha256)")
    words = f"not the one of training (sha256 {_short(found)}, in training {_short(locked)})"
    means = "turns are framed by other tokens than the draft has learnt"
    return CONFIG.wrong(name, f"{words}: {means}", "put the template of training back, or train again with this one")


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:8]
