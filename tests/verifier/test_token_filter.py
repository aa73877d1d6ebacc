"""The tokens that a verifier samples from are those of the servers' definitions."""

from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from speculators.recipe.token_filter import ALL_TOKENS, TokenFilter
from speculators.verifier.token_filter import filtered

LOGITS = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("token_filter", "warpers"),
    [
        (TokenFilter(top_p=0.8), [TopPLogitsWarper(0.8)]),
        (TokenFilter(top_k=5), [TopKLogitsWarper(5)]),
        (TokenFilter(min_p=0.1), [MinPLogitsWarper(0.1)]),
        (
            TokenFilter(top_p=0.9, top_k=6, min_p=0.02),
            [MinPLogitsWarper(0.02), TopKLogitsWarper(6), TopPLogitsWarper(0.9)],
        ),
    ],
)
def test_the_kept_tokens_are_those_of_transformers(token_filter, warpers):
    """Each restriction sees what the one before has left; kept logits are unchanged."""
    expected = LOGITS
    for warper in warpers:
        expected = warper(None, expected)
    found = filtered(LOGITS, token_filter)
    assert torch.equal(found, expected)
    assert (found.isneginf().sum(-1) > 0).all()


def test_the_most_probable_token_always_stays():
    """Also with a top_p below its own probability, and where one token has all probability."""
    logits = torch.tensor([[0.0, 3.0, 1.0], [-1000.0, 1000.0, -1000.0]])
    for token_filter in (TokenFilter(top_p=1e-6), TokenFilter(top_k=1), TokenFilter(min_p=1.0)):
        assert filtered(logits, token_filter).argmax(-1).tolist() == [1, 1]
        assert filtered(logits, token_filter).isneginf().sum(-1).tolist() == [2, 2]


def test_without_a_filter_nothing_changes():
    """The logits are the same object: no copy of the vocabulary is made."""
    assert filtered(LOGITS, ALL_TOKENS) is LOGITS
    assert torch.equal(filtered(LOGITS, TokenFilter(top_k=1000)), LOGITS)
