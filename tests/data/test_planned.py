"""A source that changes between its plan and the end of reading it is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from speculators.data.planned import as_planned
from speculators.errors import DataError
from speculators.recipe.fingerprint import source_identity
from speculators.recipe.input_sections import DataSource

ROW = '{"messages": []}\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(ROW)
    return tmp_path / "rows.jsonl"


def test_files_that_stay_as_they_are_pass(file: Path) -> None:
    """One file, a folder and a pattern are read without a word, and so is a hub's data set."""
    for path in (file, file.parent, file.parent / "*.jsonl"):
        source = DataSource(path=str(path))
        with as_planned(source, source_identity(source)):
            file.read_text()
    hub = DataSource(path="owner/set", revision="abc")
    with as_planned(hub, source_identity(hub)):
        pass


@pytest.mark.parametrize("when", ["before", "during"])
def test_an_edited_file_is_named(file: Path, when: str) -> None:
    """It does not matter whether the edit comes before the first row is read, or between two rows."""
    source = DataSource(path=str(file))
    identity = source_identity(source)
    if when == "before":
        file.write_text(ROW * 2)
    rows: list[str] = []
    with (
        pytest.raises(DataError, match=r"rows\.jsonl: changed after the plan was made.*\n.*run the command again"),
        as_planned(source, identity),
    ):
        rows += [file.read_text(), str(file.write_text(ROW * 2))]
    # Nothing is read where it is too late already.
    assert bool(rows) == (when == "during")


def test_an_added_or_removed_file_is_named(file: Path) -> None:
    """The files of a folder are part of what was planned."""
    source = DataSource(path=str(file.parent))
    identity = source_identity(source)
    with pytest.raises(DataError, match=r"more\.jsonl: changed"), as_planned(source, identity):
        (file.parent / "more.jsonl").write_text(ROW)
    file.unlink()
    (file.parent / "more.jsonl").rename(file.parent / "other.jsonl")
    with pytest.raises(DataError, match=r"other\.jsonl: changed"), as_planned(source, identity):
        pass


def test_an_edit_that_is_undone_is_refused_too(file: Path) -> None:
    """Rows may have been read in between, so that the hash at the end proves nothing."""
    source = DataSource(path=str(file))
    with pytest.raises(DataError, match="changed while it was read"), as_planned(source, source_identity(source)):
        os.utime(file, (1, 1))
