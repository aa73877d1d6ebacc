"""Reads turns, tools and documents of a row, in the layouts in which data sets keep them, or says what is wrong.

The OpenAI layout has role, content, tool_calls and reasoning; ShareGPT has from and value, with calls and results as
turns of their own; Hermes writes calls, results and tools into ShareGPT's texts, between tags.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attrs

from speculators.data.messages import Message, ToolCall

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
BAD_CALL = "a tool call has no name, or arguments that are not a JSON object"
BAD_TOOLS = "its tools are not a list of JSON objects"
BAD_DOCUMENTS = "its documents are not a list of texts or JSON objects"
NOT_TEXT = "a message is not text"
EMPTY = "an empty message"

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_RESPONSE = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
# The prompt with which Hermes explains its tools and its tags; templates have an explanation of their own.
_HERMES = re.compile(r"function calling AI model.*?<tools>\s*(.*?)\s*</tools>", re.DOTALL)


def read_messages(turns: Sequence[Any], written: Collection[int] = ()) -> list[Message] | str:
    """Reads the turns of a row, or returns the reason why it cannot be used.

    Args:
        turns: the row's.
        written: those that came with ids; a verifier may end its answer at once, and say nothing.
    """
    messages: list[Message] = []
    for index, turn in enumerate(turns):
        read = _turn(turn)
        if read == EMPTY and index in written:
            read = [Message("assistant", "")]
        if isinstance(read, str):
            return read
        messages += read
    return _linked(messages)


def read_tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | str:
    """Reads what the assistant may call: `tools` or `functions`, as a list or as JSON, or a Hermes prompt's list."""
    value = row.get("tools") or row.get("functions")
    turns = row.get("conversations")
    if not value and isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
        hermes = _HERMES.search(str(turns[0].get("value")))
        value = hermes[1] if hermes else None
    if not value:
        return ()
    tools = _parsed(value) if isinstance(value, str) else value
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        return BAD_TOOLS
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def read_documents(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | str:
    """Reads what a retrieval template shows: `documents`, as texts or as objects."""
    documents = row.get("documents") or ()
    if not isinstance(documents, (list, tuple)) or not all(isinstance(each, (str, Mapping)) for each in documents):
        return BAD_DOCUMENTS
    return tuple({"text": each} if isinstance(each, str) else each for each in documents)


def _turn(turn: Any) -> list[Message] | str:
    """Reads one entry of a row's turns; Hermes' results of several calls are one entry and several turns."""
    if not isinstance(turn, Mapping):
        return "a message is not an object"
    name = turn.get("role", turn.get("from"))
    if not isinstance(name, str) or name not in ROLES:
        return f"unknown role {str(name)[:20]!r}"
    if "role" in turn:
        return _openai(turn, ROLES[name])
    return _sharegpt(turn.get("value"), name, turn)


def _openai(turn: Mapping[str, Any], role: str) -> list[Message] | str:
    content = _text(turn.get("content"))
    calls = _calls(turn)
    if content is None:
        return NOT_TEXT
    if isinstance(calls, str):
        return calls
    text, thought = content
    return _checked(_with_extras(Message(role, text, tool_calls=calls, reasoning=thought), turn))


def _sharegpt(value: Any, name: str, turn: Mapping[str, Any]) -> list[Message] | str:
    content = _text(value)
    if content is None:
        return NOT_TEXT
    text, role = content[0], ROLES[name]
    if role == "system" and _HERMES.search(text):
        return []
    if role == "tool" and (responses := _RESPONSE.findall(text)):
        return [Message("tool", response) for response in responses]
    texts = [text] if name in CALLS else _CALL.findall(text) if role == "assistant" else []
    calls = [call for each in texts for call in _calls_of(_parsed(each))]
    if name in CALLS and not calls:
        return BAD_CALL
    if calls:
        text = "" if name in CALLS else _CALL.sub("", text).strip()
    return _checked(_with_extras(Message(role, text, tool_calls=tuple(calls)), turn))


def _with_extras(message: Message, turn: Mapping[str, Any]) -> Message:
    """Adds the fields that both layouts may have."""
    thoughts = [turn[key] for key in REASONING_FIELDS if isinstance(turn.get(key), str) and turn[key].strip()]
    texts = {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    reasoning = thoughts[0] if thoughts else message.reasoning
    return attrs.evolve(message, reasoning=reasoning, supervised=turn.get("weight") not in (0, 0.0), **texts)


def _checked(message: Message) -> list[Message] | str:
    says = message.content.strip() or message.tool_calls or message.reasoning or message.role == "tool"
    return [message] if says else EMPTY


def _text(content: Any) -> tuple[str, str | None] | None:
    """Reads a content of null, text or text parts as (text, reasoning); None if it has anything else."""
    if content is None:
        return "", None
    if isinstance(content, str):
        return content, None
    if not isinstance(content, list):
        return None
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text", part.get(kind)) if isinstance(part, Mapping) else part
        if kind not in ("text", "thinking", "reasoning") or not isinstance(text, str):
            return None
        (texts if kind == "text" else thoughts).append(text)
    # Servers join the parts of a text in this way.
    return "\n".join(texts), "\n".join(thoughts) or None


def _calls(turn: Mapping[str, Any]) -> tuple[ToolCall, ...] | str:
    values = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if not isinstance(values, Sequence) or isinstance(values, str):
        return BAD_CALL
    calls = [_call(value) for value in values]
    return BAD_CALL if None in calls else tuple(call for call in calls if call is not None)


def _calls_of(value: Any) -> list[ToolCall]:
    calls = [_call(each) for each in (value if isinstance(value, list) else [value])]
    return [] if None in calls else [call for call in calls if call is not None]


def _call(value: Any) -> ToolCall | None:
    """Reads a call, with or without the object `function` around its name and arguments."""
    if not isinstance(value, Mapping):
        return None
    function = value["function"] if isinstance(value.get("function"), Mapping) else value
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _parsed(arguments) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
        return None
    return ToolCall(name=name, arguments=arguments, id=value["id"] if isinstance(value.get("id"), str) else None)


def _parsed(text: str) -> Any:
    """Reads JSON, one object a line, or what Python prints, as some data sets have it; None for anything else."""
    for read in (json.loads, ast.literal_eval, lambda lines: [json.loads(line) for line in lines.splitlines()]):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _linked(messages: Sequence[Message]) -> list[Message]:
    """Gives results without an id that of the call that they answer, in their order.

    They get no name: servers do not give one either, and some templates would print it.
    """
    open_calls: list[str | None] = []
    linked = []
    for message in messages:
        if message.tool_calls:
            open_calls = [call.id for call in message.tool_calls]
        if message.role == "tool" and open_calls:
            answered = open_calls.pop(0)
            message = attrs.evolve(message, tool_call_id=message.tool_call_id or answered)
        linked.append(message)
    return linked
