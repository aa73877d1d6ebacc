"""DFlash (arXiv 2602.06036): drafts a block of tokens with one forward, with the verifier's states in every layer."""

from __future__ import annotations

from typing import Any

from speculators.models.dflash.config import DFlashSpeculatorConfig

__all__ = ["DFlashDraftModel", "DFlashSpeculatorConfig"]


def __getattr__(name: str) -> Any:
    # The model imports torch, which takes seconds; `spec validate` only needs the config.
    if name == "DFlashDraftModel":
        from speculators.models.dflash.core import DFlashDraftModel

        return DFlashDraftModel
    raise AttributeError(name)
