"""Applies a `TokenFilter` to logits."""

from __future__ import annotations

import math

import torch

from speculators.recipe.token_filter import TokenFilter


def filtered(logits: torch.Tensor, token_filter: TokenFilter) -> torch.Tensor:
    """Sets the logits of tokens that the filter drops to -inf; their softmax is the distribution to sample from.

    Of equally probable tokens, `top_k` keeps all or none, and `top_p` may keep some.

    Args:
        logits: [.., V], divided by the temperature.
    """
    if token_filter.min_p is not None:
        least = logits.amax(dim=-1, keepdim=True) + math.log(token_filter.min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    if token_filter.top_k is not None and token_filter.top_k < logits.shape[-1]:
        least = logits.topk(token_filter.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if token_filter.top_p is not None:
        ordered, tokens = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        # Drops tokens before which the sum has reached top_p, so the most probable token always stays.
        dropped = probs.cumsum(dim=-1) - probs >= token_filter.top_p
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, tokens, dropped), -math.inf)
    return logits
