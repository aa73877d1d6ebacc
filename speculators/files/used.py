"""Marks on entries of the cache: which processes use one now, and which recipes and models it was used for."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from speculators.files.disk import CACHE_VARIABLE, disk_errors

# Open for as long as the process lives: the system frees their locks however it ends.
_MARKS: dict[Path, TextIO] = {}


def mark_file(entry: Path) -> Path:
    """The file that marks an entry, hidden beside it; its time of change is that of the last use."""
    return entry.with_name(f".{entry.name}.use")


def use(entry: Path, *users: str) -> None:
    """Marks an entry of the cache as used by this process until it ends; call it before looking whether it is there.

    While another process removes the entry, this waits.

    Args:
        entry: a file or folder, which need not exist.
        users: what it is used for, names of recipes and models, which are remembered.

    Raises:
        ArtifactError: the cache cannot be written.
    """
    file = mark_file(entry).absolute()
    with disk_errors(file, hint=f"set {CACHE_VARIABLE} to a folder that can be written"):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file not in _MARKS:
            stream = file.open("a+", encoding="utf-8")
            fcntl.flock(stream, fcntl.LOCK_SH)
            _MARKS[file] = stream
        known = used_for(entry)
        _MARKS[file].writelines(f"{user}\n" for user in users if user not in known)
        _MARKS[file].flush()
        os.utime(file)


def used_for(entry: Path) -> tuple[str, ...]:
    """Lists what an entry was used for, the oldest first."""
    file = mark_file(entry)
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return tuple(dict.fromkeys(text.splitlines()))


def is_used(entry: Path) -> bool:
    """Whether a process uses an entry."""
    if not mark_file(entry).is_file():
        return False
    with unused(entry) as free:
        return not free


@contextlib.contextmanager
def unused(entry: Path) -> Iterator[bool]:
    """Yields whether no process uses an entry, and keeps it so inside the block."""
    with mark_file(entry).open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
