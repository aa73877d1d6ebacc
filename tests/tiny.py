"""Re-exports the builder of tiny random verifiers for the tests."""

from __future__ import annotations

from speculators.verifier.tiny import make_byte_tokenizer, make_tiny_verifier

__all__ = ["make_byte_tokenizer", "make_tiny_verifier"]
