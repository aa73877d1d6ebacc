"""Folders that are complete when their manifest is there, and intact when their files are as it says.

The manifest is written last and the finished folder is renamed into place, so a process that dies at any moment leaves
nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from speculators.errors import ArtifactError
from speculators.events import Progress, ignore
from speculators.files.disk import disk_errors, file_sha256, honour_umask, sync_folder, write_json
from speculators.files.locks import locked
from speculators.files.used import use

MANIFEST = "manifest.json"
FORMAT = 1  # of every manifest and record in this package
AGAIN = "run the stage again"

# Which files `verify` hashes; sizes are always compared.
Hashes = Literal["all", "touched", "none"]


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes `facts` as the folder's manifest, which makes it complete, and waits for the disk.

    Raises:
        ArtifactError: the disk is full, or the folder cannot be written.
    """
    write_json(folder / MANIFEST, {"format": FORMAT, **facts})
    with disk_errors(folder):
        sync_folder(folder)


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the manifest of a finished folder: `facts`, then size, time of change and sha256 of each file.

    Raises:
        ArtifactError: the disk is full, or the folder cannot be read or written.
    """
    files = {}
    with disk_errors(folder):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            stat = path.stat()
            record = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": file_sha256(path)}
            files[path.relative_to(folder).as_posix()] = record
    write_manifest(folder, {**facts, "files": files})


def read_manifest(folder: Path, *, hint: str = AGAIN) -> dict[str, Any]:
    """Reads a folder's manifest.

    Raises:
        ArtifactError: there is none, or it cannot be read; names it and gives `hint`.
    """
    return read_record(folder / MANIFEST, hint=hint)


def read_record(path: Path, *, hint: str = AGAIN) -> dict[str, Any]:
    """Reads a JSON table of this package's format.

    Raises:
        ArtifactError: the file is missing, damaged, or of another format; names it and gives `hint`.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{path.parent}: not complete: it has no {path.name}", hint=hint) from None
    except OSError as error:
        raise ArtifactError(f"{path}: damaged: {error}", hint=hint) from None
    return checked_record(content, str(path), hint=hint)


def checked_record(content: bytes, name: str, *, hint: str = AGAIN) -> dict[str, Any]:
    """Parses a JSON table of this package's format.

    Raises:
        ArtifactError: it is damaged, or of another format; names `name` and gives `hint`.
    """
    try:
        record = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{name}: damaged: {error}", hint=hint) from None
    # Caches made by earlier versions may lack the format; it was always 1.
    if not isinstance(record, dict) or record.get("format", FORMAT) != FORMAT:
        raise ArtifactError(f"{name}: damaged, or written by another version", hint=hint)
    return record


def verify(folder: Path, *, hashes: Hashes = "all", hint: str = AGAIN) -> dict[str, Any]:
    """Compares a folder's files with its manifest, and returns the manifest.

    Args:
        folder: what `seal` was given.
        hashes: "all" hashes every file. "touched" trusts a file whose time of change is as recorded, and hashes the
            others: a copied folder is still intact, an edited one is not. "none" compares sizes only.
        hint: the remedy that the error names.

    Raises:
        ArtifactError: names the first file that is missing or changed.
    """
    manifest = read_manifest(folder, hint=hint)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ArtifactError(f"{folder / MANIFEST}: damaged: it lists no files", hint=hint)
    for name, record in files.items():
        if problem := _problem(folder / name, record, hashes):
            raise ArtifactError(f"{folder / name}: {problem}", hint=hint)
    return manifest


def _problem(path: Path, record: Mapping[str, Any], hashes: Hashes) -> str:
    if not path.is_file():
        return "missing"
    stat = path.stat()
    if stat.st_size != record["bytes"]:
        return f"not what was written ({stat.st_size} bytes instead of {record['bytes']})"
    # Manifests of earlier versions have no times.
    trusted = hashes == "none" or (hashes == "touched" and stat.st_mtime_ns == record.get("mtime_ns"))
    return "" if trusted or file_sha256(path) == record["sha256"] else "not what was written (its sha256 differs)"


def is_intact(folder: Path) -> bool:
    """Whether every file is as the manifest says; hashes only files that were touched since."""
    try:
        verify(folder, hashes="touched")
    except (ArtifactError, OSError, KeyError, TypeError, AttributeError):
        return False
    return True


def replace_folder(source: Path, folder: Path) -> None:
    """Renames `source` to `folder`, in place of what is there, with the user's permissions, and waits for the disk."""
    honour_umask(*(path for path in source.rglob("*") if path.is_file() and not path.is_symlink()))
    if folder.exists():
        shutil.rmtree(folder)
    source.replace(folder)
    sync_folder(folder.parent)


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
            replace_folder(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def make_once(
    folder: Path, make: Callable[[Path], None], *, facts: Mapping[str, Any], progress: Progress = ignore
) -> Path:
    """Makes a folder unless it is there, complete and intact; while another process makes it, waits for that one.

    Args:
        folder: where it belongs in the cache; a damaged one is made again.
        make: fills the empty folder that it is called with.
        facts: where the content comes from; kept in the manifest for people.
        progress: called while another process is waited for.

    Raises:
        ArtifactError: the disk is full, or the folder cannot be written.
    """
    use(folder)
    if is_intact(folder):
        return folder
    with locked(folder, progress, stage="verifier"):
        # The process that held the lock before us may have made it.
        if not is_intact(folder):
            # Before the work, not after: a verifier fills gigabytes, and the damaged one serves nobody.
            with disk_errors(folder):
                shutil.rmtree(folder, ignore_errors=True)
            with whole_folder(folder) as partial:
                make(partial)
                seal(partial, facts)
    return folder
