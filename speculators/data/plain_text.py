"""Encodes plain text, which no chat template renders: every token is supervised but the first."""

from __future__ import annotations

from typing import Any

import numpy as np

from speculators.data.encoded import Encoded


def encode_text(tokenizer: Any, text: str, max_tokens: int) -> Encoded | str:
    """Encodes a text as one row of at most `max_tokens`, or returns the reason why it cannot be used.

    The tokenizer adds its token for the beginning of a text, unless the text was rendered with one.
    """
    start = tokenizer.bos_token
    rendered = start is not None and text.startswith(start)
    ids = np.array(tokenizer(text, add_special_tokens=not rendered, verbose=False)["input_ids"], np.int32)
    mask = np.ones(len(ids), np.bool_)
    mask[:1] = False  # nothing predicts the first token
    if not mask[:max_tokens].any():
        return "a text of one token"
    return Encoded(ids[:max_tokens], mask[:max_tokens], truncated=len(ids) > max_tokens)
