"""A conversation as data sets, chat templates and servers exchange it: turns, tools, and the ids a verifier wrote."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from attrs import field


@attrs.frozen(kw_only=True)
class ToolCall:
    """A function that the assistant asks for.

    Attributes:
        name: of the function.
        arguments: by name, parsed: chat templates write them as JSON themselves.
        id: which a tool's answer refers to; None if the row has none.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None

    def to_input(self) -> dict[str, Any]:
        """Writes the call in the OpenAI layout, which chat templates read."""
        identity = {} if self.id is None else {"id": self.id}
        return {**identity, "type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}


@attrs.frozen
class Message:
    """One turn.

    Attributes:
        role: "system", "developer", "user", "assistant" or "tool".
        content: its text; "" where the row has null.
        reasoning: what the assistant thought before the answer, if the row keeps it apart.
        tool_calls: what the assistant calls.
        tool_call_id: the call that a tool's turn answers.
        name: of the tool that answers, or of the speaker.
        supervised: false if the row gives the turn weight 0.
    """

    role: str
    content: str
    reasoning: str | None = field(default=None, kw_only=True)
    tool_calls: tuple[ToolCall, ...] = field(default=(), kw_only=True)
    tool_call_id: str | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    supervised: bool = field(default=True, kw_only=True)

    def with_reasoning_apart(self) -> Message:
        """Moves reasoning that stands in the content, between tags, to its own field."""
        if self.reasoning is not None or self.role != "assistant" or "</think>" not in self.content:
            return self
        thought, _, body = self.content.partition("</think>")
        return attrs.evolve(self, content=body.strip(), reasoning=thought.replace("<think>", "").strip())

    def to_input(self) -> dict[str, Any]:
        """Writes the turn for a chat template, with each field that it has, under every name that templates read."""
        values: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            # Qwen, GLM and DeepSeek read the first name, gpt-oss the second.
            values |= {"reasoning_content": self.reasoning, "thinking": self.reasoning}
        if self.tool_calls:
            values["tool_calls"] = [call.to_input() for call in self.tool_calls]
        optional = {"tool_call_id": self.tool_call_id, "name": self.name}
        return values | {key: value for key, value in optional.items() if value is not None}


def turn_inputs(messages: Sequence[Message], template: str, *, arguments_as_text: bool = False) -> list[dict[str, Any]]:
    """Writes turns for a chat template, in the ways in which templates differ from each other.

    Args:
        template: the Jinja text. Mistral's refuses ids of calls that do not have nine characters; most have no
            "developer"; some read reasoning from its own field alone.
        arguments_as_text: DeepSeek's adds a call's arguments to its text, as JSON that was written before.
    """
    if "developer" not in template:
        messages = [attrs.evolve(each, role="system") if each.role == "developer" else each for each in messages]
    if re.search(r"[.'\"]thinking|reasoning_content", template):
        messages = [each.with_reasoning_apart() for each in messages]
    inputs = [message.to_input() for message in messages]
    short = re.search(r"length\s*!=\s*9", template) is not None
    names: list[str] = []
    for turn in inputs:
        if short and turn["role"] == "tool":
            turn["tool_call_id"] = _nine(turn.get("tool_call_id", names.pop(0) if names else "none"))
        for call in turn.get("tool_calls", ()):
            if short:
                names.append(call.get("id", call["function"]["name"]))
                call["id"] = _nine(names[-1])
            if arguments_as_text:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return inputs


def _nine(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9]{9}", name) else hashlib.sha256(name.encode()).hexdigest()[:9]


@attrs.frozen(kw_only=True)
class Written:
    """An answer as the verifier wrote it: the exact ids of its prompt and answer, end-of-turn token included.

    Attributes:
        turn: index of the answer in `Conversation.messages`.
        prompt: [n] ids that the verifier read.
        answer: [m] ids that it wrote.
        text: the answer's ids decoded, special tokens included, which tells a file of another tokenizer; None if the
            row has none.
    """

    turn: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    text: str | None = None


@attrs.frozen
class Conversation:
    """Turns that end with the assistant, and what they refer to.

    Attributes:
        id: unique in its source.
        category: "" where the source has none.
        messages: the turns, in order.
        tools: what the assistant may call, as JSON schemas in the OpenAI layout.
        documents: what a retrieval template shows.
        written: answers as the verifier wrote them, in order; empty for conversations that exist as text only.
        text: plain text instead of messages, which is trained on as it stands; None for a conversation.
    """

    id: str
    category: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = field(default=(), kw_only=True)
    documents: tuple[Mapping[str, Any], ...] = field(default=(), kw_only=True)
    written: tuple[Written, ...] = field(default=(), kw_only=True)
    text: str | None = field(default=None, kw_only=True)

    @property
    def prompt(self) -> str:
        """The first user turn, or the first turn of a conversation without one; of plain text, all of it."""
        if self.text is not None:
            return self.text
        return next((message.content for message in self.messages if message.role == "user"), self.messages[0].content)

    def training_on(self, choice: str | Sequence[int]) -> Conversation:
        """Leaves only the chosen answers supervised: "all", "last", or their places, from 0 on or from -1 back."""
        if choice == "all":
            return self
        answers = [index for index, message in enumerate(self.messages) if message.role == "assistant"]
        places = choice if not isinstance(choice, str) else [-1]
        chosen = {answers[place] for place in places if -len(answers) <= place < len(answers)}
        messages = [
            message if index in chosen else attrs.evolve(message, supervised=False)
            for index, message in enumerate(self.messages)
        ]
        return attrs.evolve(self, messages=tuple(messages))
