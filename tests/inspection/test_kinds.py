"""What conversations consist of is counted, coloured, and compared with what the chat template shows."""

from __future__ import annotations

import numpy as np
import pytest
from data_toys import talk

from speculators.data.encoded import Encoded
from speculators.data.messages import Conversation, Message, ToolCall
from speculators.data.template import ChatTemplate
from speculators.inspection.kinds import dropped_kinds, kind_spans, kinds_of
from speculators.inspection.summary import render_conversation

CALL = Message("assistant", "", reasoning="Ask.", tool_calls=(ToolCall(name="weather", arguments={"city": "Oslo"}),))
CALLS = Conversation(
    "c",
    "",
    (Message("user", "Is it wet?"), CALL, Message("tool", "rain", name="weather"), Message("assistant", "It is.")),
    tools=({"type": "function", "function": {"name": "weather"}},),
)
WHOLE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}{{ m.role }}: "
    "{{ m.reasoning_content or '' }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "{{ m.content }}\n{% endfor %}"
)


def test_a_conversation_is_counted_under_everything_that_it_has():
    """Reasoning counts in its field and in the content; that of earlier turns, which templates drop, counts twice."""
    assert set(kinds_of(CALLS)) == {"reasoning", "tools", "tool calls", "tool results"}
    assert list(kinds_of(talk("q", "<think>\nso\n</think>\na"))) == ["reasoning"]
    assert "reasoning of earlier turns" in list(kinds_of(talk("q", "so</think>a", "and?", "b")))
    assert list(kinds_of(talk("q", "a"))) == []


@pytest.mark.parametrize(
    ("source", "dropped"),
    [
        (WHOLE, {"documents"}),
        (WHOLE.replace("m.reasoning_content or ''", "m.reasoning_content if loop.last else ''"),
         {"documents", "reasoning of earlier turns"}),
        ("{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.content }}"
         "{% endfor %}",
         {"documents", "reasoning", "reasoning of earlier turns", "tools", "tool calls", "tool results"}),
    ],
)  # fmt: skip
def test_what_a_template_drops_or_refuses_is_tried_out(tokenizer, source, dropped):
    """A mark in each kind does or does not reach the template's text."""
    tokenizer.chat_template = source
    assert set(dropped_kinds(ChatTemplate.of(tokenizer))) == dropped


def test_reasoning_calls_and_results_get_spans_of_their_own(tokenizer):
    """The parts stand in the text as they do in the conversation, and the text stays whole."""
    tokenizer.chat_template = WHOLE
    template = ChatTemplate.of(tokenizer)
    text = template.render(CALLS.messages, tools=CALLS.tools)
    assert [(text[start:end], kind) for start, end, kind in kind_spans(text, CALLS)] == [
        ("Ask.", "reasoning"),
        ('weather", "arguments": {"city": "Oslo', "tool calls"),
        ("rain", "tool results"),
    ]
    ids = template.prompt_ids(CALLS.messages, tools=CALLS.tools)
    row = Encoded(np.array(ids, np.int32), np.zeros(len(ids), np.bool_))
    shown = render_conversation("c", row, template, max_tokens=999, conversation=CALLS)
    assert "".join(piece.text for piece in shown.pieces) == text
    assert [piece.text for piece in shown.pieces if piece.kind == "tool results"] == ["rain"]
