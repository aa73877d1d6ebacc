"""Checks that this is the verifier of training: layers, logits, weights, tokenizer, chat template."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from speculators.data.template import ChatTemplate
from speculators.doctor.check import Check, Family, listed
from speculators.doctor.effort import LEFT_OUT
from speculators.doctor.speculator import ExaminedSpeculator
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
# Hashing reads every byte; this much takes a minute on a slow disk.
MOST_BYTES = 8e9


def check_layers(speculator: ExaminedSpeculator) -> Check:
    """Checks that the layer ids exist, are sorted, and are those of training."""
    name, ids, last = "layer ids", speculator.layer_ids, int(speculator.facts["num_hidden_layers"])
    if not ids:
        return CONFIG.skipped(name, "the draft does not read the verifier's states")
    if outside := [layer for layer in ids if not 0 <= layer <= last]:
        evidence = f"{list(ids)}: the verifier has ids 0 to {last}, not {outside}"
        return CONFIG.wrong(name, evidence, "id l is the stream entering layer l, id N the last layer's output")
    if sorted(set(ids)) != list(ids):
        evidence = f"{list(ids)} are not sorted and distinct, but a server passes states in the order of layers"
        return CONFIG.wrong(name, evidence, "sort them, and the columns of the first projection with them")
    if speculator.origin is not None:
        trained = tuple(speculator.origin.trained["target_layer_ids"])
        if trained != ids:
            evidence = f"{list(ids)}, but training read {list(trained)}: config.json was changed afterwards"
            return CONFIG.wrong(name, evidence, f"write {list(trained)} back, or export again")
    count = speculator.decoder.get("num_aux_hidden_states")
    if count is not None and count != len(ids):
        evidence = f"num_aux_hidden_states is {count}, but {len(ids)} layers are read: a server projects {count}"
        return CONFIG.wrong(name, evidence, f"write {len(ids)}")
    trained_too = ", as in training" if speculator.origin is not None else ""
    return CONFIG.ok(name, f"{list(ids)} of 0 to {last}{trained_too}")


def check_head(engine: Engine) -> Check:
    """Checks that the final norm and head, as loaded, reproduce the verifier's logits."""
    name = "verifier's logits"
    try:
        head = load_head(engine.folder, engine.facts, dtype=engine.dtype).to(engine.device)
        engine.check_head(head)
    except SpeculatorsError as error:
        return CONFIG.wrong(
            name, str(error), "all targets and all acceptance figures are computed from them: use another verifier"
        )
    norm = "x * (1 + w)" if head.unit_offset else "x * w"
    rules = [f"final norm {norm}", f"eps {head.eps:g}"]
    if head.scale != 1.0:
        rules.append(f"logits times {head.scale:g}")
    if head.softcap is not None:
        rules.append(f"soft cap {head.softcap:g}")
    return CONFIG.ok(name, f"{', '.join(rules)}: recomputed logits equal the model's")


def check_identity(speculator: ExaminedSpeculator, *, hashes: bool = True) -> Iterator[Check]:
    """Compares the verifier's architecture and files with those of training; without `hashes`, not its weights."""
    yield _architecture(speculator)
    yield _weights(speculator) if hashes else CONFIG.skipped("verifier's weights", LEFT_OUT)
    yield _files(speculator)
    yield _template(speculator)


def _architecture(speculator: ExaminedSpeculator) -> Check:
    table = speculator.config.speculators_config if speculator.config else None
    named = list(table.verifier.architectures) if table else []
    actual = list(speculator.facts.get("architectures") or [])
    if not named:
        return CONFIG.skipped("architecture", "config.json does not name the architecture that it drafts for")
    if named == actual:
        return CONFIG.ok("architecture", f"{', '.join(actual)}, as config.json says")
    evidence = f"the verifier is {', '.join(actual) or 'unnamed'}, config.json says {', '.join(named)}"
    return CONFIG.wrong("architecture", evidence, "give the verifier that it was trained for (--verifier)")


def _weights(speculator: ExaminedSpeculator) -> Check:
    name = "verifier's weights"
    files = sorted(speculator.verifier.glob("*.safetensors"))
    if sum(file.stat().st_size for file in files) > MOST_BYTES:
        return CONFIG.skipped(name, f"not hashed: the files exceed {MOST_BYTES / 1e9:g} GB")
    return _compared(speculator, name, files, "different weights, so the hidden states differ from those in training")


def _files(speculator: ExaminedSpeculator) -> Check:
    name = "tokenizer"
    try:
        tokenizer = load_tokenizer(speculator.verifier, speculator.section)
    except SpeculatorsError as error:
        return CONFIG.wrong(name, str(error), "give the verifier that it was trained for (--verifier)")
    size = int(speculator.facts["vocab_size"])
    if len(tokenizer) > size:
        evidence = f"{len(tokenizer)} tokens, but the verifier has {size} embeddings: the tokenizer of another model"
        return CONFIG.wrong(name, evidence, "put the verifier's own tokenizer into its folder")
    if (speculator.folder / "tokenizer.json").is_file():
        try:
            own = load_tokenizer(speculator.folder)
        except SpeculatorsError as error:
            return CONFIG.wrong(name, str(error), "remove tokenizer.json: servers use the verifier's")
        if own.get_vocab() != tokenizer.get_vocab():
            evidence = "the checkpoint's tokenizer has different tokens from the verifier's"
            return CONFIG.wrong(name, evidence, "give the verifier that it was trained for (--verifier)")
    files = [speculator.verifier / one for one in TOKENIZER if (speculator.verifier / one).is_file()]
    return _compared(speculator, name, files, "a different tokenizer, so ids stand for different text than in training")


def _compared(speculator: ExaminedSpeculator, name: str, files: list[Path], means: str) -> Check:
    """Compares the hashes of the verifier's files with those in the run's lock."""
    if speculator.origin is None:
        return CONFIG.skipped(name, speculator.origin_problem)
    locked = speculator.origin.lock.verifier.files
    kinds = {".safetensors"} if name != "tokenizer" else set()
    expected = {one for one in locked if Path(one).suffix in kinds or (not kinds and one in TOKENIZER)}
    actual = {file.name: file_sha256(file) for file in files}
    differ = sorted(one for one in {*expected, *actual} if locked.get(one) != actual.get(one))
    if not differ:
        return CONFIG.ok(name, f"{len(actual)} files, as in training (sha256)")
    one = differ[0]
    evidence = f"{listed(differ)}: {means} (sha256 {_short(actual.get(one))}, in training {_short(locked.get(one))})"
    return CONFIG.wrong(name, evidence, "give the verifier that it was trained for (--verifier), or train again")


def _template(speculator: ExaminedSpeculator) -> Check:
    name = "chat template"
    try:
        template = ChatTemplate.of(load_tokenizer(speculator.verifier, speculator.section))
    except SpeculatorsError as error:
        return CONFIG.warning(name, str(error), "put the template of training into the verifier's folder")
    if speculator.origin is None:
        return CONFIG.skipped(name, speculator.origin_problem)
    locked = speculator.origin.lock.verifier.chat_template
    actual = hashlib.sha256(template.source.encode()).hexdigest()
    if locked == actual:
        return CONFIG.ok(name, f"{len(template.source):,} characters, as in training (sha256)")
    evidence = f"not the one of training (sha256 {_short(actual)}, in training {_short(locked)})"
    means = "turns are framed by different tokens from those that the draft learnt"
    return CONFIG.wrong(name, f"{evidence}: {means}", "put the template of training back, or train again with this one")


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:8]
