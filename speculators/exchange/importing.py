"""Converts a published checkpoint into one of ours, accounting for every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.config import CONFIGS, ProposalConfig, SpeculatorModelConfig
from speculators.errors import ArtifactError, SpeculatorsError
from speculators.exchange.fill import (
    EMBEDDINGS,
    HEAD,
    NORM,
    T2D,
    drafted_mask,
    verifiers_tensor,
    vocabulary_problems,
)
from speculators.exchange.published import open_published
from speculators.facts import VerifierFacts
from speculators.files.folders import whole_folder
from speculators.formats.find import formats_of, matching_formats
from speculators.formats.published import PublishedCheckpoint, PublishedFormat, Tensors, build_config
from speculators.model import SpeculatorModel
from speculators.recipe.decoder import inherited_rope


@attrs.frozen(kw_only=True)
class Verifier:
    """The verifier of a checkpoint.

    Attributes:
        folder: its Hugging Face folder.
        name: written into the new config.json: its folder or its hub id.
        facts: its config.json.
    """

    folder: Path
    name: str
    facts: VerifierFacts


@attrs.frozen(kw_only=True)
class Imported:
    """A finished import.

    Attributes:
        folder: of our checkpoint.
        algorithm: of the speculator.
        format: name of the format that was recognised.
        tensors: number of tensors in the source.
        from_verifier: our names of the tensors taken from the verifier.
        notes: differences from the verifier, and conversions.
    """

    folder: Path
    algorithm: str
    format: str
    tensors: int
    from_verifier: tuple[str, ...]
    notes: tuple[str, ...]


def import_checkpoint(path: Path, verifier: Verifier, out: Path) -> Imported:
    """Writes our version of a published checkpoint.

    Args:
        path: its folder, or its safetensors file.
        verifier: the model it drafts for.
        out: folder to create; must not exist.

    Raises:
        ArtifactError: the format is unknown, tensors are missing, unknown or of another shape (the error names all),
            or the verifier is not the one it was trained for.
    """
    if out.exists():
        raise ArtifactError(f"{out} exists already", hint="name another folder with --out")
    source = open_published(path)
    algorithm, foreign = _recognised(source)
    _check_verifier(source, verifier)
    config = _config(algorithm, foreign, source, verifier)
    # Only shapes are needed.
    with torch.device("meta"):
        model = SpeculatorModel.get_class(algorithm)(config)
    tensors, taken, problems = _tensors(model, foreign, source, verifier)
    if problems:
        head = f"{source.folder} reads as {foreign.name}, but"
        raise ArtifactError(f"{head} {problems[0]}" if len(problems) == 1 else "\n".join([f"{head}:", *problems]))
    tensors, widened = _exact(tensors)
    with whole_folder(out) as partial:
        model.save_pretrained(partial, tensors)
        # A checkpoint that cannot be loaded must not remain on disk.
        SpeculatorModel.from_pretrained(partial, verifier=verifier.folder)
    return Imported(
        folder=out,
        algorithm=algorithm,
        format=foreign.name,
        tensors=len(source.shapes) if foreign.tensors is None else len(tensors) - len(taken),
        from_verifier=taken,
        notes=(*widened, *_differences(config, verifier.facts), *_other_embeddings(tensors, taken, verifier)),
    )


def _recognised(source: PublishedCheckpoint) -> tuple[str, PublishedFormat]:
    matches = matching_formats(source)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ArtifactError(f"{source.folder} could be {' or '.join(each.name for _, each in matches)}")
    known = [each.name for name in CONFIGS.names() for each in formats_of(name)]
    some = ", ".join(sorted(source.shapes)[:6]) or "none"
    raise ArtifactError(
        f"{source.folder} has an unknown format; its first tensors are: {some}",
        hint="known formats: " + "; ".join(known),
    )


def _config(algorithm: str, foreign: PublishedFormat, source: PublishedCheckpoint, verifier: Verifier) -> Any:
    fields = foreign.config(source, verifier.facts)
    tokens = fields.pop("speculative_tokens", ProposalConfig().speculative_tokens)
    fields["speculators_config"] = {
        "algorithm": algorithm,
        "proposal_methods": [{"speculative_tokens": tokens}],
        "verifier": {"name_or_path": verifier.name, "architectures": list(verifier.facts.get("architectures", []))},
    }
    config = build_config(SpeculatorModelConfig.get_class(algorithm), fields, source)
    ids = [value for field, value in attrs.asdict(config).items() if field.endswith("layer_ids") and value]
    top = verifier.facts.num_hidden_layers
    for each in ids:
        if sorted({*each}) != list(each) or each[0] < 0 or each[-1] > top:
            raise source.error(f"its layer ids are {list(each)}: they must be distinct, ascending ids in 0..{top}")
    return config


def _tensors(
    model: SpeculatorModel, foreign: PublishedFormat, source: PublishedCheckpoint, verifier: Verifier
) -> tuple[Tensors, tuple[str, ...], list[str]]:
    """Collects our checkpoint's tensors, the names of those taken from the verifier, and all problems."""
    tensors, problems = _named(foreign, source) if foreign.tensors is None else (foreign.tensors(source), [])
    tensors = foreign.amend(model.config, tensors)
    required, every = model.saved_names(model.state_dict()), model.state_dict()
    vocab_size = model.config.transformer_layer_config["vocab_size"]
    if T2D in required and T2D not in tensors and "d2t" in tensors:
        tensors[T2D] = drafted_mask(tensors["d2t"], vocab_size)
    absent = [name for name in required if name not in tensors]
    # The verifier's tensors have its own width.
    shared = () if _narrower(model.config) else foreign.from_verifier
    taken = tuple(name for name in absent if shared and name.startswith(shared))
    problems += [f"{name} is missing" for name in absent if name not in taken]
    problems += [
        f"{name} is unknown: {model.config.speculators_model_type} has no such tensor"
        for name in tensors
        if name not in every
    ]
    eps, theirs = model.config.transformer_layer_config["rms_norm_eps"], verifier.facts.get("rms_norm_eps")
    if NORM in taken and eps != theirs:
        problems.append(
            f"its rms_norm_eps is {eps}, but the verifier's final norm, which it reads through, has {theirs}"
        )
    for name in taken:
        try:
            tensors[name] = verifiers_tensor(name, verifier.folder, verifier.facts)
        except SpeculatorsError as error:
            problems.append(str(error))
    for name, tensor in tensors.items():
        if name in every and tensor.shape != every[name].shape:
            problems.append(f"{name} is {list(tensor.shape)}, but its config implies {list(every[name].shape)}")
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name} has values that are not finite")
    # Checked before the selection below drops them: tensors that a server reads from the verifier.
    problems += _changed(tensors, required, every, verifier)
    kept = {name: tensor for name, tensor in tensors.items() if name in required}
    problems += vocabulary_problems(kept, vocab_size)
    return {name: _cast_map(tensor, required[name]) for name, tensor in kept.items()}, taken, problems


