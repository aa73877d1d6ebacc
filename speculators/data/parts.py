"""Reads parts of large files as arrays, without keeping the files in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from speculators.errors import ArtifactError


def read_part(path: Path, dtype: Any, *, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """Copies an array out of a file through a memory map that lives only for this call.

    A map that stays open keeps every touched page in the process's resident memory, which would grow with the number of
    conversations. If the file shrinks, an open map kills the process with a bus error, while a new one just fails.

    Args:
        path: the file.
        dtype: numpy type of the array.
        offset: first byte of the array.
        shape: shape of the array.

    Raises:
        ArtifactError: the file is missing or too short.
    """
    if 0 in shape:
        return np.empty(shape, dtype)  # which no map can be
    try:
        return np.array(np.memmap(path, mode="r", dtype=dtype, offset=offset, shape=shape))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing", hint="run the stage again") from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path}: cut short or unreadable: {error}", hint="run the stage again") from None
