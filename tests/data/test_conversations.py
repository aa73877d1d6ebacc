"""Reading conversations: formats, splits, and rows and files that cannot be used."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest
from data_toys import row, talk

from speculators.data.conversations import parse, prompt_key
from speculators.data.sources import read_source, stream_source
from speculators.errors import DataError
from speculators.recipe.input_sections import DataSource


def read(path, base, **keys):
    return read_source(DataSource(path=str(path), **keys), base)


def test_both_layouts_give_the_same_conversation(jsonl, tmp_path):
    """`messages` with role/content and ShareGPT `conversations` with from/value are read alike."""
    gpt = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
    ]
    path = jsonl([{"conversations": gpt, "id": 7, "category": "chat"}, {"messages": chat, "id": 7, "category": "chat"}])
    (one, other), skipped = read(path, tmp_path)
    assert one == other
    assert (one.id, one.category, one.prompt) == ("7", "chat", "hi")
    assert not skipped


def test_missing_id_names_file_and_line(jsonl, tmp_path):
    """A row without an id is named after its file and line, so that a message can point at it."""
    (only,), _ = read(jsonl([row("hi", "yo")]), tmp_path)
    assert only.id == "rows:1"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "no assistant turn"),
        ({"messages": []}, "no messages"),
        ({"text": "x"}, "no messages"),
        ([1], "not a JSON object"),
        ({"messages": ["x"]}, "a message is not an object"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "unknown role 'bot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a message is not text"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}]}, "an empty message"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role \"['user']\""),
    ],
)
def test_unusable_row_is_counted_not_fatal(jsonl, tmp_path, bad, reason):
    """A bad row is skipped with its reason, and the rows around it are kept."""
    kept, skipped = read(jsonl([row("1", "a"), bad, row("2", "b")]), tmp_path)
    assert [conversation.prompt for conversation in kept] == ["1", "2"]
    assert skipped == {reason: 1}


def test_line_that_is_not_json_is_counted(tmp_path):
    """A broken line (truncated JSON, bytes that are not UTF-8) costs only that line."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(row("1", "a")).encode() + b'\n{"mess\n\xff\xfe{}\n\n')
    kept, skipped = read(path, tmp_path)
    assert len(kept) == 1
    assert skipped == {"not a JSON object": 2}


def test_question_without_an_answer_is_cut_off():
    """A final user turn supervises nothing: it is dropped, and the rest is used."""
    found = parse(row("a", "b", "c"), "x")
    assert found.messages == talk("a", "b").messages


def test_split_filters_rows_and_take_takes_the_first(jsonl, tmp_path):
    """`split` filters by the row's field; `take` counts the rows of that split, usable or not."""
    rows = [row(str(k), "a", split=("train", "test")[k % 3 == 0]) for k in range(9)]
    rows[1] = {"split": "train"}
    kept, skipped = read(jsonl(rows), tmp_path, split="train", take=3)
    assert [conversation.prompt for conversation in kept] == ["2", "4"]
    assert skipped.total() == 1


def test_unknown_split_names_those_there_are(jsonl, tmp_path):
    """A split that no row has raises an error that lists the splits of the file."""
    path = jsonl([row("1", "a", split="train"), row("2", "a")])
    with pytest.raises(DataError, match=r"no row has split 'dev'; available: 1 'train', 1 without a split"):
        read(path, tmp_path, split="dev")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"\n  \n", "empty"),
        (b"\x7fELF\x00\x01\x02", "binary"),
        (b"\x1f\x8b\x08zip", "damaged or cut short"),
        (b'[{"messages": []}]', "none of its 1 rows can be used: 1 no messages"),
        (b"just\ntext\n", r"none of its 2 rows can be used: 2 not a JSON object"),
    ],
)
def test_whole_file_that_cannot_be_used(tmp_path, content, said):
    """An empty, binary or wrongly formatted file raises one error that says which it is."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        read(path, tmp_path)
    assert "rows.jsonl" in str(caught.value)


def test_all_user_turns_explain_themselves(jsonl, tmp_path):
    """A file without any answer raises an error that says so, instead of training on nothing."""
    with pytest.raises(DataError, match="none of its 2 rows can be used: 2 no assistant turn"):
        read(jsonl([row("1"), row("2")]), tmp_path)


def test_missing_file_is_not_taken_for_a_hub_id(tmp_path):
    """A missing path that looks like a file raises an error about a file, without using the network."""
    with pytest.raises(DataError, match="no such file"):
        read("./absent.jsonl", tmp_path)


def test_relative_path_starts_from_the_base(jsonl, tmp_path):
    """A relative path starts from the recipe's folder, not from the working directory."""
    jsonl([row("1", "a")])
    assert len(read("rows.jsonl", tmp_path)[0]) == 1


def test_wrong_sha256_is_refused(jsonl, tmp_path):
    """A file with another sha256 than the recipe's is not read."""
    with pytest.raises(DataError, match="the recipe says 0000"):
        read(jsonl([row("1", "a")]), tmp_path, sha256="0" * 64)


def test_rows_stream(jsonl, tmp_path):
    """Rows are read lazily: a bad row further down has no effect until it is reached."""
    skipped: Counter[str] = Counter()
    path = jsonl([row("1", "a"), {"bad": 1}])
    stream = stream_source(DataSource(path=str(path)), tmp_path, skipped)
    assert next(stream).prompt == "1"
    assert not skipped
    assert list(stream) == []
    assert skipped.total() == 1


def test_data_set_that_cannot_be_loaded(tmp_path):
    """A hub id without network (the tests are offline) raises one clear error."""
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"nobody/nothing: cannot be loaded.*\n.*network"):
        read("nobody/nothing", tmp_path)


def test_missing_library_says_what_to_install(tmp_path, monkeypatch):
    """Without `datasets`, a hub id raises an error with the command that installs it."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'spec-recipes\[datasets\]'"):
        read("some/name", tmp_path)


def test_pins_do_not_pass_silently(jsonl, tmp_path):
    """A revision for a file, or a sha256 for a hub id, would pin nothing; both are refused."""
    with pytest.raises(DataError, match="wrong kind of pin"):
        read(jsonl([row("1", "a")]), tmp_path, revision="main")
    with pytest.raises(DataError, match="wrong kind of pin"):
        read("some/name", tmp_path, sha256="0" * 64)


def test_prompt_key_ignores_case_and_spacing():
    """The same question in other spacing, case or width has the same key; another question has another key."""
    assert prompt_key("What  is\nTHIS?") == prompt_key(" what is this? ") == prompt_key("\uff57hat is this?")
    assert prompt_key("what is that?") != prompt_key("what is this?")