def _narrower(config: Any) -> bool:
    """Whether a draft is narrower than its verifier."""
    return attrs.asdict(config, recurse=False).get("target_hidden_size") is not None


def _named(foreign: PublishedFormat, source: PublishedCheckpoint) -> tuple[Tensors, list[str]]:
    """Reads the tensors under our names, and lists unknown and duplicate ones."""
    problems: list[str] = []
    chosen: dict[str, str] = {}
    for name in sorted(source.shapes):
        ours = foreign.names.ours(name)
        if ours is None:
            problems.append(f"{name} is unknown: the format has no such tensor")
        elif ours in chosen:
            problems.append(f"{name} and {chosen[ours]} are the same tensor, {ours}")
        elif ours:
            chosen[ours] = name
    return {ours: source.read(name) for ours, name in chosen.items()}, problems


def _changed(tensors: Tensors, required: Tensors, every: Tensors, verifier: Verifier) -> list[str]:
    """Finds changed copies of the verifier's tensors: a server would use the verifier's own instead."""
    problems = []
    for name in (EMBEDDINGS, HEAD):
        if name in tensors and name in every and name not in required and tensors[name].shape == every[name].shape:
            theirs = verifiers_tensor(name, verifier.folder, verifier.facts)
            if not torch.equal(tensors[name], theirs.to(tensors[name].dtype)):
                problems.append(
                    f"{name} differs from the verifier's, which servers use: it was trained, or the verifier is another"
                )
    return problems


def _other_embeddings(tensors: Tensors, taken: tuple[str, ...], verifier: Verifier) -> list[str]:
    """Notes embeddings that differ from the verifier's: few drafts train theirs, so it may be another verifier."""
    if EMBEDDINGS not in tensors or EMBEDDINGS in taken:
        return []
    ours, theirs = tensors[EMBEDDINGS], verifiers_tensor(EMBEDDINGS, verifier.folder, verifier.facts)
    if ours.shape != theirs.shape:
        return []
    same = torch.equal(ours.to(torch.bfloat16), theirs.to(torch.bfloat16))
    return [] if same else [f"{EMBEDDINGS} differs from the verifier's: it was trained, or this is another verifier"]


def _cast_map(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Casts vocabulary maps to our integer types; leaves other tensors unchanged."""
    return tensor if like.is_floating_point() else tensor.to(like.dtype)


def _exact(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Widens float16, which CPUs neither train nor multiply in, to float32; every value is preserved."""
    if not any(tensor.dtype == torch.float16 for tensor in tensors.values()):
        return tensors, ()
    wide = {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}
    return wide, ("float16 weights are stored as float32, with the same values",)


def _check_verifier(source: PublishedCheckpoint, verifier: Verifier) -> None:
    """Raises if the sizes rule out that the checkpoint was trained for this verifier."""
    tables = (source.config, *(source.config.get(key) for key in ("text_config", "transformer_layer_config")))
    sizes = {key: value for table in tables if isinstance(table, Mapping) for key, value in table.items()}
    # A draft may be narrower than the states that it reads.
    width = "hidden_size" if sizes.get("target_hidden_size") is None else "target_hidden_size"
    own = {"vocab_size": verifier.facts["vocab_size"], width: verifier.facts["hidden_size"]}
    problems = [
        f"its {key} is {sizes[key]}, but the verifier {verifier.name} has {value}: give its own verifier"
        for key, value in own.items()
        if isinstance(sizes.get(key), int) and sizes[key] != value
    ]
    if problems:
        raise source.error(*problems)


def _differences(config: Any, facts: VerifierFacts) -> list[str]:
    """Notes where the draft's decoder differs from the verifier's, which can ruin acceptance in silence."""
    decoder = config.transformer_layer_config
    keys = ("rope_parameters", "max_position_embeddings", "rms_norm_eps")
    theirs = {**facts, "rope_parameters": inherited_rope(facts, decoder["layer_types"][0])}
    pairs = [(key, decoder[key], theirs.get(key)) for key in keys]
    return [
        f"{key} is {ours}, but {inherited} in the verifier: the checkpoint's value is kept"
        for key, ours, inherited in pairs
        if inherited is not None and ours != inherited
    ]
