"""`import_checkpoint`: a published checkpoint becomes one of ours, every tensor accounted for."""

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
from speculators.exchange.source import open_source
from speculators.facts import VerifierFacts
from speculators.files.folders import whole_folder
from speculators.formats.find import formats_of, matching_formats
from speculators.formats.published import PublishedCheckpoint, PublishedFormat, Tensors, build_config
from speculators.model import SpeculatorModel


@attrs.frozen(kw_only=True)
class Verifier:
    """The verifier of a checkpoint.

    Attributes:
        folder: of it.
        name: by which the new config.json names it: its folder, or its hub id.
        facts: its config.json.
    """

    folder: Path
    name: str
    facts: VerifierFacts


@attrs.frozen(kw_only=True)
class Imported:
    """What an import came to.

    Attributes:
        folder: of our checkpoint.
        format: that the source is of.
        tensors: how many it has.
        from_verifier: names of ours that were taken from the verifier.
        notes: what differs from the verifier, or was changed on the way.
    """

    folder: Path
    algorithm: str
    format: str
    tensors: int
    from_verifier: tuple[str, ...]
    notes: tuple[str, ...]


def import_checkpoint(path: Path, verifier: Verifier, out: Path) -> Imported:
    """Writes our checkpoint of a published one.

    Args:
        path: its folder, or its safetensors file.
        out: made; must not exist.

    Raises:
        ArtifactError: the format is not known, a tensor is missing, unknown or of another shape (all are named), or the
            verifier is not the one it was trained for.
    """
    if out.exists():
        raise ArtifactError(f"{out} is there already", hint="name another folder with --out")
    source = open_source(path)
    algorithm, foreign = _recognised(source)
    _check_verifier(source, verifier)
    config = _config(algorithm, foreign, source, verifier)
    # Shapes are all that is asked of it.
    with torch.device("meta"):
        model = SpeculatorModel.get_class(algorithm)(config)
    tensors, taken, problems = _tensors(model, foreign, source, verifier)
    if problems:
        head = f"{source.folder} reads as {foreign.name}, but"
        raise ArtifactError(f"{head} {problems[0]}" if len(problems) == 1 else "\n".join([f"{head}:", *problems]))
    tensors, widened = _exact(tensors)
    with whole_folder(out) as partial:
        model.save_pretrained(partial, tensors)
        # What cannot be loaded is not left behind.
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
    found = matching_formats(source)
    if len(found) == 1:
        return found[0]
    if found:
        raise ArtifactError(f"{source.folder} could be {' or '.join(each.name for _, each in found)}")
    known = [each.name for name in CONFIGS.names() for each in formats_of(name)]
    some = ", ".join(sorted(source.shapes)[:6]) or "none"
    raise ArtifactError(
        f"{source.folder} is of no format that is known here; its tensors begin: {some}",
        hint="known: " + "; ".join(known),
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
            raise source.error(f"the states it reads are {list(each)}: must be distinct, ascending ids in 0..{top}")
    return config


def _tensors(
    model: SpeculatorModel, foreign: PublishedFormat, source: PublishedCheckpoint, verifier: Verifier
) -> tuple[Tensors, tuple[str, ...], list[str]]:
    """Returns the tensors of our checkpoint, which of them are the verifier's, and all that is wrong with them."""
    found, problems = _named(foreign, source) if foreign.tensors is None else (foreign.tensors(source), [])
    found = foreign.amend(model.config, found)
    wanted, every = model.saved_names(model.state_dict()), model.state_dict()
    vocab_size = model.config.transformer_layer_config["vocab_size"]
    if T2D in wanted and T2D not in found and "d2t" in found:
        found[T2D] = drafted_mask(found["d2t"], vocab_size)
    absent = [name for name in wanted if name not in found]
    taken = tuple(name for name in absent if foreign.from_verifier and name.startswith(foreign.from_verifier))
    problems += [f"{name} is missing" for name in absent if name not in taken]
    problems += [
        f"{name} is unknown: {model.config.speculators_model_type} has none" for name in found if name not in every
    ]
    eps, theirs = model.config.transformer_layer_config["rms_norm_eps"], verifier.facts.get("rms_norm_eps")
    if NORM in taken and eps != theirs:
        problems.append(f"its rms_norm_eps is {eps}: the verifier's final norm, which it reads through, has {theirs}")
    for name in taken:
        try:
            found[name] = verifiers_tensor(name, verifier.folder, verifier.facts)
        except SpeculatorsError as error:
            problems.append(str(error))
    for name, tensor in found.items():
        if name in every and tensor.shape != every[name].shape:
            problems.append(f"{name} is {list(tensor.shape)}, its config says {list(every[name].shape)}")
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name} has values that are not finite")
    problems += _changed(found, wanted, every, verifier)
    kept = {name: tensor for name, tensor in found.items() if name in wanted}
    problems += vocabulary_problems(kept, vocab_size)
    return {name: _as_held(tensor, wanted[name]) for name, tensor in kept.items()}, taken, problems


