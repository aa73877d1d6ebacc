"""Parses rows of data sets into conversations, or says why a row cannot be used."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping
from typing import Any

from speculators.data.layouts import read_documents, read_messages, read_tools
from speculators.data.messages import Conversation
from speculators.data.written import read_written, written_turns

NO_MESSAGES = "no messages"
NO_ANSWER = "no assistant turn"


def prompt_key(text: str) -> str:
    """Hashes a prompt without case, width and spacing, so that equal keys mean the same question."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()


def parse(row: Any, name: str) -> Conversation | str:
    """Parses a row into a conversation, or returns the reason why it cannot be used.

    Args:
        row: a dict with `messages` (role, content) or `conversations` (from, value); `id`, `category`, `tools` and
            `documents` are optional. See `layouts`.
        name: the id for a row without one.
    """
    if not isinstance(row, Mapping):
        return "not a JSON object"
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list):
        return NO_MESSAGES
    messages, tools, documents = read_messages(turns, written_turns(row)), read_tools(row), read_documents(row)
    if isinstance(messages, str):
        return messages
    if isinstance(tools, str) or isinstance(documents, str):
        return tools if isinstance(tools, str) else str(documents)
    while messages and messages[-1].role != "assistant":
        messages.pop()  # a question without an answer supervises nothing
    if not messages:
        return NO_ANSWER
    written = read_written(row, messages)
    if isinstance(written, str):
        return written
    return Conversation(
        str(row.get("id", name)),
        str(row.get("category", "")),
        tuple(messages),
        tools=tools,
        documents=documents,
        written=written,
    )


LAYOUT = 'a row is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


def reasons_text(reasons: Mapping[str, int]) -> str:
    """Writes counts by reason, largest first: "3 no assistant turn, 1 an empty message"."""
    largest_first = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in largest_first)
