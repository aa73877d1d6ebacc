"""Replaces answers by the verifier's own: on-policy data, made once, with its provenance beside it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.cpu import sharing_the_cpu
from speculators.data.planned import as_planned, with_identities
from speculators.data.written import TOKEN_IDS
from speculators.errors import Problem, RecipeError
from speculators.events import Event, Listen, Progress, ProgressEvent, WarningEvent
from speculators.files.disk import file_sha256, read_json, write_json
from speculators.pipeline.answering import Answerer, Conversing, write_rows
from speculators.pipeline.context import Context
from speculators.pipeline.dialogues import Dialogue, LeftOut, stream_dialogues
from speculators.pipeline.journal import AnswerJournal
from speculators.recipe.input_sections import DataSection, DataSource, Regenerate
from speculators.recipe.schema import Recipe
from speculators.servers.answers import AnswerClient
from speculators.servers.endpoint import Endpoint
from speculators.servers.engines import ServerIdentity
from speculators.training.world import local_device
from speculators.verifier.engine import Engine
from speculators.verifier.generate import Sampling
from speculators.verifier.hub import fetch_tokenizer
from speculators.verifier.sources import obtain
from speculators.verifier.tokens import folder_stop_ids, load_tokenizer

PACKAGES = ("spec-recipes", "torch", "transformers")
# Where the ids of answers come from: as the verifier generated them, or tokenized from the text of a server.
GENERATED, TOKENIZED = "generated", "tokenized from text"
TEXT_ONLY = (
    "keeps its answers as text alone, as earlier versions wrote them: the chat template renders them again, which may "
    "differ from what the verifier wrote; remove the file to have them made with their token ids"
)


def regenerated(context: Context, progress: Progress) -> DataSection:
    """Replaces the sources of `[data]` by one file of the verifier's own answers, which is made if it is missing.

    Every process calls this.

    Args:
        progress: gets how many prompts are answered.
    """
    data, file = context.recipe.data, answers_file(context)
    settings = data.regenerate
    assert settings is not None
    if context.world.broadcast(context.world.is_main and not _is_there(file, context.emit)):
        with context.lead(settings.dtype or context.recipe.verifier.dtype) as engine:
            if engine is not None:
                _answer(context, engine, file, progress)
    return attrs.evolve(data, sources=(DataSource(path=str(file)),), regenerate=None)


def _is_there(file: Path, listen: Listen) -> bool:
    """Whether the answers are there; removes a file that has changed."""
    whole = is_whole(file)
    if file.exists() and not whole:
        listen(WarningEvent(message=f"{file} has changed since it was written: its answers are regenerated"))
        file.unlink()
    if whole and not holds_ids(file):
        listen(WarningEvent(message=f"{file} {TEXT_ONLY}"))
    return whole


def _answer(context: Context, engine: Engine, file: Path, progress: Progress) -> None:
    def listen(event: Event) -> None:
        if isinstance(event, ProgressEvent):
            progress(event)
        else:
            context.emit(event)

    data = context.recipe.data
    assert data.regenerate is not None
    dialogues = read_dialogues(data.sources, context.emit, context.plan.stage("prepare").inputs["sources"])
    facts, limit = engine_facts(engine), data.max_tokens
    write_answers(file, dialogues, engine, data.regenerate, max_tokens=limit, facts=lambda _: facts, listen=listen)


def answers_file(context: Context) -> Path:
    """Locates the verifier's own answers to the recipe's prompts, which may not exist yet."""
    return context.places.answers(context.plan.stage("prepare").fingerprint)


def is_whole(file: Path) -> bool:
    """Whether answers are there, with the content that their provenance states."""
    provenance = read_json(_provenance_file(file))
    return file.is_file() and isinstance(provenance, dict) and provenance.get("sha256") == file_sha256(file)


def holds_ids(file: Path) -> bool:
    """Whether the provenance of answers says that their token ids are kept."""
    provenance = read_json(_provenance_file(file))
    return isinstance(provenance, dict) and TOKEN_IDS in provenance


def _provenance_file(file: Path) -> Path:
    return file.with_name(file.name + ".json")


def read_dialogues(
    sources: Sequence[DataSource], listen: Listen, planned: Sequence[Mapping[str, Any]] = ()
) -> list[Dialogue]:
    """Reads the conversations of all sources; warns of those that cannot be used.

    Args:
        planned: the identity of each source in the plan; () where there is no plan.

    Raises:
        DataError: a source has nothing to answer, or is not what was planned.
    """
    left_out, dialogues = LeftOut(), list[Dialogue]()
    for source, identity in with_identities(sources, planned):
        with as_planned(source, identity):
            dialogues += stream_dialogues(source, left_out)
    for sentence in left_out.sentences():
        listen(WarningEvent(message=sentence))
    return dialogues


def write_answers(
    file: Path,
    dialogues: Sequence[Dialogue],
    answerer: Answerer,
    settings: Regenerate,
    *,
    max_tokens: int,
    facts: Callable[[Sequence[int]], dict[str, Any]],
    listen: Listen,
) -> None:
    """Has the verifier write every answer; writes `file`, and its provenance to `file` + ".json".

    Finished batches are appended to `file` + ".part", so that a killed run resumes where it was.

    Args:
        file: JSONL to write.
        dialogues: conversations, with the turns to write.
        answerer: the verifier.
        settings: how it answers.
        max_tokens: length from which a conversation is not continued.
        facts: states what determines the answers besides prompts, settings and our own versions; gets the ids of a
            prompt to try, before anything is generated.
        listen: gets progress, and warnings.

    Raises:
        DataError: the chat template refuses all conversations.
        RecipeError: `file` exists and has other answers.
    """
    part = file.with_name(file.name + ".part")
    work = Conversing(dialogues, answerer, max_tokens=max_tokens)
    origin = {TOKEN_IDS: GENERATED, **facts(work.prompts[0]), **provenance(settings, work.prompts, work.dialogues)}
    if _states(_provenance_file(file), origin) and is_whole(file):
        part.unlink(missing_ok=True)
        return
    continued = AnswerJournal.has(part, origin)
    if file.exists() and not continued:
        raise RecipeError([Problem("", f"{file} exists, with other answers", "name another file, or remove it first")])
    if part.exists() and not continued:
        listen(WarningEvent(message=f"{part} was made with other prompts, settings or versions: it is not continued"))
    journal = AnswerJournal(part, origin)
    sampling = Sampling(**attrs.asdict(settings, filter=lambda attribute, _: attribute.name != "dtype"))
    work.answer(sampling, journal, listen)
    for warning in work.warnings():
        listen(WarningEvent(message=warning))
    write_rows(file, work.rows(journal))
    write_json(_provenance_file(file), {**origin, "sha256": file_sha256(file), "conversations": len(work.dialogues)})
    part.unlink(missing_ok=True)


def _states(provenance: Path, facts: dict[str, Any]) -> bool:
    """Whether the provenance beside answers states these facts, and possibly more."""
    stated = read_json(provenance)
    return isinstance(stated, dict) and {**stated, **facts} == stated


def provenance(settings: Regenerate, prompts: list[list[int]], dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """States what determines the answers besides the verifier: prompts, later turns, sampling, versions."""
    later = [
        [message.to_input() for message in dialogue.conversation.messages[dialogue.turns[0].start :]]
        for dialogue in dialogues
        if len(dialogue.turns) > 1
    ]
    return {
        "prompts_sha256": _digest(prompts),
        **({"later_turns_sha256": _digest(later)} if later else {}),
        "sampling": attrs.asdict(settings),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def engine_facts(engine: Engine) -> dict[str, Any]:
    """States which verifier answers in this process, and in which dtype."""
    return {
        "verifier": (read_json(engine.folder / "manifest.json") or {}).get("source", str(engine.folder)),
        "verifier_weights_sha256": _weights(engine.folder),
        "dtype": str(engine.dtype).removeprefix("torch."),
    }


def _weights(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def other_author(file: Path, folder: Path) -> str | None:
    """Names the verifier that wrote a file of answers, if its provenance states other weights than the folder's."""
    stated = read_json(_provenance_file(file))
    if not holds_ids(file) or "verifier_weights_sha256" not in stated or not is_whole(file):
        return None
    own = _weights(folder)
    return str(stated["verifier"]) if own and own != stated["verifier_weights_sha256"] else None


