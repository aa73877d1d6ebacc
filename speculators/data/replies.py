"""Turns the text that a verifier wrote into the message that a server would return for it, for the turns after it.

What is trained on are the ids (`Written`); this text is read by people, and by the chat template where the answer is
history. No parser knows every model's format: reasoning is recognised by its marks, the channels of gpt-oss by theirs.
Everything else, tool calls of an answer included, stays in the content as it was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

import attrs
import jinja2

from speculators.data.messages import Message, ToolCall
from speculators.data.template import ChatTemplate
from speculators.data.written import exact_text

# How models open and close their reasoning. A template may write the opening mark itself, at the end of the prompt.
REASONING_MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
# One message of gpt-oss's format: to whom, in which channel, with which text.
CHANNEL = re.compile(
    r"(?:<\|start\|>assistant)?(?P<to>[^<]*)<\|channel\|>(?P<channel>\w+)(?P<header>.*?)<\|message\|>(?P<text>.*?)"
    r"(?:<\|end\|>|<\|call\|>|<\|return\|>|$)",
    re.DOTALL,
)
# What is left of a message that was cut before its text.
CUT = re.compile(r"(?:<\|start\|>assistant)?[^<]*(?:<\|channel\|>[^<]*(?:<\|constrain\|>[^<]*)?)?$")
FUNCTION = re.compile(r"to=functions\.([\w.-]+)")
# Tokens at the end of a prompt, among which are those that open the reasoning.
PROMPT_END = 16
_MARK = "reasoning-of-an-answer"


@attrs.frozen
class AnswerReader:
    """Reads answers for one chat template.

    Attributes:
        reasons: the template reads reasoning from a field of its own; otherwise reasoning stays in the content, from
            which such templates cut it themselves, if they do.
    """

    reasons: bool

    @classmethod
    def of(cls, template: ChatTemplate) -> AnswerReader:
        """Tries whether the reasoning of a message reaches the template's text."""
        turns = (Message("user", "question"), Message("assistant", "answer", reasoning=_MARK))
        try:
            return cls(_MARK in template.render(turns))
        except jinja2.TemplateError:
            return cls(False)

    def read(self, tokenizer: Any, prompt: Sequence[int], answer: Sequence[int], stop_ids: Collection[int]) -> Message:
        """Reads the ids of an answer, of which the last may be one that ends answers."""
        spoken = answer[:-1] if answer[-1] in stop_ids else answer
        return self.message(exact_text(tokenizer, spoken), prompt=exact_text(tokenizer, prompt[-PROMPT_END:]))

    def message(self, text: str, *, prompt: str = "") -> Message:
        """Reads an answer.

        Args:
            text: the answer as it was written, special tokens included, without the token that ended it.
            prompt: the text before it, which may have opened the reasoning.
        """
        if "<|channel|>" in text:
            return _from_channels(text)
        if self.reasons:
            for opening, closing in REASONING_MARKS:
                opened = text.lstrip().startswith(opening) or prompt.rstrip().endswith(opening)
                if opened or closing in text:
                    reasoning, _, content = text.partition(closing)
                    return _message(content, reasoning.lstrip().removeprefix(opening))
        return Message("assistant", text)


def _from_channels(text: str) -> Message:
    if not CUT.fullmatch(CHANNEL.sub("", text)):
        return Message("assistant", text)
    reasoning, content, calls = [], [], []
    for part in CHANNEL.finditer(text):
        function = FUNCTION.search(part["to"] + part["header"])
        if part["channel"] == "analysis":
            reasoning.append(part["text"])
        elif function and (arguments := _arguments(part["text"])) is not None:
            calls.append(ToolCall(name=function[1], arguments=arguments))
        else:
            content.append(part["text"])
    return attrs.evolve(_message("\n".join(content), "\n".join(reasoning)), tool_calls=tuple(calls))


def _arguments(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _message(content: str, reasoning: str = "") -> Message:
    # Templates write the line breaks around both themselves.
    return Message("assistant", content.strip(), reasoning=reasoning.strip() or None)
