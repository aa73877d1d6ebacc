"""The tiny verifier with its own conversations, on which checkpoints are compared."""

from models.conftest import world

__all__ = ["world"]
