"""Suites: two layouts, a catalogue, and no prompt lost silently."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli

from speculators.bench.suites import load_suite
from speculators.data.messages import Message
from speculators.errors import DataError, RecipeError
from speculators.recipe.catalog import resolved_suite, suite_names, suites_folder
from speculators.recipe.checks import suite_fault
from speculators.recipe.field_map import SuiteMap
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


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the library `datasets`: a list of the calls, and rows by the id of the data set."""
    calls, rows = [], {}

    def load_dataset(path, subset, *, split, revision):
        calls.append((path, subset, split, revision))
        return rows[path]

    library = SimpleNamespace(load_dataset=load_dataset, disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", library)
    return SimpleNamespace(calls=calls, rows=rows)


def test_a_suite_of_the_catalogue_may_be_a_data_set_of_the_hub(hub):
    """It is fetched at the catalogue's revision; the recipe may override split and take."""
    hub.rows["openai/gsm8k"] = [{"question": f"{n} + 1?", "answer": "..."} for n in range(90)]
    prompts = load_suite(Suite(name="gsm8k"))
    assert [prompt.messages for prompt in prompts[:2]] == [(Message("user", "0 + 1?"),), (Message("user", "1 + 1?"),)]
    assert (len(prompts), prompts[0].answer) == (80, None)
    assert len(load_suite(Suite(name="gsm8k", split="train", take=2))) == 2
    revision = "740312add88f781978c0658806c59bc2815b9866"
    assert hub.calls == [("openai/gsm8k", "main", split, revision) for split in ("test", "train")]


# A row as the hub's viewer shows it, without the fields that are not read, and what becomes of it.
HUB_ROWS = {
    "mt_bench": (
        {"prompt": ["Write.", "Rewrite."], "prompt_id": 81, "category": "writing", "reference": []},
        ("81", "writing", "Write.", ("Rewrite.",)),
    ),
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "", "test": ""},
        ("HumanEval/0", "", "Complete the code I provided.\n\ndef f():", ()),
    ),
    "math_500": (
        {"problem": "1 + 1?", "unique_id": "test/algebra/1.json", "subject": "Algebra", "answer": "2"},
        ("test/algebra/1.json", "Algebra", "1 + 1?", ()),
    ),
    "alpaca": ({"instruction": "Sort.", "input": "b, a", "output": "a, b"}, ("alpaca:0", "", "Sort.\n\nb, a", ())),
    "aime_2024": ({"id": 60, "problem": "How many?", "answer": "204"}, ("60", "", "How many?", ())),
    "speed_bench": (
        {"question_id": "q1", "category": "coding", "turns": ["Code.", "Test."], "source": ""},
        ("q1", "coding", "Code.", ("Test.",)),
    ),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_the_maps_of_the_catalogue_read_the_rows_of_the_hub(hub, name):
    """Questions, ids and categories; reference answers are another model's, and are not read."""
    row, expected = HUB_ROWS[name]
    hub.rows[resolved_suite(Suite(name=name)).path] = [row]
    (prompt,) = load_suite(Suite(name=name))
    assert (prompt.id, prompt.category, prompt.messages[-1].content, prompt.later) == expected
    assert prompt.answer is None


def test_a_map_reads_rows_of_any_layout(tmp_path):
    """The suite's own answer counts where the map names it."""
    path = _file(tmp_path, [{"q": "1 + 1?", "a": "2", "kind": "sums"}])
    (prompt,) = load_suite(Suite(name="mine", path=path, map=SuiteMap(prompt="q", completion="a", category="kind")))
    assert (prompt.id, prompt.category, prompt.answer.content) == ("suite:1", "sums", "2")
    with pytest.raises(DataError, match="no field 'question'"):
        load_suite(Suite(name="mine", path=path, map=SuiteMap(prompt="question")))
    with pytest.raises(DataError, match="turns must be a list of questions"):
        load_suite(Suite(name="mine", path=path, map=SuiteMap(turns="q")))


def test_a_file_of_your_own_describes_a_suite_as_the_catalogue_does(tmp_path):
    """Its path starts from the file; what the recipe says beside it comes first."""
    _file(tmp_path, [{"q": "1 + 1?"}, {"q": "2 + 2?"}])
    file = tmp_path / "sums.toml"
    file.write_text('path = "suite.jsonl"\nmap = { prompt = "q" }\ntake = 2\n', encoding="utf-8")
    assert len(load_suite(Suite(name="mine", path=str(file)))) == 2
    assert len(load_suite(Suite(name="mine", path=str(file), take=1))) == 1
    for text, message in (("take = 2", "path: is missing"), ("path = 3", "path: "), ("path", "cannot be read")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=rf"sums\.toml: {message}"):
            load_suite(Suite(name="mine", path=str(file)))
        assert "sums.toml" in suite_fault(Suite(name="mine", path=str(file)))[0]


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
