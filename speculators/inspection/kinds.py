"""What conversations consist of beside text: reasoning, tools, calls, documents; and which of it a template drops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jinja2

from speculators.data.messages import Conversation, Message, ToolCall
from speculators.data.template import ChatTemplate

REASONING, TOOLS, CALLS, RESULTS, DOCUMENTS = "reasoning", "tools", "tool calls", "tool results", "documents"
EARLIER_REASONING = "reasoning of earlier turns"
# The answers came with the ids that a verifier wrote.
IDS = "token ids"
ALL = (REASONING, EARLIER_REASONING, TOOLS, CALLS, RESULTS, DOCUMENTS, IDS)

THINK = ("<think>", "</think>")
_MARK = "qzxmarkxzq"


def reasons(message: Message) -> bool:
    """Whether a turn has reasoning, in a field of its own or in its content."""
    inside = any(mark in message.content for mark in THINK)
    return message.role == "assistant" and (message.reasoning is not None or inside)


def kinds_of(conversation: Conversation) -> Iterator[str]:
    """Yields what a conversation has."""
    messages = conversation.messages
    thinking = [reasons(message) for message in messages]
    last = max((index for index, message in enumerate(messages) if message.role == "user"), default=0)
    has = {
        REASONING: any(thinking),
        EARLIER_REASONING: any(thinking[:last]),
        TOOLS: bool(conversation.tools),
        CALLS: any(message.tool_calls for message in messages),
        RESULTS: any(message.role == "tool" for message in messages),
        DOCUMENTS: bool(conversation.documents),
        IDS: bool(conversation.written),
    }
    yield from (kind for kind, present in has.items() if present)


def dropped_kinds(template: ChatTemplate) -> tuple[str, ...]:
    """Lists what the template leaves out or refuses: each kind is rendered once, with a mark in it."""
    return tuple(kind for kind, conversation in _marked().items() if not _shows_mark(template, conversation))


def _marked() -> Mapping[str, Conversation]:
    """A conversation for each kind, with the mark in that kind alone."""
    question, answer = Message("user", "question"), Message("assistant", "answer")
    thought = Message("assistant", "answer", reasoning=_MARK)

    def call(name: str) -> Message:
        return Message("assistant", "", tool_calls=(ToolCall(name=name, arguments={"a": "b"}, id="call000000"),))

    def tool(name: str) -> dict[str, object]:
        empty = {"type": "object", "properties": {}}
        return {"type": "function", "function": {"name": name, "description": name, "parameters": empty}}

    def talk(*messages: Message, tools: str | None = None, documents: str | None = None) -> Conversation:
        paper = {"title": documents, "text": documents}
        return Conversation(
            "", "", messages, tools=(tool(tools),) if tools else (), documents=(paper,) if documents else ()
        )

    result = Message("tool", _MARK, tool_call_id="call000000", name="f")
    return {
        REASONING: talk(question, thought),
        EARLIER_REASONING: talk(question, thought, question, answer),
        TOOLS: talk(question, answer, tools=_MARK),
        CALLS: talk(question, call(_MARK), tools="f"),
        RESULTS: talk(question, call("f"), result, answer, tools="f"),
        DOCUMENTS: talk(question, answer, documents=_MARK),
    }


def _shows_mark(template: ChatTemplate, conversation: Conversation) -> bool:
    tools, documents = conversation.tools, conversation.documents
    try:
        return _MARK in template.render(conversation.messages, tools=tools, documents=documents)
    except jinja2.TemplateError:
        return False


def kind_spans(text: str, conversation: Conversation) -> list[tuple[int, int, str]]:
    """Locates reasoning, calls and results of a conversation in its rendered text, as (start, end, kind) in order."""
    spans, at = list[tuple[int, int, str]](), 0
    for message in conversation.messages:
        for kind, parts in _parts(message):
            places = []
            for part in parts:
                start = text.find(part, at)
                if start >= 0:
                    places += [start, start + len(part)]
                    at = places[-1]
            if places:
                spans.append((places[0], places[-1], kind))
    return spans


def _parts(message: Message) -> Iterator[tuple[str, list[str]]]:
    """Yields the texts of each kind in a turn, in the order in which templates show them."""
    if message.reasoning and message.reasoning.strip():
        yield REASONING, [message.reasoning.strip()]
    for call in message.tool_calls:
        values = [value for value in call.arguments.values() if isinstance(value, str) and value]
        yield CALLS, [call.name, *values]
    if message.role == "tool" and message.content.strip():
        yield RESULTS, [message.content.strip()]
