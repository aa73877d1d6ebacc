"""EAGLE (arXiv 2401.15077), and its training with harmonised context (HASS, arXiv 2408.15766)."""

from __future__ import annotations

from typing import Any

from speculators.models.eagle1.config import Eagle1SpeculatorConfig

__all__ = ["Eagle1DraftModel", "Eagle1SpeculatorConfig"]


def __getattr__(name: str) -> Any:
    # The model imports torch, which takes seconds; `spec validate` only needs the config.
    if name == "Eagle1DraftModel":
        from speculators.models.eagle1.core import Eagle1DraftModel

        return Eagle1DraftModel
    raise AttributeError(name)
