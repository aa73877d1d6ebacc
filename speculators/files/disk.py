"""Single files: written whole or not at all, hashed, and with the disk's errors in plain words."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from speculators.errors import ArtifactError

CACHE_VARIABLE = "SPECULATORS_CACHE"
FULL = (errno.ENOSPC, errno.EDQUOT)
BLOCK_BYTES = 1 << 20


def cache_folder() -> Path:
    """The folder for everything that can be made again: $SPECULATORS_CACHE, or ~/.cache/speculators."""
    folder = os.environ.get(CACHE_VARIABLE, "")
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "speculators"


@contextlib.contextmanager
def disk_errors(path: Path, *, hint: str = "") -> Iterator[None]:
    """Turns an OSError raised in the block into an ArtifactError that names `path` and the remedy.

    Args:
        path: what the block writes or reads.
        hint: the remedy for any error but a full disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            room = (
                f"free some space, or work on another disk (--runs for runs, {CACHE_VARIABLE} for the cache); "
                "what is complete is kept"
            )
            raise ArtifactError(f"{path}: the disk is full", hint=room) from error
        raise ArtifactError(f"{path}: cannot be written or read: {error.strerror or error}", hint=hint) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a temporary file that becomes `path` when the block ends well, and vanishes when it does not.

    Raises:
        ArtifactError: the disk is full, or the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                # Without this a power cut can leave the new name on an empty file.
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it; leaves nothing behind when that fails.

    Raises:
        ArtifactError: the disk is full, or the file cannot be written.
    """
    with whole_file(path) as file:
        file.write(content)


def honour_umask(*files: Path) -> None:
    """Gives files the permissions that the user's umask gives to new ones.

    safetensors writes through a temporary file that only its owner can read, and keeps that mode.
    """
    # Reading the mask sets it; meanwhile a file of another thread would be private rather than public.
    mask = os.umask(0o077)
    os.umask(mask)
    for file in files:
        file.chmod(0o666 & ~mask)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, whole or not at all (see `write_whole`)."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads a JSON file; gives None if it is missing or cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def file_sha256(path: Path) -> str:
    """Hashes a file of any size in constant memory.

    Raises:
        ArtifactError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def size_text(size: float) -> str:
    """Writes a size with its unit: "1.2 TB", "340 MB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 100 * unit else f"{size / unit:.0f} {name}"
    return f"{size:.0f} bytes"


def folder_bytes(path: Path) -> int:
    """Sums the sizes of a file, or of the files in a folder; links are not followed."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.lstat().st_size for file in files)


def free_bytes(folder: Path) -> int:
    """Measures the bytes that are free where `folder` is, or will be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def sync_folder(folder: Path) -> None:
    """Waits until the folder's entries are on disk: a rename without this can be lost in a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
