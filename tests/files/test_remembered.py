"""The hash of a big file is recalled only while the file is certainly the same."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from speculators.errors import ArtifactError
from speculators.files import remembered
from speculators.files.disk import file_sha256
from speculators.files.remembered import remembered_sha256

LATER_NS = 10_000_000_000


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read so far; every file counts as big, and the clock says that it was written long ago."""
    hashed: list[Path] = []

    def reading(path: Path) -> str:
        hashed.append(path)
        return file_sha256(path)

    clock = time.time_ns
    monkeypatch.setenv("SPECULATORS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "LEAST_BYTES", 1)
    monkeypatch.setattr(remembered, "file_sha256", reading)
    monkeypatch.setattr(remembered.time, "time_ns", lambda: clock() + LATER_NS)
    return hashed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("one")
    return tmp_path / "rows.jsonl"


def test_a_file_is_read_once(read: list[Path], file: Path, tmp_path: Path) -> None:
    """Its hash is kept below the cache, by the path that links lead to."""
    (tmp_path / "link").symlink_to(file)
    assert {remembered_sha256(file), remembered_sha256(file), remembered_sha256(tmp_path / "link")} == {
        file_sha256(file)
    }
    assert read == [file]
    assert list(json.loads((tmp_path / "cache" / "hashes.json").read_text())) == [str(file)]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["hashes.json"]


@pytest.mark.parametrize("change", ["content", "times put back", "replaced", "touched"])
def test_a_file_that_may_have_changed_is_read_again(read: list[Path], file: Path, change: str) -> None:
    """Size, inode and both times must be as they were; that of the content alone could be put back."""
    before = file.stat()
    remembered_sha256(file)
    time.sleep(0.02)  # longer than a tick of the file system's clock
    if change == "replaced":
        (file.parent / "new").write_text("two")
        (file.parent / "new").replace(file)
    elif change != "touched":
        file.write_text("two")
    if change == "touched":
        os.utime(file, (1, 1))
    elif change != "content":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert remembered_sha256(file) == file_sha256(file)
    assert read == [file, file]


def test_a_file_that_was_just_written_is_not_remembered(
    read: list[Path], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit within the same tick of the clock would not show."""
    monkeypatch.setattr(remembered, "UNSETTLED_NS", LATER_NS * 2)
    assert remembered_sha256(file) == remembered_sha256(file)
    assert read == [file, file]


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    read: list[Path], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows which content the hash belongs to."""

    def growing(path: Path) -> str:
        digest = file_sha256(path)
        path.write_text(path.read_text() + "more")
        return digest

    monkeypatch.setattr(remembered, "file_sha256", growing)
    remembered_sha256(file)
    assert not (file.parent / "cache").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"PATH": 1}', '{"PATH": {"sha256": "0"}}', '{"gone.jsonl": {}}'])
def test_a_damaged_store_is_written_anew(read: list[Path], file: Path, text: str) -> None:
    """Nothing in it is believed; entries of files that are gone are dropped."""
    store = file.parent / "cache" / "hashes.json"
    store.parent.mkdir()
    store.write_text(text.replace("PATH", str(file)))
    assert remembered_sha256(file) == file_sha256(file)
    assert list(json.loads(store.read_text())) == [str(file)]


def test_a_cache_that_cannot_be_written_costs_only_time(
    read: list[Path], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans are made all the same; a file that is missing is an error."""
    (file.parent / "cache").write_text("a file")
    assert remembered_sha256(file) == remembered_sha256(file)
    assert read == [file, file]
    with pytest.raises(ArtifactError, match=r"gone\.jsonl"):
        remembered_sha256(file.with_name("gone.jsonl"))


def test_a_small_file_is_always_read(read: list[Path], file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept of it."""
    monkeypatch.setattr(remembered, "LEAST_BYTES", file.stat().st_size + 1)
    assert remembered_sha256(file) == remembered_sha256(file)
    assert read == [file, file]
    assert not (file.parent / "cache").exists()
