"""Folders that are complete when their manifest is there, and intact when they are what it says."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from speculators.errors import ArtifactError

NAME = "manifest.json"
CHUNK_BYTES = 1 << 20


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of a finished folder: `facts`, and size and sha256 of each file; waits for the disk."""
    files = {path.name: _measure(path) for path in sorted(folder.iterdir())}
    with (folder / NAME).open("w", encoding="utf-8") as stream:
        json.dump({**facts, "files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(folder)


def read(folder: Path) -> dict[str, Any]:
    """Returns the manifest; raises ArtifactError that names it if it cannot be read."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / NAME}: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict):
        raise ArtifactError(f"{folder / NAME}: not a manifest")
    return found


def verify(folder: Path) -> dict[str, Any]:
    """Returns the manifest of an intact folder; raises ArtifactError that names the first file that is not."""
    found = read(folder)
    for name, told in found["files"].items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing")
        if path.stat().st_size != told["bytes"]:
            raise ArtifactError(f"{path}: {path.stat().st_size} bytes, written with {told['bytes']}")
        if _measure(path) != told:
            raise ArtifactError(f"{path}: its content is not what was written (sha256 differs)")
    return found


def sync_folder(folder: Path) -> None:
    """Waits until the folder's entries are on disk: a rename without this can be lost in a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _measure(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}
