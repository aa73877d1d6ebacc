"""Tensors that a published checkpoint leaves to its verifier, and its maps of the draft vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch

from speculators.facts import VerifierFacts
from speculators.models.chains import copy_norm
from speculators.nn.norm import RMSNorm
from speculators.verifier.weights import load_embeddings, load_head

EMBEDDINGS, HEAD, NORM, T2D, D2T = "embed_tokens.weight", "lm_head.weight", "verifier_norm.weight", "t2d", "d2t"


def verifiers_tensor(name: str, folder: Path, facts: VerifierFacts) -> torch.Tensor:
    """Reads the verifier's tensor for one of our names, over the whole vocabulary, in the dtype of its file.

    Raises:
        VerifierError: the verifier's files lack it.
    """
    if name == EMBEDDINGS:
        return load_embeddings(folder)
    head = load_head(folder, facts, dtype=None)
    if name == HEAD:
        return head.weight
    assert name == NORM, f"a verifier has no {name}"
    norm = RMSNorm(facts.hidden_size, head.eps)
    copy_norm(norm, head)
    return norm.weight.data


def drafted_mask(d2t: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Computes the mask `t2d` [V] bool from the offsets `d2t` [D]."""
    ids = torch.arange(len(d2t)) + d2t  # [D]: target id of each draft id
    inside = ids[(ids >= 0) & (ids < vocab_size)]
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, inside, True)


def vocabulary_problems(tensors: dict[str, torch.Tensor], vocab_size: int) -> list[str]:
    """Checks that `d2t` holds ascending offsets and agrees with `t2d`."""
    if D2T not in tensors:
        return []
    ids = torch.arange(len(tensors[D2T])) + tensors[D2T]
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size or bool((ids[1:] <= ids[:-1]).any())):
        return [f"d2t: draft id + offset must ascend in 0..{vocab_size - 1}: is it offsets, or ids?"]
    if T2D in tensors and not torch.equal(tensors[T2D].bool(), drafted_mask(tensors[D2T], vocab_size)):
        return ["t2d and d2t describe different vocabularies"]
    return []
