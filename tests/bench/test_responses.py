"""Responses: the suite's answers where they are the verifier's, generated ones otherwise, turn by turn."""

from __future__ import annotations

import attrs
import pytest
import torch
from toys import greedy_response

from speculators.bench.responses import capture_rows, own_rows, respond, sample_rows
from speculators.bench.rows import JudgedResponse, Response
from speculators.bench.suites import Prompt
from speculators.data.messages import Message, Written
from speculators.data.template import ChatTemplate
from speculators.errors import DataError
from speculators.verifier.engine import Engine
from speculators.verifier.weights import load_head


@pytest.fixture(scope="module")
def engine(tiny_verifier):
    """The tiny verifier in float32."""
    return Engine(tiny_verifier)


SEA = Message("assistant", "on the sea")


def _prompt(text="the other", **options):
    return Prompt(id=text, category="", messages=(Message("user", text),), **options)


def _ids(engine, text):
    return engine.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_an_answer_of_the_suite_is_tokenized_as_in_training_and_ends_with_its_turn(engine):
    """The prompt is the one that the template asks with; the response ends with the end-of-turn token."""
    (response,) = respond(engine, [_prompt(answer=SEA)], temperature=0.0, max_new_tokens=160)
    asked = ChatTemplate.of(engine.tokenizer).prompt_ids((Message("user", "the other"),))
    assert list(response.prompt) == asked
    assert list(response.answer) == [*_ids(engine, "on the sea"), 2]


def test_a_long_answer_ends_at_the_limit_like_a_decode_does(engine):
    """It gets no end-of-turn token, which the verifier did not emit."""
    ids = _ids(engine, "on the sea")
    (response,) = respond(engine, [_prompt(answer=SEA)], temperature=0.0, max_new_tokens=len(ids))
    assert list(response.answer) == ids


def test_prompts_without_an_answer_get_the_verifiers_own(engine):
    """Generated greedy answers stand in the order of the prompts, beside the suite's own."""
    prompts = [_prompt("a"), _prompt("b", answer=Message("assistant", "x")), _prompt("c")]
    responses = respond(engine, prompts, temperature=0.0, max_new_tokens=9)
    assert [each.id for each in responses] == ["a", "b", "c"]
    for each in (responses[0], responses[2]):
        wanted = greedy_response(engine.model, each.prompt, length=9, stop_ids=engine.stop_ids)
        assert list(each.answer) == wanted


def test_later_turns_see_the_verifiers_own_answers(engine):
    """The history of the second turn holds the verifier's answer to the first."""
    first, second = respond(engine, [_prompt("a", later=("b",))], temperature=0.0, max_new_tokens=6)
    said = engine.tokenizer.decode(first.answer, skip_special_tokens=True)
    history = (Message("user", "a"), Message("assistant", said), Message("user", "b"))
    assert list(second.prompt) == ChatTemplate.of(engine.tokenizer).prompt_ids(history)
    assert (first.id, second.id) == ("a", "a")


def test_ids_that_came_with_a_suite_are_the_response(engine):
    """What a verifier wrote is measured as it was written; ids of another prompt or tokenizer give way to the text."""
    template = ChatTemplate.of(engine.tokenizer)
    asked = tuple(_prompt().ids(template))
    # Another segmentation of the same text than the tokenizer's own.
    ids = tuple(token for letter in "on the sea" for token in _ids(engine, letter))
    own = Written(turn=1, prompt=asked, answer=(*ids, 2), text="on the sea<|im_end|>")
    foreign = [attrs.evolve(own, prompt=asked[1:]), attrs.evolve(own, text="another text")]
    answer = Message("assistant", "on the sea")
    prompts = [_prompt(answer=answer, written=each) for each in (own, *foreign)]
    responses = respond(engine, prompts, temperature=0.0, max_new_tokens=160)
    text = (*_ids(engine, "on the sea"), 2)
    assert [each.answer for each in responses] == [own.answer, text, text]
    assert {each.prompt for each in responses} == {asked}
    assert text != own.answer


