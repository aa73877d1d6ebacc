"""Remembers the sha256 of big files, so that a plan for 20 GB of data does not read them each time.

It is for names and fingerprints alone. A hash that a recipe demands is computed from the bytes, which a disk may have
damaged without a new time, and does not come from a file that others can write.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from speculators.errors import ArtifactError
from speculators.files.disk import cache_folder, disk_errors, file_sha256, read_json, write_json

# In the cache: state and sha256 of each file, by its path.
NAME = "hashes.json"
# Smaller files are hashed in a tenth of a second.
LEAST_BYTES = 64 << 20
# A file that is written while it is hashed, or a moment later, may keep the times that it had: clocks of file systems
# are as coarse as this.
UNSETTLED_NS = 2_000_000_000


def remembered_sha256(path: Path) -> str:
    """Hashes a file, or recalls the hash of a big one that is as it was when it was hashed.

    Raises:
        ArtifactError: the file cannot be read.
    """
    state = _state(path)
    if state["bytes"] < LEAST_BYTES:
        return file_sha256(path)
    store, name = cache_folder() / NAME, str(path.resolve())
    entry = _entries(store).get(name)
    if isinstance(entry, dict) and entry == {**state, "sha256": entry.get("sha256")}:
        return str(entry["sha256"])
    began = time.time_ns()
    digest = file_sha256(path)
    if began - max(state["mtime_ns"], state["ctime_ns"]) > UNSETTLED_NS and _state(path) == state:
        # Where nothing can be written, only time is lost.
        with suppress(ArtifactError):
            _remember(store, name, {**state, "sha256": digest})
    return digest


def _state(path: Path) -> dict[str, int]:
    """Reads what a change of the content changes; the time of change (ctime) is the one that no program can set."""
    with disk_errors(path):
        stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}


def _entries(store: Path) -> dict[str, Any]:
    values = read_json(store)
    return values if isinstance(values, dict) else {}


def _remember(store: Path, name: str, entry: dict[str, Any]) -> None:
    """Adds an entry, and drops those of files that are gone; of two processes at once, one may forget the other's."""
    # Not Path.is_file, which raises where a folder may not be entered.
    kept = {other: value for other, value in _entries(store).items() if os.path.isfile(other)}  # noqa: PTH113
    # A name of its own: two processes that write one temporary file would mix their entries.
    own = store.with_name(f"{os.getpid()}-{store.name}")
    with disk_errors(store):
        store.parent.mkdir(parents=True, exist_ok=True)
        write_json(own, {**kept, name: entry})
        own.replace(store)
