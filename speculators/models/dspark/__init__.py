"""DSpark (arXiv 2607.05147): drafts a block whose tokens depend on each other, and cuts it by confidence."""

from __future__ import annotations

from typing import Any

from speculators.models.dspark.config import DSparkSpeculatorConfig

__all__ = ["DSparkDraftModel", "DSparkSpeculatorConfig"]


def __getattr__(name: str) -> Any:
    # The model imports torch, which takes seconds; `spec validate` only needs the config.
    if name == "DSparkDraftModel":
        from speculators.models.dspark.core import DSparkDraftModel

        return DSparkDraftModel
    raise AttributeError(name)
