"""The folder of an export: written whole, and never over anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speculators.errors import ArtifactError
from speculators.files.folders import whole_folder

RECORD = "export.json"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder that becomes `out`; an older export that is there is replaced.

    Raises:
        ArtifactError: something else is there, or the disk is full.
    """
    if out.exists() and not (out / RECORD).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ArtifactError(f"{out} is there, and no export", hint="name another folder with --out")
    with whole_folder(out) as partial:
        yield partial
