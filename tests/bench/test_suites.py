"""Suites: two layouts, a catalogue, and no prompt lost silently."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import tomli

from speculators.bench.suites import load_suite
from speculators.data.messages import Conversation, Message
from speculators.errors import DataError
from speculators.recipe.catalog import suite_names, suites_folder
from speculators.recipe.input_sections import DataSource
from speculators.recipe.schema import Suite

MESSAGES = [
    {
        "id": "a",
        "category": "chat",
        "split": "test",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Nothing."},
        ],
    },
    {
        "id": "b",
        "split": "train",
        "messages": [{"role": "user", "content": "Train"}, {"role": "assistant", "content": "x"}],
    },
    {"id": "c", "category": "code", "split": "test", "messages": [{"role": "user", "content": "Unanswered"}]},
]
TURNS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite.", "Again."], "reference": ["..."]},
    {"question_id": 82, "category": "math", "turns": ["1 + 1?"]},
]


def _file(folder: Path, rows: list) -> str:
    path = folder / "suite.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_last_assistant_turn_of_a_conversation_is_the_answer(tmp_path):
    """The messages before it are the prompt; a conversation that ends with a question has no answer."""
    first, second = load_suite(Suite(name="mine", path=_file(tmp_path, MESSAGES), split="test"))
    assert (first.id, first.category, first.answer.content) == ("a", "chat", "Nothing.")
    assert first.messages[-1] == Message("user", "And?")
    assert len(first.messages) == 4
    assert (second.id, second.answer, second.messages) == ("c", None, (Message("user", "Unanswered"),))


def test_the_field_s_layout_has_turns_that_follow_the_verifiers_own_answers(tmp_path):
    """The first turn is the prompt and the others come later; reference answers are not used."""
    first, second = load_suite(Suite(name="mine", path=_file(tmp_path, TURNS)))
    assert (first.id, first.category, first.answer) == ("81", "writing", None)
    assert (first.messages, first.later) == ((Message("user", "Write."),), ("Rewrite.", "Again."))
    assert second.later == ()


def test_a_relative_path_starts_from_the_working_folder(tmp_path, monkeypatch):
    """Command lines give relative paths; recipes make theirs absolute when they are loaded."""
    _file(tmp_path, TURNS)
    monkeypatch.chdir(tmp_path)
    assert len(load_suite(Suite(name="mine", path="./suite.jsonl"))) == 2


def test_a_suite_of_the_catalogue_may_be_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """It is fetched rather than looked up beside the suite's TOML; the recipe may override split and take."""
    text = 'name = "hub"\nsummary = ""\npath = "owner/questions"\nsplit = "test"\ntake = 7\n'
    (tmp_path / "hub.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr("speculators.recipe.catalog.suites_folder", lambda: tmp_path)
    asked = []

    def read(source, base):
        asked.append(source)
        return [Conversation("a", "", (Message("user", "Hello?"), Message("assistant", "Hello.")))], Counter()

    monkeypatch.setattr("speculators.bench.suites.read_source", read)
    assert [prompt.answer.content for prompt in load_suite(Suite(name="hub"))] == ["Hello."]
    load_suite(Suite(name="hub", split="train", take=2))
    assert asked == [
        DataSource(path="owner/questions", split="test", take=7),
        DataSource(path="owner/questions", split="train", take=2),
    ]


def test_take_takes_the_first_prompts_of_the_split(tmp_path):
    """`take` counts the rows of the split, not those of the file."""
    assert [p.id for p in load_suite(Suite(name="mine", path=_file(tmp_path, MESSAGES), split="test", take=1))] == ["a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty: it has no rows"),
        ("{", ":1: not a JSON object"),
        ("[1]", ":1: not a JSON object"),
        ('{"turns": []}', ":1: turns must be a list of questions"),
        ('{"turns": [3]}', ":1: turns must be a list of questions"),
        ('{"question": "?"}', ":1: no messages"),
        ('{"messages": "?"}', ":1: no messages"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "unknown role 'bot'"),
        ('{"turns": ["x"], "question_id": 1}\n{"turns": ["y"], "question_id": 1}', "'1' occurs twice"),
        ("\x00\x01", "binary"),
    ],
)
def test_a_row_that_cannot_be_used_is_an_error_that_names_it(text, message, tmp_path):
    """A suite that silently shrinks is a different suite."""
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_suite(Suite(name="mine", path=str(path)))


def test_a_missing_file_or_split_or_name_is_an_error(tmp_path):
    """Each error names what is missing; a misspelt name gets the near miss."""
    with pytest.raises(DataError, match="no such file"):
        load_suite(Suite(name="mine", path=str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="no row has split 'validation'"):
        load_suite(Suite(name="mine", path=_file(tmp_path, MESSAGES), split="validation"))
    with pytest.raises(DataError, match="did you mean 'quickstart'"):
        load_suite(Suite(name="quikstart"))


def test_the_catalogues_suites_are_well_formed():
    """Each suite states its name, a summary, and where its prompts are."""
    assert "quickstart" in suite_names()
    for name in suite_names():
        told = tomli.loads((suites_folder() / f"{name}.toml").read_text(encoding="utf-8"))
        assert told["name"] == name
        assert told["summary"]
        assert told["path"]


def test_the_quickstart_suite_is_the_held_out_split_with_answers():
    """Its prompts are found where the recipes keep their data, whatever the working folder."""
    prompts = load_suite(Suite(name="quickstart"))
    assert len(prompts) >= 50
    assert all(prompt.answer and prompt.category for prompt in prompts)
