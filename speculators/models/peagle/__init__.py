"""P-EAGLE (arXiv 2602.01469): drafts all tokens of a round with one forward."""

from __future__ import annotations

from typing import Any

from speculators.models.peagle.config import PEagleSpeculatorConfig

__all__ = ["PEagleDraftModel", "PEagleSpeculatorConfig"]


def __getattr__(name: str) -> Any:
    # The model imports torch, which takes seconds; `spec validate` only needs the config.
    if name == "PEagleDraftModel":
        from speculators.models.peagle.core import PEagleDraftModel

        return PEagleDraftModel
    raise AttributeError(name)
