"""`token_ids` of a row: read back as they were written, refused where they cannot be this row's or this tokenizer's."""

from __future__ import annotations

import pytest
from data_toys import row

from speculators.data.conversations import parse
from speculators.data.messages import Written
from speculators.data.written import BAD_IDS, exact_text, from_other_tokenizer, written_values

WRITTEN = Written(turn=1, prompt=(1, 5), answer=(9, 2), text="x<|im_end|>")


def test_the_ids_of_an_answer_are_read_back_as_they_were_written():
    """Prompt, answer and text of each turn survive the file; rows without the key have no ids."""
    parsed = parse(row("question", "answer", token_ids=[written_values(WRITTEN)]), "name")
    assert parsed.written == (WRITTEN,)
    assert parse(row("question", "answer"), "name").written == ()


def test_an_answer_that_ends_at_once_is_an_answer():
    """The verifier wrote nothing but the end of its turn, which is worth learning; without ids it is a fault."""
    empty = row("question", "")
    assert parse({**empty, "token_ids": [written_values(WRITTEN)]}, "name").written == (WRITTEN,)
    assert parse(empty, "name") == "an empty message"


@pytest.mark.parametrize(
    "ids",
    [
        "no list",
        [[1, 2]],
        [{"turn": 0, "prompt": [1], "answer": [2]}],
        [{"turn": 7, "prompt": [1], "answer": [2]}],
        [{"turn": 1, "prompt": [1], "answer": []}],
        [{"turn": 1, "prompt": [1], "answer": [-2]}],
        [{"turn": 1, "prompt": [1], "answer": [True]}],
        [{"turn": 1, "prompt": [1], "answer": [2], "text": 5}],
        [{"turn": 1, "prompt": [1], "answer": [2]}] * 2,
    ],
)
def test_ids_that_cannot_be_those_of_the_row_leave_it_out(ids):
    """A turn must be an assistant's, once, with ids for prompt and answer."""
    assert parse(row("question", "answer", token_ids=ids), "name") == BAD_IDS


def test_ids_of_another_tokenizer_are_recognised(tokenizer):
    """Ids that do not decode to the text beside them would train on nonsense."""
    ids = tokenizer("The rain<|im_end|>", add_special_tokens=False)["input_ids"]
    own = Written(turn=1, prompt=(1,), answer=tuple(ids), text=exact_text(tokenizer, ids))
    assert own.text == "The rain<|im_end|>"
    assert not from_other_tokenizer(tokenizer, [own])
    assert from_other_tokenizer(tokenizer, [Written(turn=1, prompt=(1,), answer=tuple(ids[1:]), text=own.text)])