def test_the_history_of_a_later_turn_is_the_message_that_a_server_makes_of_an_answer(engine, monkeypatch):
    """A template that shows no reasoning in its history gets none, although the verifier wrote it."""
    monkeypatch.setattr(
        engine.tokenizer,
        "chat_template",
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['reasoning_content'] %}<think>\n{{ m['reasoning_content'] }}\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    )
    said = engine.tokenizer("so so\n</think>\n\nA plant.<|im_end|>", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(engine, "generate", lambda ids, **options: [said for _ in ids])
    _, second = respond(engine, [_prompt("a", later=("b",))], temperature=0.0, max_new_tokens=6)
    text = engine.tokenizer.decode(second.prompt)
    assert "assistant\nA plant.<|im_end|>" in text
    assert "so so" not in text


def test_above_zero_temperature_answers_are_sampled_anew_with_a_seed(engine):
    """The suite's greedy answers are not samples, so they are not used; the same seed gives the same samples."""
    prompts = [_prompt("a", answer=Message("assistant", "x"))]
    options = {"temperature": 1.5, "max_new_tokens": 12}
    one, same, other = (respond(engine, prompts, seed=seed, **options)[0].answer for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert list(one) != [*_ids(engine, "x"), 2]


def test_an_answer_that_the_template_cannot_hold_is_an_error_that_names_the_prompt(engine, monkeypatch):
    """No prompt is dropped silently: here the template loses a word of the answer."""
    template = engine.tokenizer.chat_template.replace("message['content']", "message['content'] | replace('sea', '')")
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    with pytest.raises(DataError, match="prompt the other"):
        respond(engine, [_prompt(answer=SEA)], temperature=0.0, max_new_tokens=5)


def test_rows_come_in_the_order_of_the_responses(engine):
    """Capture works by length; the rows come back in the order of the responses."""
    prompts = [_prompt("a long question about the other thing"), _prompt("b")]
    responses = respond(engine, prompts, temperature=0.0, max_new_tokens=5)
    head = load_head(engine.folder, engine.facts)
    rows = capture_rows(engine, head, responses, (1, 3), temperature=0.0)
    assert [row.response.id for row in rows] == [prompt.id for prompt in prompts]
    assert [row.hidden_states.shape for row in rows] == [(len(each.tokens), 64) for each in responses]


def test_an_answer_of_another_model_is_replaced_by_the_verifiers_own_and_marked(engine):
    """Only the verifier's output is measured: its own answers stay, and the replaced ones are counted."""
    head = load_head(engine.folder, engine.facts)
    options = {"temperature": 0.0, "max_new_tokens": 7}
    (own,) = own_rows(engine, head, [_prompt("a")], (1, 3), **options)
    foreign, generated = own_rows(engine, head, [_prompt("a", answer=SEA), _prompt("b")], (1, 3), **options)
    assert foreign.response == own.response
    assert [row.replaced for row in (own, foreign, generated)] == [False, True, False]
    assert [row.cut for row in (own, foreign, generated)] == [0, 0, 0]


def _row(length):
    response = Response(id="", category="", tokens=(1,) * (3 + length), prompt_length=3)
    return JudgedResponse(response=response, hidden_states=torch.empty(3 + length, 0), log_p=None, cut=0)


def test_the_live_sample_is_spread_over_the_suite_and_skips_what_has_no_round():
    """A suite in order of category is sampled from every category; a response of one token has nothing to compare."""
    rows = [_row(5) for _ in range(9)]
    assert sample_rows(rows, 3) == [0, 4, 8]
    assert sample_rows(rows, 1) == [0]
    assert sample_rows(rows, None) == list(range(9))
    assert sample_rows([_row(1), _row(2), _row(0), _row(4)], 8) == [1, 3]
