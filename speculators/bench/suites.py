"""Benchmark prompts, from a suite of the catalogue, a JSONL file in either layout, or a dataset's hub id."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.data.conversations import parse
from speculators.data.json_rows import NOT_JSON, Unusable
from speculators.data.messages import Message
from speculators.data.sources import read_source, source_rows
from speculators.errors import DataError
from speculators.recipe.catalog import resolved_suite, suite_names
from speculators.recipe.fingerprint import fingerprint
from speculators.recipe.input_sections import DataSource, is_data_path
from speculators.recipe.schema import Suite
from speculators.registry import near_miss

LAYOUTS = (
    'a row is {"messages": [...]} with roles and contents, the last assistant turn being the answer, '
    'or {"question_id": .., "category": .., "turns": ["first question", ..]}'
)


@attrs.frozen(kw_only=True)
class Prompt:
    """One question of a suite.

    Attributes:
        id: unique in its suite.
        category: "" where the suite has none.
        messages: the verifier's input for its first answer.
        answer: the suite's own answer, used as far as it is the verifier's own output; None: generate one.
        later: the user turns that follow, each after the verifier's own answer to the one before.
    """

    id: str
    category: str
    messages: tuple[Message, ...]
    answer: str | None = None
    later: tuple[str, ...] = ()


def load_suite(suite: Suite) -> list[Prompt]:
    """Loads a suite's prompts.

    Every row must be usable: a suite that silently shrinks is a different suite.

    Args:
        suite: a name of the catalogue, a path or a hub id; `split` and `take` override the catalogue's.

    Raises:
        DataError: there is no such suite, or a row, which the error names, cannot be used.
    """
    source = _locate(suite)
    if not source.is_local:
        conversations, skipped = read_source(source, Path())
        if skipped:
            raise DataError(f"suite {suite.name}: {skipped.total()} rows cannot be used: {dict(skipped)}", hint=LAYOUTS)
        prompts = [Prompt(id=c.id, category=c.category, **_parts(c.messages)) for c in conversations]
    else:
        prompts = [_prompt(row, place) for place, row in _rows(source)]
    if not prompts:
        raise DataError(f"suite {suite.name}: no prompt in {source.path}", hint=LAYOUTS)
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        raise DataError(f"suite {suite.name}: the id {next(i for i in ids if ids.count(i) > 1)!r} occurs twice")
    return prompts


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Hashes prompts to 64 hex digits; equal digests mean equal prompts."""
    plain = [
        {**attrs.asdict(prompt, recurse=False), "messages": [message.to_input() for message in prompt.messages]}
        for prompt in prompts
    ]
    return fingerprint({"prompts": plain})


def _locate(suite: Suite) -> DataSource:
    if suite.path is None and suite.name not in suite_names():
        hint = near_miss(suite.name, suite_names()) or f"available: {', '.join(suite_names())}; your own needs a path"
        raise DataError(f"no suite {suite.name!r}", hint=hint)
    resolved = resolved_suite(suite)
    path = str(resolved.path)
    if is_data_path(path):
        path = str(Path(path).expanduser())
    return DataSource(path=path, split=resolved.split, take=resolved.take)


def _rows(source: DataSource) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (file:line, row) for each row of the split; raises DataError that names a row which cannot be used."""
    for row in source_rows(source, Path()):
        if isinstance(row.value, Mapping):
            yield row.place, row.value
        else:
            reason = row.value.reason if isinstance(row.value, Unusable) else NOT_JSON
            raise DataError(f"{row.place}: {reason}", hint=LAYOUTS)


def _prompt(row: Mapping[str, Any], place: str) -> Prompt:
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise DataError(f"{place}: turns must be a list of questions", hint=LAYOUTS)
        first, *later = turns
        messages = (Message("user", first),)
        name = str(row.get("question_id", place))
        return Prompt(id=name, category=str(row.get("category", "")), messages=messages, later=tuple(later))
    messages = row.get("messages", [])
    unanswered = isinstance(messages, list) and isinstance(messages[-1:], list) and _is_user(messages[-1:])
    # The one reader of conversations checks their form. It demands an answer, so a prompt without one gets a stand-in.
    checked = {**row, "messages": [*messages, {"role": "assistant", "content": "-"}]} if unanswered else row
    conversation = parse(checked, place)
    if isinstance(conversation, str):
        raise DataError(f"{place}: {conversation}", hint=LAYOUTS)
    parts = _parts(conversation.messages)
    if unanswered:
        parts["answer"] = None
    return Prompt(id=conversation.id, category=conversation.category, **parts)


def _is_user(last: list[Any]) -> bool:
    return bool(last) and isinstance(last[0], dict) and last[0].get("role") == "user"


def _parts(messages: tuple[Message, ...]) -> dict[str, Any]:
    return {"messages": messages[:-1], "answer": messages[-1].content}
