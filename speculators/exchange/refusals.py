"""Finds weights and vocabularies with which a server would draft in vain, without an error."""

from __future__ import annotations

from pathlib import Path

import torch

from speculators.model import SpeculatorModel
from speculators.recipe.input_sections import VerifierSection
from speculators.verifier.tokens import folder_stop_ids, load_tokenizer, turn_end


def undraftable(model: SpeculatorModel, verifier: Path, section: VerifierSection | None) -> tuple[list[str], list[str]]:
    """Finds stop tokens outside the draft vocabulary; returns refusals and notes.

    Without the token that ends a turn, every answer would end in a rejected round: that is refused. A verifier's files
    often name further stop tokens, with which few answers end. Their absence costs little and is only noted.

    Args:
        verifier: its folder.
        section: the `[verifier]` that the draft was trained with, whose chat template says how turns end; None for the
            folder's own.
    """
    drafted = {*model.draft_to_target.tolist()}
    size = model.config.transformer_layer_config.get("vocab_size", 0)
    absent = {token for token in folder_stop_ids(verifier, section) if token < size and token not in drafted}
    turn = turn_end(load_tokenizer(verifier, section))
    refused = [f"token {turn} ends a turn and is not in the draft vocabulary: train with a larger draft_vocab_size"]
    noted = [
        f"token {token}, which may end an answer too, is not in the draft vocabulary: such answers take one more round"
        for token in sorted(absent - {turn})
    ]
    return refused if turn in absent else [], noted


def weight_refusals(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Lists tensors with NaN or infinite values."""
    return [
        f"{name} has values that are not finite"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
