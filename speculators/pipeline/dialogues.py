"""Reads the conversations whose answers the verifier writes anew, and says which of their turns those are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from speculators.data.conversations import LAYOUT, reasons_text
from speculators.data.json_rows import NOT_JSON, Unusable
from speculators.data.layouts import ROLES
from speculators.data.messages import Conversation, Message, Written
from speculators.data.sources import SourceRow, source_rows
from speculators.data.written import TOKEN_IDS, written_values
from speculators.errors import DataError
from speculators.recipe.input_sections import DataSource

# Stands for the answer that a prompt does not have yet: the one reader of conversations requires one.
PLACEHOLDER = {"role": "assistant", "content": "-"}


@attrs.frozen
class AnswerTurn:
    """Assistant messages [start, stop) of a conversation, which one answer replaces.

    Attributes:
        kept: a tool's result follows. It answers the calls of the data, so these stay in the history of later turns,
            whatever the verifier wrote instead.
    """

    start: int
    stop: int
    kept: bool


@attrs.frozen(kw_only=True)
class Reply:
    """The verifier's answer to one turn.

    Attributes:
        message: for the history of later turns.
        prompt: ids that the verifier read.
        answer: ids that it wrote.
        text: these ids decoded, special tokens included.
    """

    message: Message
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str


@attrs.frozen(kw_only=True)
class Dialogue:
    """A conversation whose answers the verifier writes, each one on the history of its own answers before.

    Attributes:
        place: file and line, or id, for messages.
        row: what the row has beside the conversation, and is kept.
        conversation: as it was read; its last message is a placeholder if the row ends with a question.
        turns: what is written anew, in order.
    """

    place: str
    row: Mapping[str, Any]
    conversation: Conversation
    turns: tuple[AnswerTurn, ...]

    @classmethod
    def of(cls, place: str, row: Mapping[str, Any], conversation: Conversation) -> Dialogue:
        """Finds the turns to write."""
        return cls(place=place, row=row, conversation=conversation, turns=tuple(_turns(conversation.messages)))

    def history(self, replies: Sequence[Message]) -> tuple[Message, ...]:
        """Lists the messages before turn `len(replies)`: those of the data, with the verifier's answers so far."""
        messages, at = list[Message](), 0
        for turn, reply in zip(self.turns, replies, strict=False):
            originals = self.conversation.messages[turn.start : turn.stop]
            messages += [*self.conversation.messages[at : turn.start], *(originals if turn.kept else [reply])]
            at = turn.stop
        return (*messages, *self.conversation.messages[at : self.turns[len(replies)].start])

    def messages_before(self, turn: int) -> tuple[Message, ...]:
        """Lists the messages of the data before a turn."""
        return self.conversation.messages[: self.turns[turn].start]

    def rewritten(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """Makes the row of the answers; it ends with the last reply if there is one for some of the turns only."""
        messages, ids, at = list[Message](), list[Written](), 0
        for turn, reply in zip(self.turns, replies, strict=False):
            originals = self.conversation.messages[turn.start : turn.stop]
            messages += self.conversation.messages[at : turn.start]
            ids.append(Written(turn=len(messages), prompt=reply.prompt, answer=reply.answer, text=reply.text))
            messages += originals if turn.kept else [attrs.evolve(reply.message, supervised=originals[0].supervised)]
            at = turn.stop
        plain = [_values(message) for message in messages]
        return {
            **self.row,
            **_context(self.conversation),
            "messages": plain,
            TOKEN_IDS: [written_values(entry) for entry in ids],
        }


def _turns(messages: Sequence[Message]) -> Iterator[AnswerTurn]:
    start = 0
    while start < len(messages):
        stop = start
        while stop < len(messages) and messages[stop].role == "assistant":
            stop += 1
        if stop > start:
            yield AnswerTurn(start, stop, kept=stop < len(messages) and messages[stop].role == "tool")
        start = stop + 1


def _values(message: Message) -> dict[str, Any]:
    """Writes a message for a file, where each field has one name."""
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        values["reasoning_content"] = message.reasoning
    if message.tool_calls:
        values["tool_calls"] = [call.to_input() for call in message.tool_calls]
    optional = {"tool_call_id": message.tool_call_id, "name": message.name, "weight": None if message.supervised else 0}
    return values | {key: value for key, value in optional.items() if value is not None}


@attrs.define
class LeftOut:
    """Counts what reading prompts leaves out.

    Attributes:
        skipped: unusable rows of data sets, by reason; files with such a row are refused.
    """

    skipped: Counter[str] = attrs.field(factory=Counter)

    def sentences(self) -> list[str]:
        """Writes a sentence for each count above zero, with its consequence."""
        if not self.skipped:
            return []
        return [f"{self.skipped.total()} rows cannot be used and get no answer: {reasons_text(self.skipped)}"]


def stream_dialogues(source: DataSource, left_out: LeftOut) -> Iterator[Dialogue]:
    """Yields the conversations of a source, with the turns that the verifier writes.

    Args:
        source: in which answers may be missing.
        left_out: counts what is not yielded.

    Raises:
        DataError: a row of a file has nothing to answer, or a data set has no usable row.
    """
    usable = 0
    for row in source_rows(source, Path()):
        dialogue = _dialogue(row, keep_row=source.is_local)
        if isinstance(dialogue, Dialogue):
            usable += 1
            yield dialogue
        elif source.is_local and (not isinstance(row.value, Unusable) or row.value.reason == NOT_JSON):
            raise DataError(f"{row.place}: {dialogue}", hint=LAYOUT)
        else:
            left_out.skipped[dialogue] += 1
    if not usable:
        rows = left_out.skipped.total()
        raise DataError(f"{source.path}: none of its {rows} rows can be used: {reasons_text(left_out.skipped)}")


def _dialogue(row: SourceRow, *, keep_row: bool) -> Dialogue | str:
    """Reads a row, whose answers may be missing; returns the reason where it has nothing to answer."""
    value, others = row.value, dict[str, Any]()
    if isinstance(value, Mapping):
        turns = value.get("messages") or value.get("conversations")
        if not isinstance(turns, list):
            return "not a JSON object with messages"
        if not any(_role(turn) == "user" for turn in turns):
            return "no user turn to answer"
        key = "messages" if value.get("messages") else "conversations"
        others = {name: part for name, part in value.items() if name not in ("messages", "conversations", TOKEN_IDS)}
        unanswered = [] if _role(turns[-1]) == "assistant" else [PLACEHOLDER]
        row = attrs.evolve(row, name=row.place, value={**others, key: [*turns, *unanswered]})
    parsed = row.conversation()
    if isinstance(parsed, str):
        return parsed
    if parsed.text is not None:
        return "plain text has no turns to answer"
    # The rows of a data set, or of a table, may hold what JSON cannot.
    kept = others if keep_row and _is_json(others) else {"id": parsed.id, "category": parsed.category}
    return Dialogue.of(row.place, kept, parsed)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _context(conversation: Conversation) -> dict[str, Any]:
    """The tools and documents of a conversation, as plain values."""
    shown = {"tools": conversation.tools, "documents": conversation.documents}
    return {key: json.loads(json.dumps(value)) for key, value in shown.items() if value}


def _role(turn: Any) -> str | None:
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    return ROLES.get(role) if isinstance(role, str) else None
