"""Folders that are made once: complete with their manifest, or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from speculators.errors import VerifierError
from speculators.events import Progress, ProgressEvent, ignore
from speculators.files.whole import file_sha256

MANIFEST = "manifest.json"
VARIABLE = "SPECULATORS_CACHE"


def cache_folder() -> Path:
    """Returns $SPECULATORS_CACHE, or ~/.cache/speculators."""
    told = os.environ.get(VARIABLE, "")
    return Path(told).expanduser() if told else Path.home() / ".cache" / "speculators"


def make_once(
    folder: Path, make: Callable[[Path], None], *, facts: Mapping[str, Any], progress: Progress = ignore
) -> Path:
    """Returns `folder`, made by `make` unless it is there, complete and intact.

    The work is done in a temporary folder beside it, which is renamed when its manifest (written last) is there; so a
    kill at any moment leaves nothing that looks finished. A lock makes other processes wait instead of working too.

    Args:
        folder: the place in the cache.
        make: fills the empty folder that it is given.
        facts: where the content comes from; kept in the manifest for people.
        progress: is told when another process is waited for.

    Raises:
        VerifierError: the disk is full or not writable.
    """
    if is_intact(folder):
        return folder
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder, progress):
            # The process that held the lock before us may have made it.
            if not is_intact(folder):
                _make(folder, make, facts)
    return folder


def is_intact(folder: Path) -> bool:
    """Says whether `folder` holds what its manifest lists.

    A file whose size and time of change are as recorded is taken for the one that was written; any other is hashed, so
    that a copied cache is still good and an edited or cut one is not.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all(_is_as_recorded(folder / name, record) for name, record in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_as_recorded(path: Path, record: Mapping[str, Any]) -> bool:
    stat = path.stat()
    if stat.st_size != record["bytes"]:
        return False
    return stat.st_mtime_ns == record["mtime_ns"] or file_sha256(path) == record["sha256"]


def _make(folder: Path, make: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
    prefix = f".{folder.name}."
    # Under the lock nobody else works here: what is left belongs to a process that was killed.
    for left in [folder, *folder.parent.glob(f"{prefix}*.tmp")]:
        if left.exists():
            shutil.rmtree(left)
    work = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=folder.parent))
    try:
        make(work)
        _write_manifest(work, facts)
        work.chmod(0o755)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat = path.stat()
        record = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": file_sha256(path)}
        files[path.relative_to(folder).as_posix()] = record
    text = json.dumps({**facts, "files": files}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: Path, progress: Progress, *, stage: str = "verifier") -> Iterator[None]:
    """Keeps a folder, there or not, to this process while the block runs; another's is waited for, which is told."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    waited = 0
    while True:
        try:
            lock.acquire(timeout=1)
            break
        except Timeout:
            waited += 1
            note = f"waiting for another process that makes {folder.name}"
            progress(ProgressEvent(stage=stage, done=waited, unit="s", note=note))
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VerifierError(
            f"cannot write the verifier to {folder}: {error}",
            hint=f"free some space, or set {VARIABLE} to a folder on another disk",
        ) from error
