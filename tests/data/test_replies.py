"""A verifier's text becomes the message that a server would return: reasoning, content, calls, nothing lost."""

from __future__ import annotations

import pytest

from speculators.data.messages import ToolCall
from speculators.data.replies import AnswerReader
from speculators.data.template import ChatTemplate

SEPARATES = AnswerReader(reasons=True)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("<think>\nTwo and two.\n</think>\n\n4", "assistant\n"),
        ("Two and two.\n</think>\n\n4", "assistant\n<think>\n"),
        ("[THINK]Two and two.[/THINK]4", "[/INST]"),
    ],
)
def test_reasoning_is_separated_wherever_it_was_opened(text: str, prompt: str):
    """A template may open the block in the prompt, so that the answer holds only its end."""
    message = SEPARATES.message(text, prompt=prompt)
    assert (message.reasoning, message.content) == ("Two and two.", "4")


def test_an_answer_that_is_cut_while_it_reasons_has_no_content():
    """A server returns it as reasoning, and so does the history show it."""
    for text, prompt in (("<think>\nTwo and", ""), ("Two and", "<think>\n")):
        message = SEPARATES.message(text, prompt=prompt)
        assert (message.reasoning, message.content) == ("Two and", "")


def test_the_channels_of_gpt_oss_are_separated():
    """Analysis is reasoning, final is content, and a function's channel is a call, as its template wants them."""
    message = SEPARATES.message(
        "<|channel|>analysis<|message|>two and two<|end|><|start|>assistant<|channel|>final<|message|>4"
    )
    assert (message.reasoning, message.content) == ("two and two", "4")
    message = SEPARATES.message(
        "<|channel|>analysis<|message|>look<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Oslo"}<|call|>'
    )
    assert (message.reasoning, message.content) == ("look", "")
    assert message.tool_calls == (ToolCall(name="weather", arguments={"city": "Oslo"}),)


def test_text_that_no_parser_knows_stays_as_it_was_written():
    """Blanks, special tokens and calls remain in the content."""
    for text in (' {"name": "weather"}<|eom_id|>\n', "a <|channel|> <|end|> b"):
        message = SEPARATES.message(text)
        assert (message.content, message.reasoning, message.tool_calls) == (text, None, ())


def test_a_template_without_a_field_for_reasoning_gets_it_in_the_content(tokenizer):
    """Such templates cut it out themselves, or show it; one that reads the field gets it there."""
    text = "<think>\nTwo.\n</think>\n\n4"
    assert AnswerReader.of(ChatTemplate.of(tokenizer)).message(text).content == text
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "(message['reasoning_content'] or '') + message['content']"
    )
    assert AnswerReader.of(ChatTemplate.of(tokenizer)).message(text).reasoning == "Two."
