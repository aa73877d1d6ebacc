"""What is supervised is what the verifier writes after the prompt as a server gives it, under all kinds of template."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import pytest
from chat_templates import KINDS

from speculators.data.messages import Conversation, Message, ToolCall, Written
from speculators.data.template import NOTHING_CHOSEN, ChatTemplate
from speculators.data.turns import DROPS_CALLS, DROPS_REASONING, REWRITES_ANSWER

TOOLS = (
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    },
)
CALL = ToolCall(name="weather", arguments={"city": "Rome"}, id="call_1")
RESULT = Message("tool", "sunny", tool_call_id="call_1", name="weather")


def user(text: str) -> Message:
    return Message("user", text)


def says(text: str, **keys) -> Message:
    return Message("assistant", text, **keys)


def talk(*messages: Message, tools=()) -> Conversation:
    return Conversation("c", "", messages, tools=tools)


def encoded(kind: str, conversation: Conversation):
    template = ChatTemplate.of(KINDS[kind].tokenizer())
    return template, template.encode(conversation, 4096)


def written(kind: str, conversation: Conversation) -> list[str]:
    """Decodes what is supervised for each turn, and checks that it follows the prompt as served, token by token."""
    template, rows = encoded(kind, conversation)
    assert not isinstance(rows, str), rows
    texts = []
    for index, message in enumerate(conversation.messages):
        if message.role != "assistant" or not message.supervised:
            continue
        prompt = template.prompt_ids(conversation.messages[:index], tools=conversation.tools)
        start = len(prompt)
        (row,) = [
            row
            for row in rows
            if row.input_ids[:start].tolist() == prompt and row.loss_mask[start] and not row.loss_mask[start - 1]
        ]
        rest = row.loss_mask[start:]
        length = len(rest) if rest.all() else int(np.argmin(rest))
        texts.append(template.tokenizer.decode(row.input_ids[start : start + length]))
    runs = sum(int(np.diff(row.loss_mask.astype(int), prepend=0).clip(0).sum()) for row in rows)
    assert runs == len(texts), "something else is supervised, too"
    return texts


# What stands before a plain answer, and the token that ends it.
PLAIN = {
    "qwen3": "<think>\n\n</think>\n\n{}<|im_end|>",
    "qwen3.5": "\n</think>\n\n{}<|im_end|>",
    "harmony": "<|channel|>final<|message|>{}<|return|>",
    "glm4.5": "\n<think></think>\n{}<|user|>",
    "r1": "\n</think>\n\n{}<|end|>",
    "kimi": "<think></think>{}<|im_end|>",
    "mistral": "{}</s>",
    "llama3": "{}<|eot_id|>",
    "gemma": "{}<end_of_turn>",
    "hermes": "{}<|im_end|>",
    "marked": "{}<|im_end|>",
}
# An answer with reasoning; the templates that are not here cannot show any.
REASONED = {
    "qwen3": "<think>\n{0}\n</think>\n\n{1}<|im_end|>",
    "qwen3.5": "{0}\n</think>\n\n{1}<|im_end|>",
    "harmony": "<|channel|>analysis<|message|>{0}<|end|><|start|>assistant<|channel|>final<|message|>{1}<|return|>",
    "glm4.5": "\n<think>{0}</think>\n{1}<|user|>",
    "r1": "{0}\n</think>\n\n{1}<|end|>",
    "kimi": "<think>{0}</think>{1}<|im_end|>",
}
# A call without text or reasoning.
CALLED = {
    "qwen3": '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n'
    "</tool_call><|im_end|>",
    "qwen3.5": "\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n"
    "</tool_call><|im_end|>",
    "harmony": ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>',
    "glm4.5": "\n<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
    "</tool_call><|observation|>",
    "r1": '\n</think>\n\n<|calls|><|call|>weather\n{"city": "Rome"}<|end_call|><|end_calls|><|end|>',
    "kimi": "<think></think><|tool_calls_section_begin|><|tool_call_begin|>call_1<|tool_call_argument_begin|>"
    '{"city": "Rome"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}, "id": "74196fe72"}]</s>',
    "llama3": '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>',
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_answers_are_supervised_after_their_served_prompt(kind):
    """In one and in several turns the supervised text is what the verifier writes, scaffolding of its own included."""
    assert written(kind, talk(user("q"), says("It is so."))) == [PLAIN[kind].format("It is so.")]
    several = talk(user("one?"), says("first"), user("two?"), says("second"), user("three?"), says("third"))
    assert written(kind, several) == [PLAIN[kind].format(text) for text in ("first", "second", "third")]


@pytest.mark.parametrize("kind", PLAIN)
def test_answers_that_occur_in_the_scaffolding_are_supervised_whole(kind):
    """An answer of letters that stand in the template ("think", "in", "user") moves no mask."""
    for answer in ("hi", "think", "in", "i", "user", "final", "model", "n"):
        assert written(kind, talk(user("q"), says(answer))) == [PLAIN[kind].format(answer)]


@pytest.mark.parametrize("kind", REASONED)
@pytest.mark.parametrize("inline", [False, True])
def test_reasoning_is_supervised_with_its_answer(kind, inline):
    """Reasoning is trained on as the verifier writes it, in every turn, be it in a field of the row or between tags."""

    def answer(thought: str, text: str) -> Message:
        return says(f"<think>\n{thought}\n</think>\n\n{text}") if inline else says(text, reasoning=thought)

    conversation = talk(user("one?"), answer("in", "first"), user("two?"), answer("Hm.", "second"))
    assert written(kind, conversation) == [REASONED[kind].format("in", "first"), REASONED[kind].format("Hm.", "second")]


@pytest.mark.parametrize("kind", CALLED)
def test_tool_calls_are_supervised_and_their_results_are_not(kind):
    """A call is a turn like any other, and the answer to its result follows the prompt with the result in it."""
    conversation = talk(user("weather?"), says("", tool_calls=(CALL,)), RESULT, says("Sunny."), tools=TOOLS)
    assert written(kind, conversation) == [CALLED[kind], PLAIN[kind].format("Sunny.")]


@pytest.mark.parametrize("kind", REASONED)
def test_reasoning_before_a_call_is_where_a_server_has_it(kind):
    """The reasoning of a call stays in the prompt of the answer to its result only if the template keeps it there."""
    conversation = talk(
        user("weather?"),
        says("", reasoning="look", tool_calls=(CALL,)),
        RESULT,
        says("Sunny.", reasoning="so"),
        tools=TOOLS,
    )
    call, answer = written(kind, conversation)
    assert answer == REASONED[kind].format("so", "Sunny.")
    assert "look" in call
    assert call.endswith(CALLED[kind].rpartition("</think>")[2])


def test_rows_are_joined_only_where_one_extends_the_other():
    """Turns that a template shows as they were written are one row; rewritten history gives a row for each prompt."""
    several = talk(user("one?"), says("first"), user("two?"), says("second"))
    counts = {kind: len(encoded(kind, several)[1]) for kind in KINDS}
    rewriting = {"qwen3", "qwen3.5", "harmony", "r1"}
    assert counts == {kind: 2 if kind in rewriting else 1 for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "turn", "reason"),
    [
        ("gemma", says("", tool_calls=(CALL,)), DROPS_CALLS),
        ("marked", says("Let me look.", tool_calls=(CALL,)), DROPS_CALLS),
        ("mistral", says("Let me look.", tool_calls=(CALL,)), REWRITES_ANSWER),
        ("llama3", says("a", reasoning="b"), DROPS_REASONING),
        ("marked", says("a", reasoning="b"), DROPS_REASONING),
    ],
)
def test_what_a_template_cannot_show_is_a_reason(kind, turn, reason):
    """A turn of which the template drops a part is left out with that reason, not trained on in part."""
    assert encoded(kind, talk(user("q"), turn, tools=TOOLS))[1] == reason


def test_chosen_answers_are_supervised_alone():
    """`train_on` and weights choose answers; the others stay in the prompts."""
    several = talk(user("one?"), says("first"), user("2?"), says("second", supervised=False), user("3?"), says("third"))
    assert written("hermes", several) == ["first<|im_end|>", "third<|im_end|>"]
    assert written("hermes", several.training_on("last")) == ["third<|im_end|>"]
    assert written("hermes", several.training_on([0])) == ["first<|im_end|>"]
    assert encoded("hermes", several.training_on([1]))[1] == NOTHING_CHOSEN


def test_written_ids_are_trained_on_as_they_are():
    """With a verifier's own ids nothing is rendered: rows are prompt and answer, joined where one extends the other."""
    conversation = Conversation(
        "c",
        "",
        (user("one?"), says("anything"), user("two?"), says("else"), user("three?"), says("more")),
        written=(
            Written(turn=1, prompt=(5, 6), answer=(7, 8)),
            Written(turn=3, prompt=(5, 6, 7, 8, 9), answer=(10,)),
            Written(turn=5, prompt=(5, 6, 7, 4), answer=(11, 12)),
        ),
    )
    _, (joined, alone) = encoded("gemma", conversation)
    assert joined.input_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert joined.loss_mask.tolist() == [False, False, True, True, False, True]
    assert (alone.input_ids.tolist(), int(alone.loss_mask.sum())) == ([5, 6, 7, 4, 11, 12], 2)


@pytest.mark.parametrize("kind", ["harmony", "llama3"])
def test_tokens_are_the_same_on_every_day(kind, monkeypatch):
    """Templates read the clock through `strftime_now`; for ours it stands still, in macros as well."""
    rows = []
    for year in (2025, 2031):

        class Day(datetime):
            @classmethod
            def now(cls, tz=None, year=year):
                return datetime(year, 3, 4)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Day)
        template, (row,) = encoded(kind, talk(user("q"), says("a")))
        rows.append(row.input_ids.tolist())
    assert rows[0] == rows[1]
    assert any(day in template.tokenizer.decode(rows[0]) for day in ("2024-07-26", "26 Jul 2024"))


def test_another_source_of_chance_is_fixed():
    """Jinja's own `random` draws alike in every rendering."""
    tokenizer = KINDS["hermes"].tokenizer()
    tokenizer.chat_template = "{{ range(99999) | random }}" + tokenizer.chat_template
    template = ChatTemplate.of(tokenizer)
    assert len({template.render([user("q")]) for _ in range(3)}) == 1
