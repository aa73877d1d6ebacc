"""Benchmark prompts, from a suite of the catalogue, a JSONL file in either layout, or a dataset's hub id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.data.conversations import parse
from speculators.data.json_rows import Unusable
from speculators.data.messages import Conversation, Message, Written
from speculators.data.sources import SourceRow, source_rows
from speculators.data.template import ChatTemplate
from speculators.errors import DataError
from speculators.recipe.catalog import resolved_suite, suite_names
from speculators.recipe.fingerprint import fingerprint
from speculators.recipe.input_sections import DataSource
from speculators.recipe.schema import Suite
from speculators.registry import near_miss

NO_QUESTION = "text as it stands has no question to answer"
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
        written: the ids of that answer, as a verifier wrote them, and of its prompt; None if there is only text.
        later: the user turns that follow, each after the verifier's own answer to the one before.
        tools: what the verifier may call.
        documents: what a retrieval template shows.
    """

    id: str
    category: str
    messages: tuple[Message, ...]
    answer: Message | None = None
    written: Written | None = None
    later: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    documents: tuple[Mapping[str, Any], ...] = ()

    def ids(self, template: ChatTemplate, history: Sequence[Message] = ()) -> list[int]:
        """Tokenizes the first prompt, or a later one with the whole history before it.

        Raises:
            DataError: the chat template refuses it.
        """
        messages = history or self.messages
        return template.prompt_ids(messages, tools=self.tools, documents=self.documents)

    @property
    def conversation(self) -> Conversation:
        """The prompt with the suite's own answer, of which alone is supervised; there must be one."""
        assert self.answer is not None
        asked = tuple(attrs.evolve(message, supervised=False) for message in self.messages)
        answer = attrs.evolve(self.answer, supervised=True)
        written = () if self.written is None else (attrs.evolve(self.written, turn=len(asked)),)
        return Conversation(
            self.id,
            self.category,
            (*asked, answer),
            tools=self.tools,
            documents=self.documents,
            written=written,
        )


def load_suite(suite: Suite) -> list[Prompt]:
    """Loads a suite's prompts.

    Every row must be usable: a suite that silently shrinks is a different suite.

    Args:
        suite: a name of the catalogue, a path or a hub id; `split` and `take` override the catalogue's.

    Raises:
        DataError: there is no such suite, or a row, which the error names, cannot be used.
    """
    source = _locate(suite)
    prompts = [_prompt(row) for row in source_rows(source, Path())]
    if not prompts:
        raise DataError(f"suite {suite.name}: no prompt in {source.path}", hint=LAYOUTS)
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        raise DataError(f"suite {suite.name}: the id {next(i for i in ids if ids.count(i) > 1)!r} occurs twice")
    return prompts


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Hashes prompts to 64 hex digits; equal digests mean equal prompts."""
    return fingerprint({"prompts": [_plain(prompt) for prompt in prompts]})


def _plain(prompt: Prompt) -> dict[str, Any]:
    """The values of a prompt that its digest covers; those that it lacks leave the digest as it was without them."""
    answer = None if prompt.answer is None else prompt.answer.to_input()
    only_text = answer is not None and answer.keys() == {"role", "content"}
    values = {
        "id": prompt.id,
        "category": prompt.category,
        "messages": [message.to_input() for message in prompt.messages],
        "answer": answer["content"] if answer and only_text else answer,
        "later": prompt.later,
    }
    optional = {
        "written": None if prompt.written is None else attrs.asdict(prompt.written),
        "tools": prompt.tools,
        "documents": prompt.documents,
    }
    return values | {key: value for key, value in optional.items() if value}


def _locate(suite: Suite) -> DataSource:
    if suite.path is None and suite.name not in suite_names():
        hint = near_miss(suite.name, suite_names()) or f"available: {', '.join(suite_names())}; your own needs a path"
        raise DataError(f"no suite {suite.name!r}", hint=hint)
    return resolved_suite(suite).source


def _prompt(source_row: SourceRow) -> Prompt:
    """Reads a row; raises DataError that names one which cannot be used."""
    row, place = source_row.value, source_row.place
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: {row.reason if isinstance(row, Unusable) else NO_QUESTION}", hint=LAYOUTS)
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise DataError(f"{place}: turns must be a list of questions", hint=LAYOUTS)
        first, *later = turns
        messages = (Message("user", first),)
        name = str(row.get("id", row.get("question_id", source_row.name)))
        return Prompt(id=name, category=str(row.get("category", "")), messages=messages, later=tuple(later))
    messages = row.get("messages", [])
    unanswered = isinstance(messages, list) and isinstance(messages[-1:], list) and _waits(messages[-1:])
    # The one reader of conversations checks their form. It demands an answer, so a prompt without one gets a stand-in.
    checked = {**row, "messages": [*messages, {"role": "assistant", "content": "-"}]} if unanswered else row
    conversation = parse(checked, source_row.name)
    if isinstance(conversation, str):
        raise DataError(f"{place}: {conversation}", hint=LAYOUTS)
    prompt = _split(conversation)
    return attrs.evolve(prompt, answer=None, written=None) if unanswered else prompt


def _waits(last: list[Any]) -> bool:
    """Whether a conversation ends with something to answer."""
    return bool(last) and isinstance(last[0], dict) and last[0].get("role") in ("user", "tool")


def _split(conversation: Conversation) -> Prompt:
    """Takes the last turn as the answer to all before it."""
    *messages, answer = conversation.messages
    written = next((each for each in conversation.written if each.turn == len(messages)), None)
    return Prompt(
        id=conversation.id,
        category=conversation.category,
        messages=tuple(messages),
        answer=answer,
        written=written,
        tools=conversation.tools,
        documents=conversation.documents,
    )
