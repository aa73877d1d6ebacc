"""Turns, tools and documents as data sets keep them: all of it reaches the template, or the row is left out."""

from __future__ import annotations

import json

import pytest
from chat_templates import KINDS

from speculators.data.conversations import parse
from speculators.data.messages import Message, ToolCall
from speculators.data.template import ChatTemplate

SCHEMA = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": SCHEMA}
CALL = {"name": "weather", "arguments": {"city": "Rome"}}
OPENAI = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "weather"}, {"type": "text", "text": "in Rome?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ],
    "tools": [TOOL],
}
LEGACY = {
    "messages": [
        {"role": "user", "content": "weather\nin Rome?"},
        {"role": "assistant", "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
        {"role": "function", "name": "weather", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ],
    "functions": [SCHEMA],
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "weather\nin Rome?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ],
    "tools": json.dumps([SCHEMA]),
}
HERMES = {
    "conversations": [
        {
            "from": "system",
            "value": f"You are a function calling AI model. <tools> {json.dumps([TOOL])} </tools> Call them so: ...",
        },
        {"from": "human", "value": "weather\nin Rome?"},
        {"from": "gpt", "value": f"<tool_call>\n{CALL}\n</tool_call>"},
        {"from": "tool", "value": "<tool_response>\nsunny\n</tool_response>"},
        {"from": "gpt", "value": "It is sunny."},
    ]
}


@pytest.mark.parametrize("row", [OPENAI, LEGACY, SHAREGPT, HERMES], ids=["openai", "legacy", "sharegpt", "hermes"])
def test_a_tool_conversation_is_the_same_in_every_layout(row):
    """Calls are parsed, results know their call's id, tools are schemas in the OpenAI layout."""
    conversation = parse(row, "x")
    user, call, result, answer = conversation.messages
    assert user == Message("user", "weather\nin Rome?")
    assert (call.content, [(c.name, c.arguments) for c in call.tool_calls]) == ("", [("weather", {"city": "Rome"})])
    assert (result.role, result.content, result.tool_call_id) == ("tool", "sunny", call.tool_calls[0].id)
    assert answer == Message("assistant", "It is sunny.")
    assert conversation.tools == (TOOL,)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("layout", ["openai", "sharegpt", "parts"])
def test_reasoning_is_read_in_every_layout(layout, field):
    """A field of any of the three names, and a part of its own, are the turn's reasoning."""
    turns = {
        "openai": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", field: "so"}],
        "sharegpt": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", field: "so"}],
        "parts": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "a"}]},
        ],
    }
    row = {"conversations" if layout == "sharegpt" else "messages": turns[layout]}
    assert parse(row, "x").messages[1] == Message("assistant", "a", reasoning="so")


def test_weights_leave_answers_out():
    """Weight 0, as files for fine-tuning have it, keeps an answer in the prompts without training on it."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    turns += [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]
    _, first, _, second = parse({"messages": turns}, "x").messages
    assert (first.supervised, second.supervised) == (False, True)


def test_documents_and_any_order_of_turns_reach_the_template():
    """Which turns may follow each other is the template's business; documents are objects, texts are wrapped."""
    roles = ("developer", "user", "user", "assistant", "assistant", "user")
    row = {"messages": [{"role": role, "content": role} for role in roles], "documents": ["one", {"title": "two"}]}
    conversation = parse(row, "x")
    assert [message.role for message in conversation.messages] == list(roles[:-1])
    assert conversation.documents == ({"text": "one"}, {"title": "two"})
    (encoded,) = ChatTemplate.of(KINDS["hermes"].tokenizer()).encode(conversation, 999)
    assert int(encoded.loss_mask[1:].astype(int).sum()) > 0
    assert "roles must alternate" in ChatTemplate.of(KINDS["gemma"].tokenizer()).encode(conversation, 999)


def test_a_developer_is_the_system_of_templates_that_know_none():
    """A template that does not know the role gets the turn as a system turn, instead of dropping it."""
    conversation = parse({"messages": [{"role": "developer", "content": "Be brief."}, *OPENAI["messages"]]}, "x")
    for kind in ("hermes", "harmony"):
        assert "Be brief." in ChatTemplate.of(KINDS[kind].tokenizer()).render(conversation.messages)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "a tool call has no"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "a tool call has no name"),
        ({"role": "assistant", "function_call": "f"}, "a tool call has no name"),
        ({"role": "assistant", "content": None}, "an empty message"),
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}, "a message is not text"),
        ({"role": "assistant", "content": {"a": 1}}, "a message is not text"),
    ],
)
def test_what_cannot_be_read_is_a_reason(turn, reason):
    """A call or a content that is not understood costs the row, with its reason; it is not dropped from it."""
    assert reason in parse({"messages": [{"role": "user", "content": "q"}, turn]}, "x")


def test_tools_and_documents_that_are_not_lists_are_reasons():
    """So do tools and documents."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert parse({"messages": turns, "tools": "no JSON"}, "x") == "its tools are not a list of JSON objects"
    assert "documents" in parse({"messages": turns, "documents": {"a": 1}}, "x")


def test_ids_of_calls_fit_a_template_that_wants_nine_characters():
    """Mistral's templates refuse other ids; call and result keep the same one."""
    conversation = parse(OPENAI, "x")
    text = ChatTemplate.of(KINDS["mistral"].tokenizer()).render(conversation.messages, tools=conversation.tools)
    assert text.count('"id": "74196fe72"') == text.count('"call_id": "74196fe72"') == 1
    assert ToolCall(name="f", arguments={}).to_input()["function"] == {"name": "f", "arguments": {}}
