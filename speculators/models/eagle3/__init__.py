"""EAGLE-3 (arXiv 2503.01840) with its 3.1 options."""

from __future__ import annotations

from typing import Any

from speculators.models.eagle3.config import Eagle3SpeculatorConfig

__all__ = ["Eagle3DraftModel", "Eagle3SpeculatorConfig"]


def __getattr__(name: str) -> Any:
    # The model imports torch, which takes seconds; `spec validate` only needs the config.
    if name == "Eagle3DraftModel":
        from speculators.models.eagle3.core import Eagle3DraftModel

        return Eagle3DraftModel
    raise AttributeError(name)
