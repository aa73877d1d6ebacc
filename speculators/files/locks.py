"""Locks between processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from speculators.errors import ArtifactError
from speculators.events import Progress, ProgressEvent
from speculators.files.disk import CACHE_VARIABLE, disk_errors

LOCK = ".lock"


@contextmanager
def locked(folder: Path, progress: Progress, *, stage: str) -> Iterator[None]:
    """Holds an exclusive lock on a folder (existing or not), reporting progress while it waits.

    Args:
        folder: a folder of the cache, which need not exist; the lock is a hidden file beside it.
        progress: called once per second while another process holds the lock.
        stage: the stage that the progress belongs to.

    Raises:
        ArtifactError: the lock's folder cannot be made or written.
    """

    def wait(seconds: int) -> None:
        note = f"waiting for another process to finish {folder.name}"
        progress(ProgressEvent(stage=stage, done=seconds, unit="s", note=note))

    with disk_errors(folder.parent, hint=f"set {CACHE_VARIABLE} to a folder that can be written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _hold(folder.parent / f".{folder.name}.lock", wait):
        yield


@contextmanager
def locked_or_refused(folder: Path, error: ArtifactError) -> Iterator[None]:
    """Holds an exclusive lock inside a folder, which is made if missing; raises `error` if another process holds it."""

    def refuse(seconds: int) -> None:
        # `is_locked` takes a free lock for a moment.
        if seconds > 0:
            raise error from None

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _hold(folder / LOCK, refuse):
        yield


def is_locked(folder: Path) -> bool:
    """Whether another process holds the lock inside a folder (see `locked_or_refused`)."""
    file = folder / LOCK
    if not file.is_file():
        return False
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # somebody else's folder, which only they can lock
        return False
    lock.release()
    return False


@contextmanager
def _hold(file: Path, wait: Callable[[int], None]) -> Iterator[None]:
    """Holds the lock `file`; while it is taken, calls `wait` with the seconds waited so far, which may raise."""
    lock, seconds = FileLock(file), 0
    with disk_errors(file):
        while True:
            try:
                lock.acquire(timeout=min(seconds, 1))
                break
            except Timeout:
                wait(seconds)
                seconds += 1
    try:
        yield
    finally:
        lock.release()
