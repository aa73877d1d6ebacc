"""Medusa (arXiv 2401.10774)."""

from __future__ import annotations

from typing import Any

from speculators.models.medusa.config import MedusaSpeculatorConfig

__all__ = ["MedusaDraftModel", "MedusaSpeculatorConfig"]


def __getattr__(name: str) -> Any:
    # The model imports torch, which takes seconds; `spec validate` only needs the config.
    if name == "MedusaDraftModel":
        from speculators.models.medusa.core import MedusaDraftModel

        return MedusaDraftModel
    raise AttributeError(name)
