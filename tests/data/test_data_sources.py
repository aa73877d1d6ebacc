"""Sources: every format gives the same conversations, files are read in order, no bad row ends a job."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from data_toys import row, some_rows, talk

from speculators.data.json_rows import LONE_SURROGATE, LONGEST_BYTES, REPEATED_KEY, TOO_DEEP, TOO_LONG
from speculators.data.row_files import read_rows
from speculators.data.sources import count_rows, read_source
from speculators.errors import DataError
from speculators.recipe.input_sections import DataSource

ROWS = [row("one", "a", id="1"), row("two", "é\u2028", id="2"), row("three", "c", "four", "d", id="3")]


def lines(rows: list) -> bytes:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows).encode()


def zst(content: bytes) -> bytes:
    pa = pytest.importorskip("pyarrow")
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def table(rows: list, form: str) -> bytes:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    sink, values = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    if form == "parquet":
        pyarrow.parquet.write_table(values, sink)
    else:
        make = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
        with make(sink, values.schema) as writer:
            writer.write_table(values)
    return sink.getvalue().to_pybytes()


FORMATS = {
    "rows.jsonl": lines,
    "rows.jsonl.gz": lambda rows: gzip.compress(lines(rows[:1])) + gzip.compress(lines(rows[1:])),
    "rows.jsonl.zst": lambda rows: zst(lines(rows[:1])) + zst(lines(rows[1:])),
    "rows.json": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows, indent=1, ensure_ascii=False).encode(),
    "rows.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "rows.parquet": lambda rows: table(rows, "parquet"),
    "rows.arrow": lambda rows: table(rows, "file"),
    "data-00000-of-00001.arrow": lambda rows: table(rows, "stream"),
    "dos.jsonl": lambda rows: b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n"),
}


def read(path: object, **keys):
    return read_source(DataSource(path=str(path), **keys), Path())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_conversations(tmp_path, name):
    """The first bytes tell the format: the suffix only decides which files of a folder are read."""
    file = tmp_path / name
    file.write_bytes(FORMATS[name](ROWS))
    kept, skipped = read(file)
    assert [(each.id, each.messages) for each in kept] == [
        ("1", talk("one", "a").messages),
        ("2", talk("two", "é\u2028").messages),
        ("3", talk("three", "c", "four", "d").messages),
    ]
    assert not skipped
    assert count_rows(DataSource(path=str(file)), Path()) == 3
    assert count_rows(DataSource(path=str(file), take=2), Path()) == 2


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("rows.jsonl", "dos.jsonl")])
def test_a_file_that_was_cut_short_is_an_error_that_names_it(tmp_path, name):
    """Half of a download must not be trained on as if it were whole."""
    file, content = tmp_path / name, FORMATS[name](some_rows(300))
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=f"{name}.*(damaged|cut short)"):
        read(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(lines(ROWS))[:30] + b"\0" * 60, "damaged"),
        (b"PK\x03\x04" + b"\0" * 99, "zip archive.*\n.*extract"),
        (gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar".ljust(255, b"\0")), "tar archive.*\n.*extract"),
        (b"\xff\xfe" + "[]".encode("utf-16-le"), "UTF-16.*\niconv"),
        (b"[{}] [{}]", "none of its 1 rows"),
        (b'[{"a": 1}, {"b" 2}]', "element 2 of the array"),
        (b'[{"a": 1} {"b": 2}]', "after element 1 of the array comes '{'"),
        (b'["\xff"]', "not UTF-8"),
        (b"[]", "empty: it has no rows"),
    ],
    # Compressed bytes contain the time, and the names of tests must be the same in every worker.
    ids=["gzip", "zip", "tar", "UTF-16", "two arrays", "element", "comma", "UTF-8", "empty"],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, content, said):
    """No reader's own exception reaches the user."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        read(file)
    assert "rows.jsonl" in str(caught.value)


