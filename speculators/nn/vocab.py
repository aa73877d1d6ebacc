"""The maps between draft and target vocabulary, as buffers that are saved with the speculator.

target id = draft id + d2t[draft id]; t2d marks the target ids that can be drafted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from speculators.errors import ContractError


def register_vocab(module: nn.Module, vocab_size: int, draft_vocab_size: int) -> None:
    """Registers `d2t` (int64 [D] offsets) and `t2d` (bool [V]) on `module`; neither if D = V."""
    # A whole vocabulary is saved without maps, as servers expect.
    if draft_vocab_size == vocab_size:
        return
    module.register_buffer("d2t", torch.zeros(draft_vocab_size, dtype=torch.int64))
    module.register_buffer("t2d", torch.zeros(vocab_size, dtype=torch.bool))


def set_vocab(module: nn.Module, t2d: torch.Tensor | None, d2t: torch.Tensor | None) -> torch.Tensor | None:
    """Fills the maps and returns the target id of each draft id, [D]; None for a whole vocabulary."""
    if t2d is None or d2t is None:
        return None
    module.get_buffer("d2t").copy_(d2t)
    module.get_buffer("t2d").copy_(t2d)
    return torch.arange(len(d2t)) + d2t


def mask_token(chosen: int | None, decoder: dict[str, Any]) -> int:
    """Chooses the token that stands for "not known yet" in a block: `chosen`, or the last of the vocabulary.

    Only its frozen embedding is used, as a constant vector, so a rare token serves as well as a special one.

    Raises:
        ContractError: `chosen` is not a token of the verifier.
    """
    size: int = decoder["vocab_size"]
    token = size - 1 if chosen is None else chosen
    if not 0 <= token < size:
        raise ContractError(f"mask_token_id {token} is not a token of the verifier", hint=f"it has 0 to {size - 1}")
    return token
