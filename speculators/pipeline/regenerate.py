"""Replaces answers by the verifier's own: on-policy data, made once, with its provenance beside it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs

from speculators.data.conversations import LAYOUT, parse, reasons_text
from speculators.data.json_rows import NOT_JSON, Unusable
from speculators.data.layouts import ROLES
from speculators.data.messages import Message
from speculators.data.sources import source_rows, stream_source
from speculators.data.template import ChatTemplate
from speculators.errors import DataError, Problem, RecipeError
from speculators.events import Listen, Progress, WarningEvent
from speculators.files.disk import disk_errors, file_sha256, read_json, write_json, write_whole
from speculators.pipeline.context import Context
from speculators.recipe.input_sections import DataSection, DataSource, Regenerate
from speculators.recipe.schema import Recipe
from speculators.servers.answers import Answer, AnswerClient
from speculators.servers.endpoint import Endpoint
from speculators.servers.engines import ServerIdentity
from speculators.verifier.engine import Engine
from speculators.verifier.generate import Sampling
from speculators.verifier.hub import fetch_tokenizer
from speculators.verifier.sources import obtain
from speculators.verifier.tokens import folder_stop_ids, load_tokenizer

PACKAGES = ("spec-recipes", "torch", "transformers")


class Answerer(Protocol):
    """Answers prompts: the verifier in this process, or a server."""

    @property
    def tokenizer(self) -> Any:
        """The verifier's tokenizer."""

    def generate_batches(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, done: Container[int], progress: Progress
    ) -> Iterator[tuple[tuple[int, ...], Sequence[Answer]]]:
        """Yields answers as `Engine.generate_batches` does, as token ids or as text."""


def regenerated(context: Context) -> DataSection:
    """Replaces the sources of `[data]` by one file of the verifier's own answers, which is made if it is missing."""
    data = context.recipe.data
    settings = data.regenerate
    assert settings is not None
    file = answers_file(context)
    if not is_whole(file):
        if file.exists():
            context.emit(WarningEvent(message=f"{file} has changed since it was written: its answers are regenerated"))
            file.unlink()
        left_out = LeftOut()
        prompts = [prompt for source in data.sources for prompt in read_prompts(source, left_out)]
        for sentence in left_out.sentences():
            context.emit(WarningEvent(message=sentence))
        engine = context.engine(settings.dtype or context.recipe.verifier.dtype)
        write_answers(file, prompts, engine, settings, facts=lambda: engine_facts(engine), progress=context.emit)
    return attrs.evolve(data, sources=(DataSource(path=str(file)),), regenerate=None)


def answers_file(context: Context) -> Path:
    """Locates the verifier's own answers to the recipe's prompts, which may not exist yet."""
    return context.places.answers(context.plan.stage("prepare").fingerprint)


def is_whole(file: Path) -> bool:
    """Whether answers are there, with the content that their provenance states."""
    provenance = read_json(_provenance_file(file))
    return file.is_file() and isinstance(provenance, dict) and provenance.get("sha256") == file_sha256(file)


def _provenance_file(file: Path) -> Path:
    return file.with_name(file.name + ".json")


@attrs.define
class LeftOut:
    """Counts what reading prompts leaves out.

    Attributes:
        skipped: unusable rows by reason; a file with a row that has no messages is refused.
        cut: conversations with further user turns, which get no answer.
    """

    skipped: Counter[str] = attrs.field(factory=Counter)
    cut: int = 0

    def sentences(self) -> list[str]:
        """Writes a sentence for each count above zero, with its consequence."""
        sentences = []
        if self.skipped:
            sentences.append(
                f"{self.skipped.total()} rows cannot be used and get no answer: {reasons_text(self.skipped)}"
            )
        if self.cut:
            turns = "only their first user turn is answered, because later ones refer to answers that are dropped"
            sentences.append(f"{self.cut} conversations have several user turns: {turns}")
        return sentences


def read_prompts(source: DataSource, left_out: LeftOut) -> list[dict[str, Any]]:
    """Lists the rows of `stream_prompts`."""
    return [row for _, row in stream_prompts(source, left_out)]


