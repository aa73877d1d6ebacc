"""`export`: a speculator as a server reads it, refused where it would be served wrongly."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file

from speculators.errors import ArtifactError
from speculators.exchange.folder import RECORD, new_folder
from speculators.exchange.pages import Subject, card, serve_page
from speculators.exchange.refusals import config_refusals, layer_ids, undraftable, weight_refusals
from speculators.facts import VerifierFacts
from speculators.files.disk import file_sha256, write_json, write_whole
from speculators.formats.find import layouts_of
from speculators.formats.server_layout import TARGETS, Deployment, ServerLayout
from speculators.model import WEIGHTS_FILE, SpeculatorModel
from speculators.runs.background import Background

# What a draft is written in that becomes a part of the verifier's checkpoint.
AS_STITCHED = "the verifier's"


def _resolved(path: Path) -> Path:
    """Every folder has a name then: `.` has none, and a folder is written under another one first."""
    return path.resolve()


@attrs.frozen(kw_only=True)
class Request:
    """What is asked for.

    Attributes:
        speculator: folder of it.
        target: one of TARGETS.
        out: made, or written anew where an export is there.
        name: of the speculator, for people.
        verifier: its folder; None where it is not on this machine.
        verifier_name: by which the export names it; None keeps what config.json says.
        dtype: of the weights; None for bfloat16, and for a part of the verifier's checkpoint for what that has.
        address: by which the commands name the export; None for `out`.
        background: of the speculator.
    """

    speculator: Path
    target: str
    out: Path = attrs.field(converter=_resolved)
    name: str
    verifier: Path | None
    verifier_name: str | None
    dtype: str | None
    address: str | None = None
    background: Background = Background()


@attrs.frozen(kw_only=True)
class Exported:
    """What an export came to.

    Attributes:
        dtype: of the weights; AS_STITCHED for a part of the verifier's checkpoint.
        command: that serves it, as typed.
        notes: what was not checked, and what whoever serves it should know.
    """

    folder: Path
    target: str
    server: str
    algorithm: str
    verifier: str
    dtype: str
    command: str
    notes: tuple[str, ...]
    files: tuple[str, ...]


def export(request: Request) -> Exported:
    """Writes an export: config.json, weights, serve.md, and for the hub a model card.

    Raises:
        ArtifactError: the server has no layout for the algorithm, or would serve it wrongly; every reason is told.
    """
    model = SpeculatorModel.from_saved(request.speculator)
    config = _named(model.config, request.verifier_name)
    algorithm = config.speculators_model_type
    served = _layout(algorithm, request.target)
    refused, noted = ([], []) if request.verifier is None else undraftable(model, request.verifier)
    _refuse(model, config, served, request, refused)
    dtype = AS_STITCHED if served.stitch else request.dtype or "bfloat16"
    verifier = config.speculators_config.verifier.name_or_path
    tokens = config.speculators_config.proposal_methods[0].speculative_tokens
    address = request.address or str(request.out.absolute())
    command = served.command(Deployment(folder=address, verifier=verifier, num_speculative_tokens=tokens))
    notes = (*request.background.unread, *_unchecked(request, verifier), *noted, *served.notes(config))
    subject = Subject(
        name=request.name,
        algorithm=algorithm,
        verifier=verifier,
        server=served.server,
        command=command,
        tokens=tokens,
        notes=notes,
        background=request.background,
    )
    with new_folder(request.out) as partial:
        _write(model, config, served, attrs.evolve(request, dtype=dtype), partial)
        write_whole(partial / "serve.md", serve_page(subject).encode())
        if request.target == "hub":
            # Whoever reads the card has it from a repository: no folder of this machine is of use there.
            place = Deployment(
                folder=request.address or request.out.name, verifier=verifier, num_speculative_tokens=tokens
            )
            page = card(attrs.evolve(subject, command=served.command(place)))
            write_whole(partial / "README.md", page.encode())
        write_json(partial / RECORD, _record(attrs.evolve(request, dtype=dtype), algorithm))
    return Exported(
        folder=request.out,
        target=request.target,
        server=served.server,
        algorithm=algorithm,
        verifier=verifier,
        dtype=dtype,
        command=shlex.join(command),
        notes=notes,
        files=tuple(sorted(path.name for path in request.out.iterdir())),
    )


def _named(config: Any, verifier_name: str | None) -> Any:
    """Returns the config that the export has: the verifier by its name there."""
    if (held := config.speculators_config) is None:
        raise ArtifactError("config.json has no speculators_config: no server would know the verifier")
    if verifier_name is None:
        return config
    verifier = attrs.evolve(held.verifier, name_or_path=verifier_name)
    return attrs.evolve(config, speculators_config=attrs.evolve(held, verifier=verifier))


def _layout(algorithm: str, target: str) -> ServerLayout:
    layouts = {served.server: served for served in layouts_of(algorithm)}
    server = TARGETS[target]
    if server not in layouts:
        known = [name for name, each in TARGETS.items() if each in layouts]
        hint = (
            f"it can be written for: {', '.join(known)}" if known else "its layouts.py would say how a server reads it"
        )
        raise ArtifactError(f"--to {target}: {server} has no layout for the algorithm {algorithm!r}", hint=hint)
    return layouts[server]


def _refuse(model: SpeculatorModel, config: Any, served: ServerLayout, request: Request, found: list[str]) -> None:
    """Raises with every reason for which the server would not draft what was trained, those that were found first."""
    facts = VerifierFacts.read(request.verifier / "config.json") if request.verifier else None
    found = [*config_refusals(config, served.server, facts), *served.refusals(config), *found]
    found += weight_refusals(model.saved_names(model.state_dict()))
    if served.stitch is not None and request.verifier is None:
        found.append("it becomes a part of the verifier's checkpoint, and the verifier is not here: give --verifier")
    if served.stitch is not None and request.dtype is not None:
        found.append("it becomes a part of the verifier's checkpoint, whose dtypes it takes: leave out --dtype")
    if found:
        reasons = "\n".join(f"  {reason}" for reason in found)
        raise ArtifactError(f"{request.speculator}: {served.server} would not draft what was trained:\n{reasons}")


def _unchecked(request: Request, verifier: str) -> tuple[str, ...]:
    told = []
    if request.verifier is None:
        told.append(f"{verifier} is not on this machine: whether tokens that end a turn can be drafted was not checked")
    if request.target == "hub" and Path(verifier).is_absolute():
        told.append(
            f"the verifier is named {verifier}, which is a folder of this machine: --verifier-name gives its id"
        )
    return tuple(told)


def _write(model: SpeculatorModel, config: Any, served: ServerLayout, request: Request, partial: Path) -> None:
    if served.stitch is not None:
        assert request.verifier is not None, "refused before"
        partial.rmdir()
        served.stitch(request.speculator, request.verifier, partial)
        return
    dtype = getattr(torch, str(request.dtype))
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.saved_names(model.state_dict()).items()
    }
    if served.names is None and served.config is None:
        model.config = _with_states_counted(config)
        model.save_pretrained(partial, state)
        return
    names = {name: served.names.theirs(name) if served.names else name for name in state}
    kept = {name: theirs for name, theirs in names.items() if not name.startswith(served.from_verifier or ("\0",))}
    if nameless := [name for name, theirs in kept.items() if theirs is None]:
        raise ArtifactError(f"{served.server} has no name for {', '.join(nameless)}")
    tensors = {str(theirs): state[name].detach().contiguous().clone() for name, theirs in kept.items()}
    save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
    told = served.config(config) if served.config else config.to_dict()
    write_json(partial / "config.json", {**told, "torch_dtype": request.dtype})


def _with_states_counted(config: Any) -> Any:
    """Says how many states are fused where vLLM, which takes three for granted, would not count them right."""
    decoder, count = config.transformer_layer_config, len(layer_ids(config))
    if count in (0, decoder.get("num_aux_hidden_states", 3)):
        return config
    return attrs.evolve(config, transformer_layer_config={**decoder, "num_aux_hidden_states": count})


def _record(request: Request, algorithm: str) -> dict[str, Any]:
    """Returns what marks the folder as an export, and says what it is of."""
    files = ("config.json", WEIGHTS_FILE)
    return {
        "target": request.target,
        "algorithm": algorithm,
        "dtype": request.dtype,
        "speculator": {name: file_sha256(request.speculator / name) for name in files},
    }
