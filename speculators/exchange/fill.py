"""What a published checkpoint leaves to its verifier, and copies of the verifier that it should not have changed."""

from __future__ import annotations

from pathlib import Path

import torch

from speculators.facts import VerifierFacts
from speculators.models.chains import copy_norm
from speculators.nn.norm import RMSNorm
from speculators.verifier.weights import load_embeddings, load_head

EMBEDDINGS, HEAD, NORM, T2D, D2T = "embed_tokens.weight", "lm_head.weight", "verifier_norm.weight", "t2d", "d2t"


def verifiers_tensor(name: str, folder: Path, facts: VerifierFacts) -> torch.Tensor:
    """Returns what one of our names is in the verifier, over its whole vocabulary, in the dtype of its file.

    Raises:
        VerifierError: it is not there.
    """
    if name == EMBEDDINGS:
        return load_embeddings(folder)
    head = load_head(folder, facts, dtype=None)
    if name == HEAD:
        return head.weight
    assert name == NORM, f"{name} is nothing of a verifier's"
    norm = RMSNorm(facts.hidden_size, head.eps)
    copy_norm(norm, head)
    return norm.weight.data


def drafted_mask(d2t: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Returns `t2d` [V] bool of the offsets `d2t` [D]."""
    ids = torch.arange(len(d2t)) + d2t
    inside = ids[(ids >= 0) & (ids < vocab_size)]
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, inside, True)


def vocabulary_problems(tensors: dict[str, torch.Tensor], vocab_size: int) -> list[str]:
    """Returns what is wrong with the maps of the draft vocabulary."""
    if D2T not in tensors:
        return []
    ids = torch.arange(len(tensors[D2T])) + tensors[D2T]
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size or bool((ids[1:] <= ids[:-1]).any())):
        return [f"d2t: draft id + offset must ascend in 0..{vocab_size - 1}: is it offsets, or ids?"]
    if T2D in tensors and not torch.equal(tensors[T2D].bool(), drafted_mask(tensors[D2T], vocab_size)):
        return ["t2d and d2t are of different vocabularies"]
    return []
