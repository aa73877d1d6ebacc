"""The loss mask: exactly the assistant's tokens, each turn's end included, whatever the template does."""

from __future__ import annotations

import re

import numpy as np
import pytest
from data_toys import talk
from transformers import AutoTokenizer, ByT5Tokenizer

from speculators.data.messages import Message
from speculators.data.template import (
    ALL_SUPERVISED,
    NONE_SUPERVISED,
    NOTHING_LEFT,
    ChatTemplate,
)
from speculators.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}OPEN{{ m.content }}CLOSE"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = CHATML.replace("OPEN", "{% generation %}")
# What SmolLM2's template does: a system prompt of its own where the conversation has none.
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def supervised(tokenizer, conversation, *, template=None, max_tokens=512) -> list[str]:
    """Decodes each supervised stretch."""
    if template is not None:
        tokenizer.chat_template = template
    rows = ChatTemplate.of(tokenizer).encode(conversation, max_tokens)
    assert not isinstance(rows, str), rows
    (encoded,) = rows
    assert (encoded.input_ids.dtype, encoded.loss_mask.dtype) == (np.int32, np.bool_)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], encoded.loss_mask, [False]])))
    return [tokenizer.decode(encoded.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_every_turn_is_supervised_with_its_end_and_nothing_else(tokenizer):
    """Each answer and its <|im_end|> are supervised; headers, user turns and the newline after the end are not."""
    conversation = talk("hi", "hello there", "and?", " indented\n\nanswer. ", system="be brief")
    assert supervised(tokenizer, conversation) == ["hello there<|im_end|>", " indented\n\nanswer. <|im_end|>"]


def test_tokens_are_those_of_the_whole_conversation(tokenizer):
    """A conversation is one row, rendered as a whole, however many turns it has."""
    conversation = talk("hi", "hello", "and?", "bye")
    (encoded,) = ChatTemplate.of(tokenizer).encode(conversation, 512)
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
    assert encoded.input_ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_first_supervised_token_follows_the_generation_prompt(tokenizer):
    """The tokens before the first supervised one are exactly those that a server feeds before it samples that token."""
    template = ChatTemplate.of(tokenizer)
    (encoded,) = template.encode(talk("hi", "hello"), 512)
    first = int(encoded.loss_mask.argmax())
    assert encoded.input_ids[:first].tolist() == template.prompt_ids([Message("user", "hi")])


def test_default_system_prompt_is_in_prefix_and_whole(tokenizer):
    """A template with a default system prompt inserts it into both renderings, so every turn is located."""
    found = supervised(tokenizer, talk("hi", "hello", "and?", "bye"), template=DEFAULT_SYSTEM)
    assert found == ["hello<|im_end|>", "bye<|im_end|>"]


def test_answer_that_repeats_the_question_is_found_in_its_place(tokenizer):
    """Equal text in other turns does not move a span."""
    assert supervised(tokenizer, talk("same", "same", "same", "same")) == ["same<|im_end|>"] * 2


def test_trimmed_answer(tokenizer):
    """With a template that trims answers, the answer and its end are supervised all the same."""
    trim = DEFAULT_SYSTEM.replace("{{ m.content }}", "{{ m.content | trim }}")
    assert supervised(tokenizer, talk("hi", "\n hello \n"), template=trim) == ["hello<|im_end|>"]


@pytest.mark.parametrize("inside", [True, False])
def test_generation_markers_are_used(tokenizer, inside):
    """Markers decide if the template has them; an end of turn just outside them is supervised, too."""
    close = "<|im_end|>{% endgeneration %}" if inside else "{% endgeneration %}<|im_end|>"
    found = supervised(tokenizer, talk("hi", "hello", "and?", "bye"), template=MARKED.replace("CLOSE", close))
    assert found == ["hello<|im_end|>", "bye<|im_end|>"]


def test_markers_around_everything_are_no_mask(tokenizer):
    """An all-ones mask (every token "generated") is a reason to skip the row."""
    tokenizer.chat_template = "{% generation %}" + DEFAULT_SYSTEM + "{% endgeneration %}"
    assert ChatTemplate.of(tokenizer).encode(talk("hi", "hello"), 512) == ALL_SUPERVISED


def test_empty_markers_are_no_mask(tokenizer):
    """An all-zeros mask (empty markers) is a reason to skip the row, not to train at zero loss."""
    tokenizer.chat_template = DEFAULT_SYSTEM + "{% generation %}{% endgeneration %}"
    assert ChatTemplate.of(tokenizer).encode(talk("hi", "hello"), 512) == NONE_SUPERVISED


def test_reasoning_dropped_from_history_is_in_its_own_answer(tokenizer):
    """Where a template drops reasoning, an answer is supervised with it, and later prompts are without it."""
    tokenizer.chat_template = DEFAULT_SYSTEM.replace("m.content", "m.content.split('</think>')[-1]")
    first, second = ChatTemplate.of(tokenizer).encode(talk("hi", "<think>so</think>hello", "and?", "bye"), 512)
    assert tokenizer.decode(first.input_ids[first.loss_mask]) == "<think>so</think>hello<|im_end|>"
    assert tokenizer.decode(second.input_ids[second.loss_mask]) == "bye<|im_end|>"
    assert "so</think>" not in tokenizer.decode(second.input_ids)


def test_history_rendered_differently_gives_a_row_for_each_prompt(tokenizer):
    """An answer follows its own prompt, even if the template shows that prompt otherwise once it is answered."""
    tokenizer.chat_template = "{{ messages | length }}" + DEFAULT_SYSTEM
    template, conversation = ChatTemplate.of(tokenizer), talk("hi", "hello", "and?", "bye")
    for row, place in zip(template.encode(conversation, 512), (1, 3), strict=True):
        prompt = template.prompt_ids(conversation.messages[:place])
        assert row.input_ids[: len(prompt)].tolist() == prompt
        assert tokenizer.decode(row.input_ids[row.loss_mask]) == f"{conversation.messages[place].content}<|im_end|>"


def test_refusing_template_is_a_reason(tokenizer):
    """A template that raises (no system role, for example) costs the row, with the template's message as the reason."""
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    )
    template = ChatTemplate.of(tokenizer)
    assert template.encode(talk("hi", "hello", system="s"), 512) == "the chat template refuses it: no system"
    with pytest.raises(DataError, match="refuses a prompt: no system"):
        template.prompt_ids([Message("system", "s")])


def test_tokenizer_without_template_explains_itself(tokenizer):
    """A tokenizer without a chat template raises one error that says what is missing and what to do."""
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"has no chat template\n.*instruction-tuned"):
        ChatTemplate.of(tokenizer)


