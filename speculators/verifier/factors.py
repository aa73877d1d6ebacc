"""Gives each conversation one rotary embedding where a model has two: longrope's factors follow a sequence's length.

transformers chooses the factors by the longest sequence of a call, so that a conversation's states would depend on its
neighbours in a batch, and by the tokens so far, so that an answer would change its embedding while it grows. Here the
factors are those of a conversation's own length: of all its tokens where they are known, and of prompt and longest
possible answer where it is still being written. vLLM chooses once for all conversations, by its --max-model-len: states
from a server agree with these where the conversations lie on the same side of the switch as that length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_KIND = "longrope"
_ORIGINAL = "original_max_position_embeddings"


def short_length(model: Any) -> int | None:
    """The longest conversation that gets the short factors, in tokens; None if the model has one set of factors."""
    return min((module.config.rope_parameters[_ORIGINAL] for module in _modules(model)), default=None)


def by_factors(lengths: Sequence[int], model: Any) -> list[list[int]]:
    """Groups the indices of sequences by the factors that they get; no group is empty."""
    limit = short_length(model)
    if limit is None:
        return [list(range(len(lengths)))]
    short = [index for index, length in enumerate(lengths) if length <= limit]
    long = [index for index, length in enumerate(lengths) if length > limit]
    return [group for group in (short, long) if group]


@contextmanager
def factors_for(model: Any, length: int) -> Iterator[None]:
    """Computes with the factors of a conversation of `length` tokens, however few tokens a forward inside has."""
    changed = [module for module in _modules(model) if length > module.config.rope_parameters[_ORIGINAL]]
    before = [module.original_inv_freq for module in changed]
    for module in changed:
        limit = module.config.rope_parameters[_ORIGINAL]
        device = module.original_inv_freq.device
        # transformers takes this attribute wherever a call is short.
        module.original_inv_freq, _ = ROPE_INIT_FUNCTIONS[_KIND](module.config, device, seq_len=limit + 1)
    try:
        yield
    finally:
        for module, frequencies in zip(changed, before, strict=True):
            module.original_inv_freq = frequencies


def _modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "rope_type", None) == _KIND]
