"""Answers replaced by the verifier's own: on-policy data, made once, with where it came from beside it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from speculators.data.conversations import LAYOUT, Message, jsonl_rows, parse, read_source
from speculators.data.files import disk_errors, sha256_of, write_json, write_whole
from speculators.data.template import ChatTemplate
from speculators.errors import DataError
from speculators.events import Progress
from speculators.pipeline.context import Context, read_json
from speculators.recipe.schema import Recipe
from speculators.recipe.sources import DataSection, Regenerate, Source
from speculators.verifier.engine import Engine
from speculators.verifier.generate import Sampling
from speculators.verifier.sources import obtain

PACKAGES = ("spec-recipes", "torch", "transformers")


def regenerated(context: Context) -> DataSection:
    """Returns `[data]` with its sources replaced by one file of the verifier's own answers, made if it is not there."""
    data = context.recipe.data
    settings = data.regenerate
    assert settings is not None
    file = answers_file(context)
    if not file.exists():
        prompts = [prompt for source in data.sources for prompt in read_prompts(source)]
        engine = context.engine(settings.dtype or context.recipe.verifier.dtype)
        write_answers(file, prompts, engine, settings, progress=context.progress)
    return attrs.evolve(data, sources=(Source(path=str(file)),), regenerate=None)


def answers_file(context: Context) -> Path:
    """Returns where the verifier's own answers to the recipe's prompts are, or will be."""
    return answers_path(context.places.cache, context.plan.stage("prepare").fingerprint)


def answers_path(cache: Path, fingerprint: str) -> Path:
    """Returns the same for a cache and the fingerprint of the stage `prepare`."""
    return cache / "regenerated" / f"{fingerprint[:16]}.jsonl"


def read_prompts(source: Source) -> list[dict[str, Any]]:
    """Returns the rows of `stream_prompts`."""
    return [row for _, row in stream_prompts(source)]


def stream_prompts(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) with messages up to the first user turn's end; answers that are there are dropped.

    Raises:
        DataError: a row has no user turn.
    """
    if not source.is_file:
        conversations, _ = read_source(source, Path())
        yield from ((c.id, _row(c.id, c.category, c.messages)) for c in conversations)
        return
    for number, row in itertools.islice(jsonl_rows(source, Path(source.path)), source.take):
        place = f"{source.path}:{number}"
        yield place, _cut(row, place)


def _row(name: str, category: str, messages: Iterable[Message]) -> dict[str, Any]:
    row = {"id": name, "category": category, "messages": [attrs.asdict(message) for message in messages]}
    return _cut(row, name)


def _cut(row: Any, place: str) -> dict[str, Any]:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list):
        raise DataError(f"{place}: not a JSON object with messages", hint=LAYOUT)
    users = [index for index, message in enumerate(messages) if _role(message) == "user"]
    if not users:
        raise DataError(f"{place}: no user turn to answer", hint=LAYOUT)
    # What a conversation must be like is checked by the one reader of conversations; it wants an answer.
    kept = messages[: users[0] + 1]
    found = parse({"messages": [*kept, {"role": "assistant", "content": "-"}]}, place)
    if isinstance(found, str):
        raise DataError(f"{place}: {found}", hint=LAYOUT)
    return {**row, "messages": kept}


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def write_answers(
    file: Path, prompts: list[dict[str, Any]], engine: Engine, settings: Regenerate, *, progress: Progress
) -> None:
    """Answers every prompt with the verifier and writes `file` and its provenance `file` + ".json".

    Batches that are done are kept in `file` + ".part", so that a killed run goes on where it was.
    """
    part = file.with_name(file.name + ".part")
    template = ChatTemplate.of(engine.tokenizer)
    ids = [template.prompt_ids(tuple(_message(message) for message in row["messages"])) for row in prompts]
    facts = provenance(engine, settings, ids)
    answers = _kept(part, facts)
    sampling = Sampling(**attrs.asdict(settings, filter=lambda attribute, _: attribute.name != "dtype"))
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    for indices, outputs in engine.generate_batches(ids, sampling, done=answers, progress=progress):
        answers.update(zip(indices, outputs, strict=True))
        write_whole(part, json.dumps({"facts": facts, "answers": answers}).encode())
    rows = _answered(prompts, answers, engine)
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    write_json(file.with_name(file.name + ".json"), {**facts, "sha256": sha256_of(file), "conversations": len(prompts)})
    part.unlink(missing_ok=True)


def _message(values: dict[str, str]) -> Message:
    return Message(role=values["role"], content=values["content"])


def _kept(part: Path, facts: dict[str, Any]) -> dict[int, list[int]]:
    """Returns the answers of an interrupted run, if it was one of the same inputs."""
    held = read_json(part)
    if not isinstance(held, dict) or held.get("facts") != facts:
        return {}
    return {int(index): answer for index, answer in held["answers"].items()}


def _answered(prompts: list[dict[str, Any]], answers: dict[int, list[int]], engine: Engine) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(prompts):
        text = engine.tokenizer.decode(answers[index], skip_special_tokens=True)
        yield {**row, "messages": [*row["messages"], {"role": "assistant", "content": text}]}


def provenance(engine: Engine, settings: Regenerate, ids: list[list[int]]) -> dict[str, Any]:
    """Returns what determines the answers: verifier, prompts, sampling, versions."""
    weights = sorted(engine.folder.glob("*.safetensors"))
    return {
        "verifier": (read_json(engine.folder / "manifest.json") or {}).get("source", str(engine.folder)),
        "verifier_weights_sha256": {path.name: sha256_of(path) for path in weights},
        "prompts_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "sampling": attrs.asdict(settings),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def regenerate_file(recipe: Recipe, prompts: Path, out: Path, *, progress: Progress) -> dict[str, Any]:
    """Answers the prompts of a JSONL file with a recipe's verifier; returns the provenance, which is written, too.

    Raises:
        DataError: a row has no user turn, or the file cannot be read.
    """
    settings = recipe.data.regenerate or Regenerate()
    rows = read_prompts(Source(path=str(prompts.resolve())))
    section = recipe.verifier
    folder = obtain(section, progress=progress)
    engine = Engine(folder, dtype=settings.dtype or section.dtype, trust_remote_code=section.trust_remote_code)
    write_answers(out, rows, engine, settings, progress=progress)
    return dict(read_json(out.with_name(out.name + ".json")))
