"""The tiny verifier with conversations of its own, to compare checkpoints on."""

from models.conftest import world

__all__ = ["world"]