@pytest.mark.parametrize("name", ["rows.jsonl.zst", "rows.parquet", "rows.arrow"])
def test_a_missing_library_is_named_with_its_command(tmp_path, monkeypatch, name):
    """Plain JSONL needs nothing; formats that do name what to install."""
    file = tmp_path / name
    file.write_bytes(FORMATS[name](ROWS))
    for module in ("pyarrow", "pyarrow.ipc", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"pip install 'spec-recipes\[datasets\]'"):
        read(file)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl.gz"])
def test_rows_are_read_in_constant_memory(tmp_path, name):
    """A file may be larger than the memory."""
    file, text = tmp_path / name, "x" * 2000
    file.write_bytes(FORMATS[name]([row(str(k), text) for k in range(4000)]))
    tracemalloc.start()
    assert sum(1 for _ in read_rows(file)) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_500_000


BAD = {
    "a prompt": (json.dumps(row("\ud83d", "a")), LONE_SURROGATE),
    "an answer": (json.dumps(row("q", "half \ude00")), LONE_SURROGATE),
    "an id": (json.dumps(row("q", "a", id="\ud83d")), LONE_SURROGATE),
    "a category": (json.dumps(row("q", "a", category="\ud83d")), LONE_SURROGATE),
    "tools": (json.dumps(row("q", "a", tools=[{"function": {"name": {"\ud83d": 1}}}])), LONE_SURROGATE),
    "an unread field": (json.dumps(row("q", "a", source="\ud83d")), LONE_SURROGATE),
    "a bomb": ('{"messages": ' + "[" * 5000 + "]" * 5000 + "}", TOO_DEEP),
    "a smaller bomb": ('{"messages": [], "x": ' + "[" * 200 + "]" * 200 + "}", TOO_DEEP),
    "two answers": ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', REPEATED_KEY),
    "an endless number": ('{"messages": ' + "9" * 5000 + "}", "not a JSON object"),
    "no UTF-8": ('{"messages": "\udcff"}', "not a JSON object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_no_stage_could_take_is_left_out_with_its_reason(tmp_path, kind):
    """It costs neither its neighbours nor the job."""
    line, reason = BAD[kind]
    file = tmp_path / "rows.jsonl"
    content = lines([ROWS[0]]) + line.encode(errors="surrogateescape") + b"\n" + lines([ROWS[1]])
    file.write_bytes(content)
    kept, skipped = read(file)
    assert [each.id for each in kept] == ["1", "2"]
    assert skipped == {reason: 1}


def test_arguments_that_are_json_inside_a_text_are_checked_as_well(tmp_path):
    """OpenAI's layout has the arguments of a call as text."""
    for arguments, reason in (
        ('{"x": "\\ud83d"}', LONE_SURROGATE),
        ('{"x": ' + "[" * 80 + "]" * 80 + "}", TOO_DEEP),
    ):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        file = tmp_path / "rows.jsonl"
        file.write_bytes(lines([{"messages": turns}, ROWS[0]]))
        assert read(file)[1] == {reason: 1}


def test_odd_but_valid_rows_are_kept(tmp_path):
    """NUL, line breaks in an id, whole pairs of surrogates, and null where a field is absent."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines([row("q\0", "\U0001f600", id="a\nb"), row("q", "a", id=None, category=None)]))
    kept, skipped = read(file)
    assert [(each.id, each.category) for each in kept] == [("a\nb", ""), ("rows:2", "")]
    assert not skipped


def test_a_line_of_many_megabytes_is_passed_over(tmp_path):
    """It is never held in memory as a whole."""
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as out:
        out.write(b'{"messages": "' + b"x" * LONGEST_BYTES + b'"}\n' + lines(ROWS[:1]))
    kept, skipped = read(file)
    assert [each.id for each in kept] == ["1"]
    assert skipped == {TOO_LONG: 1}


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    """Also below it; what is hidden, describes the data or says where answers come from is no data."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    content = {"b.jsonl": ["3"], "a.jsonl.gz": ["1", "2"], "sub/a.json": ["4"]}
    for name, prompts in content.items():
        rows = [row(prompt, "a") for prompt in prompts]
        (tmp_path / name).write_bytes(FORMATS[f"rows.{name.partition('.')[2]}"](rows))
    for name in (".hidden.jsonl", ".cache/x.jsonl", "dataset_info.json", "b.jsonl.json", "README.md"):
        (tmp_path / name).write_text("{}")
    kept, skipped = read(tmp_path)
    assert [(each.prompt, each.id) for each in kept] == [("1", "a:1"), ("2", "a:2"), ("3", "b:1"), ("4", "sub/a:1")]
    assert not skipped
    assert [each.prompt for each in read(tmp_path, take=3)[0]] == ["1", "2", "3"]
    assert [each.prompt for each in read(f"{tmp_path}/*.jsonl*", take=None)[0]] == ["1", "2", "3"]
    assert [each.prompt for each in read(f"{tmp_path}/**/a.*")[0]] == ["1", "2", "4"]


@pytest.mark.parametrize("name", ["more.csv", "more.zip", "more.tar.gz", "part-0.gz"])
def test_a_folder_with_data_that_is_not_read_is_refused(tmp_path, name):
    """Leaving it out without a word would train on half of the data."""
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{name} cannot be read.*\n.*pattern"):
        read(tmp_path)


def test_names_in_a_folder_state_splits_as_on_the_hub(tmp_path):
    """A copy of a data set's repository holds all its splits: which is meant must be said, then only that is read."""
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test_sft-00000-of-00001", "dev/part"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_bytes(lines([row(name, "a")]))
    with pytest.raises(DataError, match='splits test_sft, train, validation\nsay which: split = "train"'):
        read(tmp_path)
    with pytest.raises(DataError, match="no file is of split 'test'; available: test_sft, train, validation"):
        read(tmp_path, split="test")
    for split, prompts in {
        "train": ["train-00000-of-00002", "train-00001-of-00002"],
        "test_sft": ["test_sft-00000-of-00001"],
        "validation": ["dev/part"],
    }.items():
        assert [each.prompt for each in read(tmp_path, split=split)[0]] == prompts


def test_rows_of_a_folder_without_any_split_are_for_training(tmp_path):
    """A row's own field comes first; a data set without splits is "train" on the hub, too."""
    (tmp_path / "all.jsonl").write_bytes(lines([row("1", "a"), row("2", "a", split="test")]))
    assert [each.prompt for each in read(tmp_path, split="train")[0]] == ["1"]
    assert [each.prompt for each in read(tmp_path, split="test")[0]] == ["2"]
    assert len(read(tmp_path)[0]) == 2


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("absent", "no such file or folder"),
        ("*.jsonl", "no file matches"),
        ("empt*", "only folders match"),
        ("empty", "has no file with rows"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_source_without_files_says_so(tmp_path, path, said):
    """Nothing is looked up on the network."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=said):
        read(tmp_path / path)


def test_a_data_set_saved_by_the_library_is_a_folder_like_any_other(tmp_path):
    """`save_to_disk` writes Arrow streams, one folder a split, and files that describe them."""
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list([row(name, "a")]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    kept, skipped = read(tmp_path / "saved", split="test")
    assert [each.prompt for each in kept] == ["test"]
    assert not skipped


def test_counts_of_rows_need_no_conversation(tmp_path):
    """A plan counts what lies there, usable or not."""
    (tmp_path / "a.jsonl").write_bytes(lines([{}, *ROWS]))
    (tmp_path / "b.jsonl").write_bytes(b"broken\n")
    assert count_rows(DataSource(path=str(tmp_path)), Path()) == 5
    assert count_rows(DataSource(path="owner/name", take=7), Path()) == 7
    assert count_rows(DataSource(path="owner/name"), Path()) is None
    assert Counter(read(tmp_path)[1]) == {"no messages": 1, "not a JSON object": 1}
