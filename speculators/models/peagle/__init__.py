"""P-EAGLE (arXiv 2602.01469): all draft tokens of a round from one forward."""

from __future__ import annotations

from typing import Any

from speculators.models.peagle.config import PEagleSpeculatorConfig

__all__ = ["PEagleDraftModel", "PEagleSpeculatorConfig"]


def __getattr__(name: str) -> Any:
    # The model drags torch in; `spec validate` only wants the config.
    if name == "PEagleDraftModel":
        from speculators.models.peagle.core import PEagleDraftModel

        return PEagleDraftModel
    raise AttributeError(name)
