"""Finds what the verifier writes in an assistant's turn: the text after the turn's prompt, with the token that ends it.

The turn is rendered once more with marks in place of its reasoning, content and arguments. They show what the template
keeps, and what it puts after the answer. The answer's own words are never searched for: those of a short answer may
stand in the scaffolding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import attrs
import jinja2

from speculators.data.messages import Message

REWRITES_HISTORY = "the chat template does not show an answer after its prompt"
REWRITES_ANSWER = "the chat template drops or rewrites part of an answer"
DROPS_REASONING = "the chat template drops the reasoning of an answer"
DROPS_CALLS = "the chat template drops the tool calls of an answer"

# No conversation contains these; letters and digits pass every template unchanged.
REASONING, CONTENT, NEIGHBOUR, NAME = (f"qzx{name}xzq" for name in ("reasoning", "content", "neighbour", "name"))
# A number, because JSON closes a text with a quotation mark, which the real argument may not have.
ARGUMENT = 918273645564738291

# A block of reasoning that a template leaves empty in the answered turn.
_EMPTY = re.compile(r"(\s*[<\[◁][\w:]*think[>\]▷])(\s*)([<\[◁]/[\w:]*think[>\]▷])", re.IGNORECASE)
# What a prompt may open for the answer to close: "<think>\n", "<seed:think>", "[THINK]".
_OPENER = re.compile(r"([<\[◁])([\w:]*think)([>\]▷])(\s*)\Z", re.IGNORECASE)


class Render(Protocol):
    """Renders turns of one conversation; with `prompt`, up to where the assistant's next answer starts."""

    def __call__(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Raises jinja2.TemplateError if the template refuses them."""


@attrs.frozen
class Turn:
    """An assistant's turn as text.

    Attributes:
        text: the prompt as it is served, what the verifier writes, and what the template puts after that.
        start: where the verifier begins to write.
        end: where it stops: after the token that ends the turn, if the template has one.
    """

    text: str
    start: int
    end: int


def locate_turn(render: Render, messages: Sequence[Message], special: re.Pattern[str]) -> Turn | str:
    """Locates the last of the messages, an assistant's turn, or returns the reason why that is impossible.

    Args:
        special: matches the text of one special token.

    Raises:
        jinja2.TemplateError: the template refuses the conversation.
    """
    *history, turn = messages
    marked, mark = _marked(turn)
    shown = render([*history, marked])
    inline, thought, body = _parts(turn)
    if reason := _dropped(turn, shown, mark):
        return reason
    tail = shown.rpartition(mark)[2]
    prompt, text = render(history, prompt=True), render(messages)
    if not text.endswith(tail) or not (turn.tool_calls or text.removesuffix(tail).rstrip().endswith(body.strip())):
        return REWRITES_ANSWER
    hidden = "" if REASONING in shown else thought.strip()
    kept = hidden if opened(prompt) else ""
    answer = _after_prompt(prompt, text, kept)
    if answer is None:
        answer = _after_neighbour(render, history, turn, prompt, kept)
    if hidden and not kept:
        if empty := _EMPTY.match(answer or ""):
            lines = "\n" if empty[2] else ""
            answer = f"{empty[1]}{lines}{hidden}{lines}{(answer or '')[empty.start(3) :]}"
        elif inline:
            # As a server returns it if nothing separates the reasoning: these are the verifier's own words.
            answer = turn.content.strip() + tail
        else:
            return DROPS_REASONING
    if answer is None or not answer.endswith(tail):
        return REWRITES_HISTORY
    ending = _ending(render, [*history, marked], mark, tail, special)
    written = prompt + answer.removesuffix(tail) + ending
    return Turn(written + (tail.removeprefix(ending) if tail.startswith(ending) else ""), len(prompt), len(written))


def dropped_part(render: Render, messages: Sequence[Message]) -> str | None:
    """Returns the reason if the template does not show all that the last of the messages, an assistant's, says."""
    *history, turn = messages
    marked, mark = _marked(turn)
    shown = render([*history, marked])
    hidden = _parts(turn)[1].strip() and REASONING not in shown
    return _dropped(turn, shown, mark) or (DROPS_REASONING if hidden else None)


def opened(prompt: str) -> bool:
    """Whether a prompt opens a block of reasoning, which the answer has to close."""
    return _OPENER.search(prompt) is not None


def header(prompt: str) -> str:
    """The prompt without the block of reasoning that it may open."""
    return _OPENER.sub("", prompt)


def _parts(turn: Message) -> tuple[bool, str, str]:
    """Splits a turn into (whether the reasoning stands in its content, the reasoning, the content without it)."""
    if turn.reasoning is None and "</think>" in turn.content:
        thought, _, body = turn.content.partition("</think>")
        return True, thought.replace("<think>", ""), body
    return False, turn.reasoning or "", turn.content


def _marked(turn: Message) -> tuple[Message, str]:
    """Replaces what the assistant says in a turn by marks; returns the turn, and the mark that comes last."""
    inline, thought, body = _parts(turn)
    content = CONTENT if body.strip() or not turn.tool_calls else turn.content
    content = f"<think>\n{REASONING}\n</think>\n\n{content}" if inline else content
    turn = attrs.evolve(turn, content=content, reasoning=turn.reasoning if inline or not thought.strip() else REASONING)
    if not turn.tool_calls:
        return turn, CONTENT
    call = turn.tool_calls[-1]
    call = attrs.evolve(call, arguments={"x": ARGUMENT}) if call.arguments else attrs.evolve(call, name=NAME)
    return attrs.evolve(turn, tool_calls=(*turn.tool_calls[:-1], call)), str(ARGUMENT) if call.arguments else NAME


def _dropped(turn: Message, shown: str, mark: str) -> str | None:
    """Returns the reason if the template does not show all that the assistant says, reasoning apart."""
    if turn.tool_calls and not all(call in shown for call in (*(call.name for call in turn.tool_calls[:-1]), mark)):
        return DROPS_CALLS
    spoken = _parts(turn)[2].strip() or not turn.tool_calls
    return REWRITES_ANSWER if spoken and CONTENT not in shown else None


def _after_prompt(prompt: str, text: str, hidden: str) -> str | None:
    """Takes from a rendered turn what follows its prompt; None if it does not follow.

    An answer may begin inside the prompt: a block of reasoning that the prompt opens may look different in the turn, or
    be missing there. Then it is written as models write it.

    Args:
        hidden: reasoning that the template does not show.
    """
    opener = _OPENER.search(prompt)
    if text.startswith(prompt):
        return hidden + text.removeprefix(prompt)
    base = prompt.rstrip() if opener is None else prompt[: opener.start()]
    if not text.startswith(base):
        return None
    rest = text.removeprefix(base).lstrip()
    if opener is None:
        return rest
    left, name, right, space = opener.groups()
    if rest.startswith(left + name + right):
        return hidden + rest.removeprefix(left + name + right).lstrip()
    closer = f"{left}/{name}{right}"
    if rest.startswith(closer):
        return hidden + rest
    return hidden + ("\n" if space else "") + f"{closer}\n\n{rest}"


def _after_neighbour(render: Render, history: Sequence[Message], turn: Message, prompt: str, hidden: str) -> str | None:
    """Does the same where the template shows an answered turn's history in another way than that of its prompt.

    A mark at the end of the message before the turn makes what follows comparable.
    """
    neighbour = attrs.evolve(history[-1], content=history[-1].content + NEIGHBOUR)
    before = [*history[:-1], neighbour]
    texts = render(before, prompt=True), render([*before, turn])
    if any(NEIGHBOUR not in each for each in texts):
        return None
    end_of_prompt, after = (each.rpartition(NEIGHBOUR)[2] for each in texts)
    return _after_prompt(end_of_prompt, after, hidden) if prompt.endswith(end_of_prompt) else None


def _ending(render: Render, messages: Sequence[Message], mark: str, tail: str, special: re.Pattern[str]) -> str:
    """Cuts from `tail`, which follows the mark, what the verifier writes: up to the token that ends the turn."""
    *history, turn = messages
    if not turn.tool_calls:
        end = special.search(tail)
        return tail[: end.end()] if end else _with_next_token(render, messages, mark, tail.rstrip(), special)
    # Special tokens may frame a call; the one that ends the turn is that of a plain answer, or the last.
    plain = special.search(render([*history, Message("assistant", CONTENT)]).rpartition(CONTENT)[2])
    ends = list(special.finditer(tail))
    if plain is None or not ends:
        return _with_next_token(render, messages, mark, tail.rstrip(), special)
    return tail[: next((end for end in ends if end.group() == plain.group()), ends[-1]).end()]


def _with_next_token(
    render: Render, messages: Sequence[Message], mark: str, tail: str, special: re.Pattern[str]
) -> str:
    """Adds to the tail the special token that opens the next turn: some verifiers end their own with it (GLM-4.5)."""
    calls = messages[-1].tool_calls
    follower = (
        Message("tool", NEIGHBOUR, tool_call_id=calls[-1].id, name=calls[-1].name)
        if calls
        else Message("user", NEIGHBOUR)
    )
    try:
        after = render([*messages, follower]).rpartition(mark)[2]
    except jinja2.TemplateError:
        return tail
    token = re.compile(rf"\s*(?:{special.pattern})").match(after, len(tail))
    return tail + token.group() if token and after.startswith(tail) else tail