def test_truncation_keeps_the_head_and_is_recorded(tokenizer):
    """A long conversation is cut at max_tokens; if nothing supervised is left, it is skipped."""
    template = ChatTemplate.of(tokenizer)
    (whole,) = template.encode(talk("hi", "hello there"), 512)
    first = int(whole.loss_mask.argmax())
    (cut,) = template.encode(talk("hi", "hello there"), first + 2)
    assert (cut.truncated, whole.truncated) == (True, False)
    assert cut.input_ids.tolist() == whole.input_ids[: first + 2].tolist()
    assert cut.loss_mask.sum() == 2
    assert template.encode(talk("hi", "hello there"), first) == NOTHING_LEFT


def test_tokenizer_without_offsets():
    """A slow tokenizer without offsets gives the same spans, by tokenizing up to each place."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert not tokenizer.is_fast
    assert supervised(tokenizer, talk("hi", "hello", "and?", "bye")) == ["hello</s>", "bye</s>"]


def test_date_in_the_template_is_fixed(tokenizer):
    """Llama 3's templates print a date, but tokens do not depend on the day."""
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}" + DEFAULT_SYSTEM
    )
    text = ChatTemplate.of(tokenizer).render(talk("hi", "hello").messages)
    assert text.startswith("26 Jul 2024")


def test_multi_byte_characters(tokenizer):
    """Characters of several tokens (emoji, CJK) at the edges of an answer are supervised whole."""
    assert supervised(tokenizer, talk("你好", "🙂 好🙂", "🙂", "好")) == ["🙂 好🙂<|im_end|>", "好<|im_end|>"]


@pytest.mark.slow
def test_real_template_and_tokenizer(smollm2):
    """With SmolLM2's template, answers and their ends are supervised, and nothing of its default system prompt."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    conversation = talk("Name a colour.", " Red. ", "Another?", "Blue, 藍, 🙂")
    assert supervised(tokenizer, conversation) == [" Red. <|im_end|>", "Blue, 藍, 🙂<|im_end|>"]
    text = ChatTemplate.of(tokenizer).render(conversation.messages)
    assert len(re.findall("helpful AI assistant named SmolLM", text)) == 1
