"""Writes a speculator in a server's layout, and refuses one that the server would get wrong."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file

from speculators.errors import ArtifactError, VerifierError
from speculators.exchange.drafts import ChosenK, choose_k
from speculators.exchange.pages import ServingFacts, model_card, serve_page
from speculators.exchange.refusals import undraftable, weight_refusals
from speculators.exchange.servable import config_refusals, layer_ids
from speculators.facts import VerifierFacts
from speculators.files.disk import file_sha256, write_json, write_whole
from speculators.files.folders import whole_folder
from speculators.formats.find import layouts_of
from speculators.formats.server_layout import (
    PER_BATCH,
    SGLANG,
    TARGETS,
    Deployment,
    ServerLayout,
    chat_arguments,
    chat_notes,
)
from speculators.model import WEIGHTS_FILE, SpeculatorModel
from speculators.recipe.checks import too_many_drafts
from speculators.recipe.decoder import rope_values
from speculators.recipe.input_sections import VerifierSection
from speculators.runs.background import Background
from speculators.verifier import hub
from speculators.verifier.sources import existing_folder

# Marks a folder as an export, and describes it.
RECORD = "export.json"
# The dtype of a draft that becomes part of a copy of the verifier, where each tensor keeps the verifier's own dtype.
AS_STITCHED = "the verifier's"


def _resolved(path: Path) -> Path:
    """Gives every folder a name: `.` has none, but the export is first written to a folder beside it."""
    return path.resolve()


@attrs.frozen(kw_only=True)
class ExportRequest:
    """Which speculator to export, for which server, and where to.

    Attributes:
        speculator: its folder.
        target: a key of TARGETS.
        out: folder to write; an earlier export there is replaced.
        name: of the speculator, for people.
        verifier: its folder; None if it is not on this machine.
        section: the `[verifier]` that the draft was trained with; None for a verifier as its files are.
        verifier_name: hub id or path that the export names; None keeps the one in config.json.
        dtype: of the weights; None for bfloat16 (or the verifier's dtypes, for a part of its checkpoint).
        k: tokens drafted per round; None for the best that the run measured.
        address: hub id that the commands name; None for `out`.
        background: the run that made the speculator.
    """

    speculator: Path
    target: str
    out: Path = attrs.field(converter=_resolved)
    name: str
    verifier: Path | None
    verifier_name: str | None
    dtype: str | None
    section: VerifierSection | None = None
    k: int | None = None
    address: str | None = None
    background: Background = Background()


@attrs.frozen(kw_only=True)
class Exported:
    """A finished export.

    Attributes:
        folder: of the export.
        target: a key of TARGETS.
        server: whose layout it has.
        algorithm: of the speculator.
        verifier: as the export names it.
        dtype: of the weights; AS_STITCHED for a part of the verifier's checkpoint.
        num_speculative_tokens: tokens drafted per round (K).
        why_k: where K comes from.
        command: serves it, as one would type it.
        notes: what was not checked, and what users of the export should know.
        files: names of all files.
    """

    folder: Path
    target: str
    server: str
    algorithm: str
    verifier: str
    dtype: str
    num_speculative_tokens: int
    why_k: str
    command: str
    notes: tuple[str, ...]
    files: tuple[str, ...]


def export(request: ExportRequest) -> Exported:
    """Writes an export: config.json, weights, serve.md, and for the hub a model card.

    Raises:
        ArtifactError: the server has no layout for the algorithm, or would draft something else; lists every reason.
    """
    model = SpeculatorModel.from_saved(request.speculator)
    config = _without_unread_keys(_named(model.config, request.verifier_name))
    served = _layout(config.speculators_model_type, request.target)
    drafts = choose_k(request.k, request.background, config, server=served.server)
    unscheduled = []
    if drafts.schedule and not _takes_schedule(served):
        drafts = attrs.evolve(drafts, schedule=())
        unscheduled.append("K by batch size is left out: the command has no option for it beside config.json")
    config = _drafting(config, drafts.k)
    refused, noted = ([], []) if request.verifier is None else undraftable(model, request.verifier, request.section)
    _refuse(model, config, served, request, refused)
    request = attrs.evolve(request, dtype=AS_STITCHED if served.stitch else request.dtype or "bfloat16")
    verifier = config.speculators_config.verifier.name_or_path
    notes = (*request.background.unread, *_unchecked(request, verifier), *noted, *unscheduled, *served.notes(config))
    notes += tuple(chat_notes(served.server, request.section))
    address = request.address or str(request.out.absolute())
    facts = _serving_facts(request, config, served, drafts, address=address, notes=notes)
    with _new_folder(request.out) as partial:
        _write(model, config, served, request, partial)
        write_whole(partial / "serve.md", serve_page(facts).encode())
        if request.target == "hub":
            # The card is read in a repository, where a folder of this machine means nothing.
            address = request.address or request.out.name
            page = model_card(_serving_facts(request, config, served, drafts, address=address, notes=notes))
            write_whole(partial / "README.md", page.encode())
        write_json(partial / RECORD, _record(request, config.speculators_model_type, drafts.k))
    return Exported(
        folder=request.out,
        target=request.target,
        server=served.server,
        algorithm=config.speculators_model_type,
        verifier=verifier,
        dtype=str(request.dtype),
        num_speculative_tokens=drafts.k,
        why_k=drafts.why,
        command=shlex.join(facts.command),
        notes=notes,
        files=tuple(sorted(path.name for path in request.out.iterdir())),
    )


def _serving_facts(
    request: ExportRequest,
    config: Any,
    served: ServerLayout,
    drafts: ChosenK,
    *,
    address: str,
    notes: tuple[str, ...],
) -> ServingFacts:
    """Collects what the pages state; `address` is the folder or hub id that their commands name."""
    verifier = config.speculators_config.verifier.name_or_path
    place = Deployment(folder=address, verifier=verifier, num_speculative_tokens=drafts.k, schedule=drafts.schedule)
    usable = {each.num_speculative_tokens for each in request.background.settings}
    usable = {k for k in usable if not too_many_drafts(config, [k])}
    with_k = served.with_k or served.command
    # A schedule has no place in config.json.
    command = with_k if drafts.schedule else served.command
    chat = chat_arguments(served.server, request.section)
    return ServingFacts(
        name=request.name,
        algorithm=config.speculators_model_type,
        verifier=verifier,
        server=served.server,
        command=(*command(place), *chat),
        commands={
            k: (*with_k(attrs.evolve(place, num_speculative_tokens=k, schedule=())), *chat)
            for k in sorted({*usable, drafts.k})
        },
        chat=chat,
        asked_with=request.section.template if request.section and served.server == SGLANG else {},
        tokens=drafts.k,
        why=drafts.why,
        schedule=drafts.schedule,
        notes=notes,
        background=request.background,
    )


def _takes_schedule(served: ServerLayout) -> bool:
    """Whether the server's command can state K by batch size."""
    place = Deployment(folder="", verifier="", num_speculative_tokens=1, schedule=((1, 1, 1),))
    return PER_BATCH in shlex.join((served.with_k or served.command)(place))


def _drafting(config: Any, k: int) -> Any:
    """Sets the tokens drafted per round in a config."""
    section = config.speculators_config
    first, *others = section.proposal_methods
    methods = (attrs.evolve(first, speculative_tokens=k), *others)
    return attrs.evolve(config, speculators_config=attrs.evolve(section, proposal_methods=methods))


def _named(config: Any, verifier_name: str | None) -> Any:
    """Renames the verifier in a config."""
    if (section := config.speculators_config) is None:
        raise ArtifactError("config.json has no speculators_config, so no server can find the verifier")
    if verifier_name is None:
        return config
    verifier = attrs.evolve(section.verifier, name_or_path=verifier_name)
    return attrs.evolve(config, speculators_config=attrs.evolve(section, verifier=verifier))


def _without_unread_keys(config: Any) -> Any:
    """Drops rotary parameters that no layer reads: earlier versions saved all of the verifier's."""
    decoder = config.transformer_layer_config
    rope = rope_values(decoder.get("rope_parameters") or {})
    return attrs.evolve(config, transformer_layer_config={**decoder, "rope_parameters": rope}) if rope else config


def _layout(algorithm: str, target: str) -> ServerLayout:
    layouts = {served.server: served for served in layouts_of(algorithm)}
    server = TARGETS[target]
    if server not in layouts:
        known = [name for name, each in TARGETS.items() if each in layouts]
        hint = f"use one of: {', '.join(known)}" if known else "the algorithm's layouts.py can add one"
        raise ArtifactError(f"--to {target}: {server} has no layout for the algorithm {algorithm!r}", hint=hint)
    return layouts[server]


def _refuse(
    model: SpeculatorModel, config: Any, served: ServerLayout, request: ExportRequest, earlier: list[str]
) -> None:
    """Raises one error with every reason for which the server would not draft what was trained."""
    facts = VerifierFacts.read(request.verifier / "config.json") if request.verifier else None
    reasons = [*config_refusals(config, served.server, facts), *served.refusals(config), *earlier]
    reasons += weight_refusals(model.saved_names(model.state_dict()))
    if served.stitch is not None and request.verifier is None:
        reasons.append("it becomes part of the verifier's checkpoint, which is not on this machine: give --verifier")
    if served.stitch is not None and request.dtype is not None:
        reasons.append("it becomes part of the verifier's checkpoint, whose dtypes it takes: leave out --dtype")
    if reasons:
        lines = "\n".join(f"  {reason}" for reason in reasons)
        raise ArtifactError(f"{request.speculator}: {served.server} would not draft what was trained:\n{lines}")


def _unchecked(request: ExportRequest, verifier: str) -> tuple[str, ...]:
    notes = []
    if request.verifier is None:
        notes.append(f"{verifier} is not on this machine: whether the draft can end a turn was not checked")
    if Path(verifier).is_absolute():
        notes.append(
            f"the export names the verifier {verifier}, a folder on this machine: for a server elsewhere, give its hub "
            "id with --verifier-name"
        )
    return tuple(notes)


def _write(model: SpeculatorModel, config: Any, served: ServerLayout, request: ExportRequest, partial: Path) -> None:
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
    document = served.config(config) if served.config else config.to_dict()
    write_json(partial / "config.json", {**document, "torch_dtype": request.dtype})


def _with_states_counted(config: Any) -> Any:
    """States the number of fused states where vLLM, which assumes three, would get it wrong."""
    decoder, count = config.transformer_layer_config, len(layer_ids(config))
    if count in (0, decoder.get("num_aux_hidden_states", 3)):
        return config
    return attrs.evolve(config, transformer_layer_config={**decoder, "num_aux_hidden_states": count})


def _record(request: ExportRequest, algorithm: str, k: int) -> dict[str, Any]:
    """Describes an export; the file also marks the folder as one that may be replaced."""
    files = ("config.json", WEIGHTS_FILE)
    return {
        "target": request.target,
        "algorithm": algorithm,
        "num_speculative_tokens": k,
        "dtype": request.dtype,
        "speculator": {name: file_sha256(request.speculator / name) for name in files},
    }


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder that becomes `out`, replacing an earlier export.

    Raises:
        ArtifactError: `out` holds something else, or the disk is full.
    """
    if out.exists() and not (out / RECORD).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ArtifactError(f"{out} exists and is not an export", hint="name another folder with --out")
    with whole_folder(out) as partial:
        yield partial


def find_verifier(section: VerifierSection, named: str) -> Path | None:
    """Looks for the verifier of an export on this machine: its config and tokenizer are enough.

    Args:
        section: the `[verifier]` of the run, with absolute paths.
        named: the folder that config.json names, which training used. It may be in a different cache.

    Returns:
        The folder, or None if the verifier is not here.
    """
    if section.kind != "hub":
        folder = existing_folder(section)
    else:
        try:
            folder = hub.fetch_tokenizer(section.model, section.revision, trust_remote_code=section.trust_remote_code)
        # The export goes on; its notes say what was not checked.
        except VerifierError:
            folder = None
    return Path(named) if folder is None and Path(named).is_dir() else folder