@sharing_the_cpu()
def regenerate_file(
    recipe: Recipe,
    prompts: Path | None,
    out: Path,
    *,
    endpoint: Endpoint | None = None,
    concurrency: int = 1,
    progress: Listen,
) -> dict[str, Any]:
    """Answers conversations with a recipe's verifier; returns the provenance, which is also written.

    Args:
        recipe: names the verifier, and how it answers.
        prompts: JSONL with messages; None for the sources of `[data]`.
        out: JSONL to write.
        endpoint: a server of the same verifier; None loads it in this process.
        concurrency: prompts that the server has at once.
        progress: called while answers are made, and with a warning for prompts that are left out.

    Raises:
        DataError: a row has no user turn, or the file cannot be read.
        RecipeError: `out` exists and has other answers.
        ServerError: the server cannot be reached, gives no answers, or gives text that hides what was written.
    """
    settings = recipe.data.regenerate or Regenerate()
    sources = recipe.data.sources if prompts is None else [DataSource(path=str(prompts.resolve()))]
    dialogues = read_dialogues(sources, progress)
    section, limit = recipe.verifier, recipe.data.max_tokens
    if endpoint is None:
        folder = obtain(section, progress=progress)
        dtype = settings.dtype or section.dtype
        engine = Engine(folder, dtype=dtype, device=local_device(), section=section)
        known = engine_facts(engine)
        write_answers(out, dialogues, engine, settings, max_tokens=limit, facts=lambda _: known, listen=progress)
    else:
        server, identity = _server(recipe, endpoint, concurrency, progress)

        def facts(prompt: Sequence[int]) -> dict[str, Any]:
            return {**identity, TOKEN_IDS: GENERATED if server.try_answer(prompt) else TOKENIZED}

        write_answers(out, dialogues, server, settings, max_tokens=limit, facts=facts, listen=progress)
        if differing := server.answered["differing"]:
            message = f"{differing} of {server.answered['text']} answers have other tokens than the verifier wrote"
            progress(
                WarningEvent(message=f"{message}: the server returns text, which can be tokenized in several ways")
            )
    return dict(read_json(_provenance_file(out)))


def _server(
    recipe: Recipe, endpoint: Endpoint, concurrency: int, progress: Listen
) -> tuple[AnswerClient, dict[str, Any]]:
    """Connects to a server, and states what it reports about itself; only the tokenizer of a hub's model is fetched."""
    section = recipe.verifier
    served = ServerIdentity.at(endpoint)
    if section.kind == "hub":
        folder = fetch_tokenizer(section.model, section.revision, trust_remote_code=section.trust_remote_code)
    else:
        folder = obtain(section, progress=progress)
    answers = AnswerClient(
        endpoint=endpoint,
        model=served.model,
        tokenizer=load_tokenizer(folder, section),
        stop_ids=folder_stop_ids(folder, section),
        concurrency=concurrency,
    )
    # A server does not report which weights it has: its name for them stands beside the recipe's.
    return answers, {"verifier": section.model, "revision": section.revision, "engine": attrs.asdict(served)}
