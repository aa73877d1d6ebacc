"""Answers replaced by the verifier's own: on-policy data, made once, with where it came from beside it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs

from speculators.data.conversations import LAYOUT, ROLES, Message, jsonl_rows, parse, stream_source, told
from speculators.data.template import ChatTemplate
from speculators.errors import DataError, Problem, RecipeError
from speculators.events import Listen, Progress, WarningEvent
from speculators.files.disk import disk_errors, file_sha256, read_json, write_json, write_whole
from speculators.pipeline.context import Context
from speculators.recipe.input_sections import DataSection, DataSource, Regenerate
from speculators.recipe.schema import Recipe
from speculators.servers.answers import Answer, ServedAnswers
from speculators.servers.endpoint import Endpoint
from speculators.servers.states import Served
from speculators.verifier.engine import Engine
from speculators.verifier.generate import Sampling
from speculators.verifier.hub import fetch_tokenizer
from speculators.verifier.sources import obtain
from speculators.verifier.tokens import folder_stop_ids, load_tokenizer

PACKAGES = ("spec-recipes", "torch", "transformers")


class Answerer(Protocol):
    """Who answers: the verifier in this process, or a server."""

    @property
    def tokenizer(self) -> Any:
        """The verifier's."""

    def generate_batches(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, done: Container[int], progress: Progress
    ) -> Iterator[tuple[tuple[int, ...], Sequence[Answer]]]:
        """As `Engine.generate_batches`; an answer may be its text."""


def regenerated(context: Context) -> DataSection:
    """Returns `[data]` with its sources replaced by one file of the verifier's own answers, made if it is not there."""
    data = context.recipe.data
    settings = data.regenerate
    assert settings is not None
    file = answers_file(context)
    if not is_whole(file):
        if file.exists():
            context.emit(WarningEvent(message=f"{file} is not what was written there: its answers are made again"))
            file.unlink()
        left_out = LeftOut()
        prompts = [prompt for source in data.sources for prompt in read_prompts(source, left_out)]
        for words in left_out.words():
            context.emit(WarningEvent(message=words))
        engine = context.engine(settings.dtype or context.recipe.verifier.dtype)
        write_answers(file, prompts, engine, settings, facts=lambda: engine_facts(engine), progress=context.emit)
    return attrs.evolve(data, sources=(DataSource(path=str(file)),), regenerate=None)


def answers_file(context: Context) -> Path:
    """Returns where the verifier's own answers to the recipe's prompts are, or will be."""
    return context.places.answers(context.plan.stage("prepare").fingerprint)


def is_whole(file: Path) -> bool:
    """Returns whether answers are there, and are those that their provenance was written for."""
    held = read_json(_beside(file))
    return file.is_file() and isinstance(held, dict) and held.get("sha256") == file_sha256(file)


def _beside(file: Path) -> Path:
    return file.with_name(file.name + ".json")


@attrs.define
class LeftOut:
    """What reading prompts leaves out.

    Attributes:
        skipped: rows of data sets that cannot be used, by reason; a file with one is refused.
        cut: conversations with further user turns, of which only the first is answered.
    """

    skipped: Counter[str] = attrs.field(factory=Counter)
    cut: int = 0

    def words(self) -> list[str]:
        """Returns a sentence for each, with its consequence; none where nothing is left out."""
        found = []
        if self.skipped:
            found.append(f"{self.skipped.total()} rows cannot be used and get no answer: {told(self.skipped)}")
        if self.cut:
            turns = "only their first user turn is answered, for later ones speak of answers that are dropped"
            found.append(f"{self.cut} conversations have several user turns: {turns}")
        return found


def read_prompts(source: DataSource, left_out: LeftOut) -> list[dict[str, Any]]:
    """Returns the rows of `stream_prompts`."""
    return [row for _, row in stream_prompts(source, left_out)]