def stream_prompts(source: DataSource, left_out: LeftOut) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) with messages up to the first user turn; answers in the source are dropped.

    Args:
        left_out: counts what is not yielded.

    Raises:
        DataError: a row of a file has no user turn, or a data set has no usable row.
    """
    if not source.is_local:
        for conversation in stream_source(source, Path(), left_out.skipped):
            messages = [message.to_input() for message in conversation.messages]
            row = {"id": conversation.id, "category": conversation.category, "messages": messages}
            yield conversation.id, _cut(row, conversation.id, left_out)
        return
    for source_row in source_rows(source, Path()):
        value = source_row.value
        if isinstance(value, Unusable) and value.reason != NOT_JSON:
            left_out.skipped[value.reason] += 1
        else:
            yield source_row.place, _cut(value, source_row.place, left_out)


def _cut(row: Any, place: str, left_out: LeftOut) -> dict[str, Any]:
    """Cuts a conversation after its first user turn; raises DataError, which names `place`, if it has none."""
    turns = (row.get("messages") or row.get("conversations")) if isinstance(row, dict) else None
    if not isinstance(turns, list):
        raise DataError(f"{place}: not a JSON object with messages", hint=LAYOUT)
    users = [index for index, turn in enumerate(turns) if _role(turn) == "user"]
    if not users:
        raise DataError(f"{place}: no user turn to answer", hint=LAYOUT)
    # The one reader of conversations checks it, and requires an answer.
    parsed = parse({"messages": [*turns[: users[0] + 1], {"role": "assistant", "content": "-"}]}, place)
    if isinstance(parsed, str):
        raise DataError(f"{place}: {parsed}", hint=LAYOUT)
    left_out.cut += len(users) > 1
    others = {key: value for key, value in row.items() if key != "conversations"}
    return {**others, "messages": [message.to_input() for message in parsed.messages[:-1]]}


def _role(turn: Any) -> str | None:
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return ROLES.get(role) if isinstance(role, str) else None


def write_answers(
    file: Path,
    prompts: list[dict[str, Any]],
    answerer: Answerer,
    settings: Regenerate,
    *,
    facts: Callable[[], dict[str, Any]],
    progress: Progress,
) -> None:
    """Answers every prompt with the verifier; writes `file`, and its provenance to `file` + ".json".

    Finished batches are kept in `file` + ".part", so that a killed run resumes where it was.

    Args:
        file: JSONL to write.
        prompts: rows with messages, the last one the user's.
        answerer: the verifier.
        settings: how it answers.
        facts: states what determines the answers besides prompts, settings and our own versions.
        progress: called while answers are made.

    Raises:
        RecipeError: `file` exists and has other answers.
    """
    part = file.with_name(file.name + ".part")
    template = ChatTemplate.of(answerer.tokenizer)
    ids = [template.prompt_ids(tuple(_message(message) for message in row["messages"])) for row in prompts]
    origin = {**facts(), **provenance(settings, ids)}
    answers = _finished(part, origin)
    if file.exists() and not answers and not _states(_provenance_file(file), origin):
        raise RecipeError([Problem("", f"{file} exists, with other answers", "name another file, or remove it first")])
    sampling = Sampling(**attrs.asdict(settings, filter=lambda attribute, _: attribute.name != "dtype"))
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    for indices, outputs in answerer.generate_batches(ids, sampling, done=answers, progress=progress):
        answers.update(zip(indices, outputs, strict=True))
        write_whole(part, json.dumps({"facts": origin, "answers": answers}).encode())
    rows = _answered(prompts, answers, answerer.tokenizer)
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    write_json(_provenance_file(file), {**origin, "sha256": file_sha256(file), "conversations": len(prompts)})
    part.unlink(missing_ok=True)


def _message(values: dict[str, str]) -> Message:
    return Message(role=values["role"], content=values["content"])


def _states(provenance: Path, facts: dict[str, Any]) -> bool:
    """Whether the provenance beside answers states these facts, and possibly more."""
    stated = read_json(provenance)
    return isinstance(stated, dict) and {**stated, **facts} == stated


def _finished(part: Path, facts: dict[str, Any]) -> dict[int, Answer]:
    """Reads the answers of an interrupted run with the same facts, by the index of their prompt."""
    saved = read_json(part)
    if not isinstance(saved, dict) or saved.get("facts") != facts:
        return {}
    return {int(index): answer for index, answer in saved["answers"].items()}


def _answered(prompts: list[dict[str, Any]], answers: dict[int, Answer], tokenizer: Any) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(prompts):
        answer = answers[index]
        text = answer if isinstance(answer, str) else tokenizer.decode(answer, skip_special_tokens=True)
        yield {**row, "messages": [*row["messages"], {"role": "assistant", "content": text}]}


def provenance(settings: Regenerate, ids: list[list[int]]) -> dict[str, Any]:
    """States what determines the answers besides the verifier: prompts, sampling, versions."""
    return {
        "prompts_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "sampling": attrs.asdict(settings),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def engine_facts(engine: Engine) -> dict[str, Any]:
    """States which verifier answers in this process, and in which dtype."""
    weights = sorted(engine.folder.glob("*.safetensors"))
    return {
        "verifier": (read_json(engine.folder / "manifest.json") or {}).get("source", str(engine.folder)),
        "verifier_weights_sha256": {path.name: file_sha256(path) for path in weights},
        "dtype": str(engine.dtype).removeprefix("torch."),
    }


def regenerate_file(
    recipe: Recipe,
    prompts: Path,
    out: Path,
    *,
    endpoint: Endpoint | None = None,
    concurrency: int = 1,
    progress: Listen,
) -> dict[str, Any]:
    """Answers the prompts of a JSONL file with a recipe's verifier; returns the provenance, which is also written.

    Args:
        recipe: names the verifier, and how it answers.
        prompts: JSONL with messages.
        out: JSONL to write.
        endpoint: a server of the same verifier; None loads it in this process.
        concurrency: prompts that the server has at once.
        progress: called while answers are made, and with a warning for prompts that are left out.

    Raises:
        DataError: a row has no user turn, or the file cannot be read.
        RecipeError: `out` exists and has other answers.
        ServerError: the server cannot be reached, or gives no answers.
    """
    settings = recipe.data.regenerate or Regenerate()
    left_out = LeftOut()
    rows = read_prompts(DataSource(path=str(prompts.resolve())), left_out)
    for sentence in left_out.sentences():
        progress(WarningEvent(message=sentence))
    section = recipe.verifier
    if endpoint is None:
        folder = obtain(section, progress=progress)
        engine = Engine(folder, dtype=settings.dtype or section.dtype, section=section)
        write_answers(out, rows, engine, settings, facts=lambda: engine_facts(engine), progress=progress)
    else:
        server, facts = _server(recipe, endpoint, concurrency, progress)
        write_answers(out, rows, server, settings, facts=lambda: facts, progress=progress)
    return dict(read_json(_provenance_file(out)))


def _server(
    recipe: Recipe, endpoint: Endpoint, concurrency: int, progress: Progress
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
