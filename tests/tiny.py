"""The builder of tiny random verifiers, where tests look for it."""

from __future__ import annotations

from speculators.verifier.tiny import make_byte_tokenizer, make_tiny_verifier

__all__ = ["make_byte_tokenizer", "make_tiny_verifier"]
