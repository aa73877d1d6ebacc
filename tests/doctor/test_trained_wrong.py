"""Faults made during training: the files are sound, and only acceptance reveals them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clinic import Clinic, fit, train_on, training_row
from torch import nn

from speculators.doctor.training import training_model

Row = dict[str, torch.Tensor]
IDS = (1, 2, 3)


def shifted(name: str, by: int) -> Callable[[Row], Row]:
    """Shifts a row's values by `by` places, within each document as far as these tests need."""
    return lambda row: {**row, name: row[name].roll(-by, dims=1)}


def answers_later(row: Row) -> Row:
    """Moves every answer one position away from its prompt."""
    answer = row["loss_mask"].long()
    return {**row, "position_ids": row["position_ids"] + answer}


FAULTS: dict[str, tuple[tuple[int, ...], Callable[[Row], Row], str, str]] = {
    "states one layer later": (
        (2, 3, 4),
        lambda row: row,
        "alignment/layer ids",
        r"trained on layers one later.*off by",
    ),
    "states one layer earlier": ((0, 1, 2), lambda row: row, "alignment/layer ids", "trained on layers one earlier"),
    "labels one later": (IDS, shifted("verifier_last_hidden_states", 1), "alignment/labels", r"shifted by \+1"),
    "labels one earlier": (IDS, shifted("verifier_last_hidden_states", -1), "alignment/labels", r"shifted by -1"),
    "tokens one later": (IDS, shifted("input_ids", 1), "alignment/tokens", r"one place later .*input shift \+1"),
    "tokens one earlier": (IDS, shifted("input_ids", -1), "alignment/tokens", r"one place earlier .*input shift -1"),
    "answers one position later": (IDS, answers_later, "alignment/positions", "the answer's tokens one position later"),
}

# A draft that is trained to say the token that it reads was given tokens one later, or labels one earlier.
SAME_FAULT = {"labels one earlier": {"alignment/tokens"}, "tokens one later": {"alignment/labels"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_training_with_a_fault_is_diagnosed(clinic: Clinic, tmp_path: Path, name: str) -> None:
    """The alignment of training accepts more than the configured one, and the evidence names it."""
    layer_ids, wrong, check, words = FAULTS[name]
    speculator = clinic.alone(tmp_path)
    train_on(clinic, speculator, wrong(training_row(clinic.answers, layer_ids)))
    examined = clinic.examine(speculator)
    assert examined[check].result == "wrong", [examined[check], examined["alignment/acceptance"]]
    assert re.search(words, examined[check].evidence), examined[check].evidence
    others = {one for one in examined.with_result("wrong") if one.startswith("alignment/")} - {
        check,
        "alignment/acceptance",
    }
    assert others <= SAME_FAULT.get(name, set())


@pytest.mark.slow
def test_a_norm_that_training_did_not_have_is_diagnosed(clinic: Clinic, tmp_path: Path) -> None:
    """Trains without the draft's final norm, and exports one with its own weights."""
    speculator = clinic.alone(tmp_path)
    model, kwargs = training_model(clinic.load(speculator))
    torch.manual_seed(0)
    norm, model.norm = model.norm, nn.Identity()
    fit(model, kwargs, training_row(clinic.answers, IDS), steps=150)
    model.norm = norm
    norm.weight.data.copy_(torch.randn(32, generator=torch.Generator().manual_seed(0)).exp())
    model.save_pretrained(speculator)
    examined = clinic.examine(speculator)["alignment/draft's final norm"]
    assert examined.result == "wrong"
    assert "was trained without its final norm" in examined.evidence
