"""Folders are complete or not there, whatever happens while they are made."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from speculators.errors import ArtifactError, VerifierError
from speculators.files.disk import cache_folder, write_json
from speculators.files.folders import is_intact, make_once

CONTENT = b"weights" * 1000


def fill(work: Path) -> None:
    (work / "model").write_bytes(CONTENT)
    (work / "deep").mkdir()
    (work / "deep/config").write_bytes(b"{}")


def count_and_fill(work: Path) -> None:
    with (work.parent / "calls").open("a") as calls:
        calls.write("x")
    time.sleep(0.5)
    fill(work)


def make_in_process(folder: Path) -> None:
    make_once(folder, count_and_fill, facts={})


def hang_half_written(folder: Path) -> None:
    def make(work: Path) -> None:
        (work / "model").write_bytes(CONTENT[:10])
        (work.parent / "half").write_text("")
        time.sleep(60)

    make_once(folder, make, facts={})


def damaged(folder: Path, how: str) -> None:
    path = folder / "model"
    if how == "flipped":
        path.write_bytes(CONTENT[:-1] + b"!")
    elif how == "cut":
        path.write_bytes(CONTENT[:-1])
    elif how == "gone":
        path.unlink()
    else:
        (folder / "manifest.json").write_text('{"files": ' if how == "manifest cut" else "[]")


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "manifest cut", "manifest odd"])
def test_a_damaged_folder_is_made_anew(tmp_path: Path, how: str):
    """A changed, cut or missing file, or a broken manifest, is noticed, and the folder is whole again afterwards."""
    folder = make_once(tmp_path / "f", fill, facts={})
    damaged(folder, how)
    assert not is_intact(folder)
    make_once(folder, fill, facts={})
    assert (folder / "model").read_bytes() == CONTENT
    assert is_intact(folder)


def test_an_intact_folder_is_left_alone(tmp_path: Path):
    """An intact folder is not made again, even as a copy with other times of change."""
    folder = make_once(tmp_path / "f", fill, facts={})
    os.utime(folder / "model", ns=(1, 1))
    make_once(folder, lambda work: pytest.fail("made again"), facts={})


def test_a_failure_leaves_nothing_behind(tmp_path: Path):
    """An exception or Ctrl-C while a folder is made leaves neither a folder that looks finished nor temporary files."""
    for error in (KeyboardInterrupt, VerifierError("bad")):

        def make(work: Path, error: BaseException | type[BaseException] = error) -> None:
            fill(work)
            raise error

        with pytest.raises((KeyboardInterrupt, VerifierError)):
            make_once(tmp_path / "f", make, facts={})
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith((".lock", ".use"))] == []


def test_a_full_disk_is_one_clear_error(tmp_path: Path):
    """The error names the folder and the variable that moves the cache."""

    def make(work: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match=r"(?s)f: the disk is full.*SPECULATORS_CACHE"):
        make_once(tmp_path / "f", make, facts={})


def test_two_processes_make_it_once(tmp_path: Path):
    """Of several processes that need the same folder, one makes it and the others wait."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=make_in_process, args=(tmp_path / "f",)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "calls").read_text() == "x"
    assert is_intact(tmp_path / "f")


def test_a_killed_process_leaves_no_obstacle(tmp_path: Path):
    """After kill -9 in the middle nothing looks finished; the next process cleans up and makes the folder."""
    worker = multiprocessing.get_context("fork").Process(target=hang_half_written, args=(tmp_path / "f",))
    worker.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "half").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(10)
    assert not (tmp_path / "f").exists()
    make_once(tmp_path / "f", fill, facts={})
    assert is_intact(tmp_path / "f")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".f.lock", ".f.use", "f", "half"]


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """$SPECULATORS_CACHE names the cache folder; the default is ~/.cache/speculators."""
    monkeypatch.setenv("SPECULATORS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("SPECULATORS_CACHE")
    assert cache_folder() == Path.home() / ".cache/speculators"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    """Weights, which safetensors writes for their owner alone, can be read by whom the user's umask lets read."""

    def make(work: Path) -> None:
        save_file({"weight": np.zeros(3, dtype=np.float32)}, work / "model.safetensors")

    before = os.umask(mask)
    try:
        folder = make_once(tmp_path / "folder", make, facts={})
        write_json(tmp_path / "run.json", {})
    finally:
        os.umask(before)
    files = [*(path for path in folder.rglob("*") if path.is_file()), tmp_path / "run.json"]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        name: oct(mode) for name in ("model.safetensors", "manifest.json", "run.json")
    }
