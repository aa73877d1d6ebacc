"""Several processes, one cache and one runs folder: what one writes all must see."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from speculators.errors import ArtifactError
from speculators.files.disk import CACHE_VARIABLE, disk_errors
from speculators.runs.places import Places
from speculators.training.world import World


def check_shared(places: Places, world: World) -> None:
    """Checks that every process sees what rank 0 writes into the cache and the runs folder; every process calls this.

    Raises:
        ArtifactError: on every process, if one does not; names its machine, the folders and the mend.
    """
    if world.size == 1:
        return
    folders = (places.cache, places.runs)
    # A name that nobody has looked up before: a network's file system remembers for a while what was not there.
    name = world.broadcast(f".shared-{uuid.uuid4().hex}")
    try:
        # What keeps rank 0 from writing is told by all: the others would wait for it.
        if problem := world.broadcast(_write(folders, name) if world.is_main else None):
            raise ArtifactError(problem)
        lacking = [str(folder) for folder in folders if not (folder / name).exists()]
        told = world.gather((socket.gethostname(), lacking))
    finally:
        if world.is_main:
            for folder in folders:
                # Where it could not be written, which was told.
                with suppress(OSError):
                    (folder / name).unlink()
    apart = {f"{host}: {folder}": None for host, theirs in told for folder in theirs}
    if apart:
        raise ArtifactError(
            f"not the folder that the first process writes to, on {'; '.join(apart)}",
            hint=f"set {CACHE_VARIABLE} and --runs to a folder that all nodes share",
        )


def _write(folders: Sequence[Path], name: str) -> str | None:
    """Writes an empty file into each folder; returns what kept it from that, in words."""
    try:
        for folder in folders:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
    except ArtifactError as error:
        return str(error)
    return None
