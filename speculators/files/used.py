"""Marks on entries of the cache: which processes use one now, and which recipes and models it was used for."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from speculators.files.disk import CACHE_VARIABLE, disk_errors

# A cache that we cannot write, or whose file system has no locks, cannot be marked: nor can it be pruned from here.
_NO_MARKS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.ENOTSUP)
# Open for as long as the process lives: the system frees their locks however it ends.
_MARKS: dict[Path, TextIO] = {}


def mark_file(entry: Path) -> Path:
    """The file that marks an entry, hidden beside it; its time of change is that of the last use."""
    return entry.with_name(f".{entry.name}.use")


def use(entry: Path, *users: str) -> None:
    """Marks an entry of the cache as used by this process until it ends; call it before looking whether it is there.

    While another process removes the entry, this waits. A cache that can only be read needs no mark.

    Args:
        entry: a file or folder, which need not exist.
        users: what it is used for, names of recipes and models, which are remembered.

    Raises:
        ArtifactError: the cache cannot be written.
    """
    file = mark_file(entry).absolute()
    with disk_errors(file, hint=f"set {CACHE_VARIABLE} to a folder that can be written"):
        try:
            _mark(file, users)
        except OSError as error:
            if error.errno not in _NO_MARKS:
                raise


def _mark(file: Path, users: tuple[str, ...]) -> None:
    if file not in _MARKS:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = _open(file)
        fcntl.flock(stream, fcntl.LOCK_SH)
        _MARKS[file] = stream
    if _MARKS[file].writable():
        known = _lines(file)
        _MARKS[file].writelines(f"{user}\n" for user in users if user not in known)
        _MARKS[file].flush()
        os.utime(file)


def _open(file: Path) -> TextIO:
    """Opens a mark to lock it; one of another user is only read."""
    try:
        return file.open("a+", encoding="utf-8")
    except PermissionError:
        if not file.exists():
            raise
        return file.open(encoding="utf-8")


def used_for(entry: Path) -> tuple[str, ...]:
    """Lists what an entry was used for, the oldest first."""
    return _lines(mark_file(entry))


def _lines(file: Path) -> tuple[str, ...]:
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
    """Yields whether no process uses an entry, and keeps it so inside the block; False where that cannot be known."""
    with _open(mark_file(entry)) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
