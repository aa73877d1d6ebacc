"""Remembers which verifiers may run code of their own: the recipe says so once, and every reader of the folder asks."""

from __future__ import annotations

from pathlib import Path

_TRUSTED: set[Path] = set()


def trust(folder: Path) -> None:
    """Allows the code in a verifier's folder to run in this process, as `verifier.trust_remote_code = true` does."""
    _TRUSTED.add(folder.resolve())


def is_trusted(folder: Path) -> bool:
    """Whether a recipe of this process allows the code in this folder."""
    return folder.resolve() in _TRUSTED