def _named(foreign: PublishedFormat, source: PublishedCheckpoint) -> tuple[Tensors, list[str]]:
    """Reads the tensors by our names; returns those and what is wrong with theirs."""
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


def _changed(found: Tensors, wanted: Tensors, every: Tensors, verifier: Verifier) -> list[str]:
    """Returns which copies of the verifier's tensors, which a server takes from there, are other ones here."""
    problems = []
    for name in (EMBEDDINGS, HEAD):
        if name in found and name in every and name not in wanted and found[name].shape == every[name].shape:
            theirs = verifiers_tensor(name, verifier.folder, verifier.facts)
            if not torch.equal(found[name], theirs.to(found[name].dtype)):
                problems.append(
                    f"{name} is not the verifier's, whose own would be served: another verifier, or trained"
                )
    return problems


def _other_embeddings(tensors: Tensors, taken: tuple[str, ...], verifier: Verifier) -> list[str]:
    """Says where a checkpoint has embeddings of its own: few are trained, and many a verifier is mistaken."""
    if EMBEDDINGS not in tensors or EMBEDDINGS in taken:
        return []
    held, theirs = tensors[EMBEDDINGS], verifiers_tensor(EMBEDDINGS, verifier.folder, verifier.facts)
    same = torch.equal(held.to(torch.bfloat16), theirs.to(torch.bfloat16))
    return [] if same else [f"{EMBEDDINGS} is not the verifier's: it was trained, or this is another verifier"]


def _as_held(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns maps in our integer types, and other tensors as they are."""
    return tensor if like.is_floating_point() else tensor.to(like.dtype)


def _exact(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """Widens float16, which neither trains nor multiplies on a CPU; every value stays what it is."""
    if not any(tensor.dtype == torch.float16 for tensor in tensors.values()):
        return tensors, ()
    wide = {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}
    return wide, ("float16 weights are kept as float32, each with its value",)


def _check_verifier(source: PublishedCheckpoint, verifier: Verifier) -> None:
    """Raises where the sizes say that this cannot be the verifier that the checkpoint was trained for."""
    tables = (source.config, *(source.config.get(key) for key in ("text_config", "transformer_layer_config")))
    told = {key: value for table in tables if isinstance(table, Mapping) for key, value in table.items()}
    problems = [
        f"its {key} is {told[key]}, that of the verifier {verifier.name} is {verifier.facts[key]}: another verifier"
        for key in ("hidden_size", "vocab_size")
        if isinstance(told.get(key), int) and told[key] != verifier.facts[key]
    ]
    if problems:
        raise source.error(*problems)


def _differences(config: Any, facts: VerifierFacts) -> list[str]:
    """Returns in words where the draft's decoder differs from the verifier's: each has cost somebody his acceptance."""
    decoder = config.transformer_layer_config
    keys = ("rope_parameters", "max_position_embeddings", "rms_norm_eps")
    told = [(key, decoder[key], facts.get(key)) for key in keys]
    return [
        f"{key} is {ours}, the verifier's is {theirs}: kept as the checkpoint has it"
        for key, ours, theirs in told
        if theirs is not None and ours != theirs
    ]
