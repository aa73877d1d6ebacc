"""Files and folders that are whole or not there, and reading parts of them without keeping them in memory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speculators.errors import ArtifactError

MANIFEST = "manifest.json"
FORMAT = 1  # of every manifest in this package
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into an ArtifactError that names `path` and the mend."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            hint = "free some space, or work on another disk; what is complete is kept"
            raise ArtifactError(f"{path}: the disk is full", hint=hint) from error
        raise ArtifactError(f"{path}: cannot be written or read: {error.strerror or error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it; leaves nothing behind when that fails.

    Raises:
        ArtifactError: the disk is full, or the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `folder` when the block ends well, and vanishes when it does not.

    Raises:
        ArtifactError: the disk is full, or the folder cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    with disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def read_manifest(folder: Path, file: str = MANIFEST) -> dict[str, Any]:
    """Reads a folder's manifest; raises ArtifactError if there is none or it cannot be read."""
    path = folder / file
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: not complete: it has no {file}", hint="run the stage again") from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path}: damaged: {error}", hint="run the stage again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{path}: damaged, or of another version", hint="run the stage again")
    return manifest


def read_json(path: Path) -> Any:
    """Returns a JSON file's value, None where it is missing or cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with `write_whole`."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file's content; raises ArtifactError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
