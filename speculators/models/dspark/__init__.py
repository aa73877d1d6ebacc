"""DSpark (arXiv 2607.05147): a block whose tokens know each other, and a confidence that cuts it."""

from __future__ import annotations

from typing import Any

from speculators.models.dspark.config import DSparkSpeculatorConfig

__all__ = ["DSparkDraftModel", "DSparkSpeculatorConfig"]


def __getattr__(name: str) -> Any:
    # The model drags torch in; `spec validate` only wants the config.
    if name == "DSparkDraftModel":
        from speculators.models.dspark.core import DSparkDraftModel

        return DSparkDraftModel
    raise AttributeError(name)
