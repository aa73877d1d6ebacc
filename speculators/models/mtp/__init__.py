"""Multi-token prediction (FastMTP, arXiv 2509.18362): drafts with a verifier's own extra layer, or one of that kind."""

from __future__ import annotations

from typing import Any

from speculators.models.mtp.config import MtpSpeculatorConfig

__all__ = ["MtpDraftModel", "MtpSpeculatorConfig", "stitch"]


def __getattr__(name: str) -> Any:
    # The model imports torch, which takes seconds; `spec validate` only needs the config.
    if name == "MtpDraftModel":
        from speculators.models.mtp.core import MtpDraftModel

        return MtpDraftModel
    if name == "stitch":
        from speculators.models.mtp.native import stitch

        return stitch
    raise AttributeError(name)
