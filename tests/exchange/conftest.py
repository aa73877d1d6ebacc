"""The tiny verifier with greedy conversations of its own, for checkpoints to be compared on."""

from models.conftest import world

__all__ = ["world"]