def stream_prompts(source: DataSource, left_out: LeftOut) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) with messages up to the first user turn's end; answers that are there are dropped.

    Args:
        left_out: receives what is not yielded.

    Raises:
        DataError: a row of a file has no user turn, or a data set has no usable row.
    """
    if not source.is_file:
        for found in stream_source(source, Path(), left_out.skipped):
            messages = [attrs.asdict(message) for message in found.messages]
            row = {"id": found.id, "category": found.category, "messages": messages}
            yield found.id, _cut(row, found.id, left_out)
        return
    for number, row in itertools.islice(jsonl_rows(source, Path(source.path)), source.take):
        place = f"{source.path}:{number}"
        yield place, _cut(row, place, left_out)


def _cut(row: Any, place: str, left_out: LeftOut) -> dict[str, Any]:
    turns = (row.get("messages") or row.get("conversations")) if isinstance(row, dict) else None
    if not isinstance(turns, list):
        raise DataError(f"{place}: not a JSON object with messages", hint=LAYOUT)
    users = [index for index, turn in enumerate(turns) if _role(turn) == "user"]
    if not users:
        raise DataError(f"{place}: no user turn to answer", hint=LAYOUT)
    # What a conversation must be like is checked by the one reader of conversations; it wants an answer.
    found = parse({"messages": [*turns[: users[0] + 1], {"role": "assistant", "content": "-"}]}, place)
    if isinstance(found, str):
        raise DataError(f"{place}: {found}", hint=LAYOUT)
    left_out.cut += len(users) > 1
    others = {key: value for key, value in row.items() if key != "conversations"}
    return {**others, "messages": [attrs.asdict(message) for message in found.messages[:-1]]}


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
    """Answers every prompt with the verifier and writes `file` and its provenance `file` + ".json".

    Batches that are done are kept in `file` + ".part", so that a killed run goes on where it was.

    Args:
        file: JSONL to write.
        prompts: rows with messages, the last one the user's.
        answerer: the verifier.
        settings: how it answers.
        facts: returns what determines the answers besides prompts, settings and our own versions.
        progress: told while answers are made.

    Raises:
        RecipeError: `file` is there, and is not of the same work.
    """
    part = file.with_name(file.name + ".part")
    template = ChatTemplate.of(answerer.tokenizer)
    ids = [template.prompt_ids(tuple(_message(message) for message in row["messages"])) for row in prompts]
    whence = {**facts(), **provenance(settings, ids)}
    answers = _kept(part, whence)
    if file.exists() and not answers and not _holds(_beside(file), whence):
        raise RecipeError([Problem("", f"{file} exists, of other work", "name another file, or remove it first")])
    sampling = Sampling(**attrs.asdict(settings, filter=lambda attribute, _: attribute.name != "dtype"))
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    for indices, outputs in answerer.generate_batches(ids, sampling, done=answers, progress=progress):
        answers.update(zip(indices, outputs, strict=True))
        write_whole(part, json.dumps({"facts": whence, "answers": answers}).encode())
    rows = _answered(prompts, answers, answerer.tokenizer)
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    write_json(_beside(file), {**whence, "sha256": file_sha256(file), "conversations": len(prompts)})
    part.unlink(missing_ok=True)


def _message(values: dict[str, str]) -> Message:
    return Message(role=values["role"], content=values["content"])


def _holds(provenance: Path, facts: dict[str, Any]) -> bool:
    """Returns whether a file beside answers says that they are of these facts."""
    held = read_json(provenance)
    return isinstance(held, dict) and {**held, **facts} == held


def _kept(part: Path, facts: dict[str, Any]) -> dict[int, Answer]:
    """Returns the answers of an interrupted run, if it was one of the same inputs."""
    held = read_json(part)
    if not isinstance(held, dict) or held.get("facts") != facts:
        return {}
    return {int(index): answer for index, answer in held["answers"].items()}


def _answered(prompts: list[dict[str, Any]], answers: dict[int, Answer], tokenizer: Any) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(prompts):
        answer = answers[index]
        text = answer if isinstance(answer, str) else tokenizer.decode(answer, skip_special_tokens=True)
        yield {**row, "messages": [*row["messages"], {"role": "assistant", "content": text}]}


def provenance(settings: Regenerate, ids: list[list[int]]) -> dict[str, Any]:
    """Returns what determines the answers besides who gives them: prompts, sampling, versions."""
    return {
        "prompts_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "sampling": attrs.asdict(settings),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def engine_facts(engine: Engine) -> dict[str, Any]:
    """Returns which verifier answers in this process, and in which dtype."""
    weights = sorted(engine.folder.glob("*.safetensors"))
    return {
        "verifier": (read_json(engine.folder / "manifest.json") or {}).get("source", str(engine.folder)),
        "verifier_weights_sha256": {path.name: file_sha256(path) for path in weights},
        "dtype": str(engine.dtype).removeprefix("torch."),
    }


@attrs.frozen(kw_only=True)
class Elsewhere:
    """A server that answers instead of this process.

    Attributes:
        url: of the server.
        concurrency: prompts that it has at once.
    """

    url: str
    concurrency: int


def regenerate_file(
    recipe: Recipe, prompts: Path, out: Path, *, by: Elsewhere | None = None, progress: Listen
) -> dict[str, Any]:
    """Answers the prompts of a JSONL file with a recipe's verifier; returns the provenance, which is written, too.

    Args:
        recipe: names the verifier, and how it answers.
        prompts: JSONL with messages.
        out: JSONL to write.
        by: a server of the same verifier; None to load it here.
        progress: told while answers are made, and what of the prompts is left out.

    Raises:
        DataError: a row has no user turn, or the file cannot be read.
        RecipeError: `out` is there, and is not of the same work.
        ServerError: the server cannot be reached, or gives no answers.
    """
    settings = recipe.data.regenerate or Regenerate()
    left_out = LeftOut()
    rows = read_prompts(DataSource(path=str(prompts.resolve())), left_out)
    for words in left_out.words():
        progress(WarningEvent(message=words))
    section = recipe.verifier
    if by is None:
        folder = obtain(section, progress=progress)
        engine = Engine(folder, dtype=settings.dtype or section.dtype, trust_remote_code=section.trust_remote_code)
        write_answers(out, rows, engine, settings, facts=lambda: engine_facts(engine), progress=progress)
    else:
        server, facts = _server(recipe, by, progress)
        write_answers(out, rows, server, settings, facts=lambda: facts, progress=progress)
    return dict(read_json(_beside(out)))


def _server(recipe: Recipe, by: Elsewhere, progress: Progress) -> tuple[ServedAnswers, dict[str, Any]]:
    """Returns who answers, and what it says of itself; of a hub's model only the tokenizer is fetched here."""
    section = recipe.verifier
    endpoint = Endpoint(url=by.url)
    served = Served.at(endpoint)
    if section.kind == "hub":
        folder = fetch_tokenizer(section.model, section.revision, trust_remote_code=section.trust_remote_code)
    else:
        folder = obtain(section, progress=progress)
    answers = ServedAnswers(
        endpoint=endpoint,
        model=served.model,
        tokenizer=load_tokenizer(folder, trust_remote_code=section.trust_remote_code),
        stop_ids=folder_stop_ids(folder, trust_remote_code=section.trust_remote_code),
        concurrency=by.concurrency,
    )
    # Which weights a server has it does not tell: its name for them stands beside the recipe's.
    return answers, {"verifier": section.model, "revision": section.revision, "engine": attrs.asdict(served)}
