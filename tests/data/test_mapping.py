"""`map`: rows of any layout become conversations by the names of their fields."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_toys import row, talk
from transformers import AutoTokenizer

from speculators.data.plain_text import encode_text
from speculators.data.sources import read_source
from speculators.data.template import ChatTemplate
from speculators.errors import DataError
from speculators.recipe.field_map import FieldMap
from speculators.recipe.input_sections import DataSource
from speculators.structure.converter import structure


@pytest.fixture
def read(tmp_path: Path):
    def make(rows: list, **fields):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
        return read_source(DataSource(path=str(path), map=FieldMap(**fields) if fields else None), Path())

    return make


def test_prompt_and_completion_become_two_turns(read):
    """Other fields of the row are ignored, but id and category keep their usual names."""
    rows = [{"question": "q", "answer": "a", "id": 7, "category": "math", "x": 1}]
    (only,), skipped = read(rows, prompt="question", completion="answer")
    assert (only.id, only.category, only.messages) == ("7", "math", talk("q", "a").messages)
    assert not skipped


def test_a_text_may_be_made_of_several_fields(read):
    """An empty or null field leaves no white space at the end; an empty system message is none."""
    fields = {"prompt": "{instruction}\n\n{input}", "completion": "output", "system": "sys", "id": "{set}/{n}"}
    rows = [
        {"instruction": "Add.", "input": "1 1", "output": "2", "sys": "Be brief.", "set": "s", "n": 1},
        {"instruction": "Hi", "input": None, "output": "Hello", "sys": "", "set": "s", "n": 2},
    ]
    kept, _ = read(rows, **fields)
    assert kept[0].messages == talk("Add.\n\n1 1", "2", system="Be brief.").messages
    assert kept[1].messages == talk("Hi", "Hello").messages
    assert [each.id for each in kept] == ["s/1", "s/2"]


def test_messages_may_have_another_name(read):
    """Their layout is one of those that are known."""
    (only,), _ = read([{"dialog": row("q", "a")["messages"], "key": "k"}], messages="dialog", id="key")
    assert (only.id, only.messages) == ("k", talk("q", "a").messages)


def test_a_row_without_a_mapped_field_is_left_out(read):
    """The reason names the field, or what is wrong in it."""
    rows = [{"q": "q", "a": "a"}, {"q": "q"}, {"q": ["q"], "a": "a"}, ["q"]]
    kept, skipped = read(rows, prompt="q", completion="a")
    assert len(kept) == 1
    assert skipped == {"no field 'a'": 1, "its prompt is not text": 1, "not a JSON object": 1}


@pytest.mark.parametrize(
    ("keys", "suggestion"),
    [
        ({"question": "q", "answer": "a"}, 'map = { prompt = "question", completion = "answer" }'),
        ({"instruction": "q", "input": "", "output": "a"}, 'map = { prompt = "instruction", completion = "output" }'),
        ({"text": "t"}, 'map = { text = "text" }'),
    ],
)
def test_rows_of_another_layout_suggest_a_map(read, keys, suggestion):
    """Nothing is guessed, but the error names the fields and the line to write."""
    with pytest.raises(DataError) as caught:
        read([keys])
    assert suggestion in str(caught.value)


def test_plain_text_is_trained_on_as_it_stands(read, tiny_verifier):
    """No chat template is applied, and every token is supervised but the first."""
    kept, skipped = read([{"body": "once upon a time"}, {"body": " "}], text="body")
    assert skipped == {"an empty text": 1}
    tokenizer = AutoTokenizer.from_pretrained(tiny_verifier)
    encoded = ChatTemplate.of(tokenizer).encode(kept[0], 64)
    (encoded,) = encoded if isinstance(encoded, list) else (encoded,)
    assert encoded.input_ids.tolist() == tokenizer("once upon a time")["input_ids"]
    assert encoded.loss_mask.tolist() == [False] + [True] * (len(encoded.input_ids) - 1)


def test_a_text_gets_one_token_for_its_beginning():
    """A text that was rendered with a chat template begins with it already."""

    class WithStart:
        bos_token = "<s>"

        def __call__(self, text, *, add_special_tokens, verbose):
            return {"input_ids": [1] * add_special_tokens + [1 if part == "<s>" else 5 for part in text.split()]}

    for text in ("a b", "<s> a b"):
        assert encode_text(WithStart(), text, 8).input_ids.tolist() == [1, 5, 5]
    cut = encode_text(WithStart(), "a b c", 2)
    assert (cut.truncated, cut.loss_mask.tolist()) == (True, [False, True])
    assert encode_text(WithStart(), "<s>", 8) == "a text of one token"
    assert isinstance(cut.input_ids, np.ndarray)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"promt": "q"}, "did you mean 'prompt'"),
        ({}, "must name at least one field"),
        ({"completion": "a"}, "completion needs prompt"),
        ({"text": "t", "prompt": "q"}, "text cannot go with prompt"),
        ({"messages": "m", "prompt": "q"}, "messages cannot go with prompt"),
        ({"prompt": "{a"}, "expected '}'"),
        ({"prompt": "{}"}, "braces hold only the name"),
        ({"prompt": "{a!r}"}, "braces hold only the name"),
        ({"prompt": ""}, "must name a field"),
        ({"tools": "{a}{b}"}, "must be the name of one field"),
        ({"prompt": 3}, "must be a string"),
    ],
)
def test_a_wrong_map_says_what_is_wrong(table, said):
    """Each fault is at its key."""
    _, problems = structure({"path": "a.jsonl", "map": table}, DataSource)
    assert problems
    assert said in " ".join(map(str, problems))
