"""Code that computes something else in training, in replay, step by step or after export is told which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from clinic import Clinic

from speculators.models import chains
from speculators.models.chains import ChainDrafter
from speculators.models.eagle3.config import Eagle3SpeculatorConfig
from speculators.models.eagle3.core import Eagle3DraftModel
from speculators.nn.layout import RowLayout

pytestmark = pytest.mark.slow


def test_a_drafter_that_forgets_what_was_emitted(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prompt its cache is not what replay has."""
    real = ChainDrafter.advance

    def forgetful(self: Any, state: Any, tokens: Any, hidden_states: Any) -> None:
        if state.cache.length == 0:
            real(self, state, tokens, hidden_states)

    monkeypatch.setattr(ChainDrafter, "advance", forgetful)
    found = clinic.examine(clinic.run / "speculator")
    assert found["parity/step by step"].result == "wrong"
    assert "the drafter, step by step with its cache" in found["parity/step by step"].evidence


def test_documents_that_see_each_other(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed into a row the first one leaks into the second."""
    real = RowLayout.of.__func__
    monkeypatch.setattr(
        RowLayout, "of", classmethod(lambda cls, documents, mask: real(cls, documents.clamp(max=0), mask))
    )
    found = clinic.examine(clinic.run / "speculator")
    assert found["parity/packed rows"].result == "wrong"
    assert "see each other" in found["parity/packed rows"].evidence


def test_a_training_forward_that_reads_other_tokens(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training looks well, and drafts something else than what is served."""
    real = Eagle3DraftModel.forward

    def shifted(self: Any, *, input_ids: Any, **batch: Any) -> Any:
        return real(self, input_ids=input_ids.roll(-1, dims=1), **batch)

    monkeypatch.setattr(Eagle3DraftModel, "forward", shifted)
    found = clinic.examine(clinic.run / "speculator")
    assert found["parity/training's forward"].result == "wrong"
    assert "drafts other tokens than replay" in found["parity/training's forward"].evidence


def test_a_training_forward_that_differs_on_one_answer(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """All answers that are sampled are looked at, not the shortest alone."""
    real = Eagle3DraftModel.forward
    shortest = min(len(row.response.tokens) for row in clinic.answers.rows)

    def shifted(self: Any, *, input_ids: Any, **batch: Any) -> Any:
        longer = input_ids.shape[1] > shortest
        return real(self, input_ids=input_ids.roll(-1, dims=1) if longer else input_ids, **batch)

    monkeypatch.setattr(Eagle3DraftModel, "forward", shifted)
    found = clinic.examine(clinic.run / "speculator")["parity/training's forward"]
    assert found.result == "wrong"
    assert "of 3 answers" in found.evidence


def test_a_drafter_whose_logits_are_a_little_larger(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thousandth, which moves no draft and hardly a probability: logits are compared, depth by depth."""
    real = chains.pick
    monkeypatch.setattr(chains, "pick", lambda logits, *rest: real(1.001 * logits, *rest))
    found = clinic.examine(clinic.run / "speculator")["parity/step by step"]
    assert found.result == "wrong"
    assert "by depth off by 0.001, 0.001, 0.001 of the largest" in found.evidence


def test_a_config_that_is_not_wholly_written(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the export leaves out comes back as its default."""
    real = Eagle3SpeculatorConfig.to_dict

    def forgetful(self: Any) -> dict[str, Any]:
        return {**real(self), "norm_before_residual": False}

    monkeypatch.setattr(Eagle3SpeculatorConfig, "to_dict", forgetful)
    found = clinic.examine(clinic.run / "speculator")
    assert found["parity/export read again"].result == "wrong"


def test_code_that_raises_is_told_and_the_rest_goes_on(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """One check fails; there is no traceback, and the others are made."""

    def broken(self: Any, **_: Any) -> Any:
        raise IndexError("out of range")

    monkeypatch.setattr(Eagle3DraftModel, "forward", broken)
    found = clinic.examine(clinic.run / "speculator")
    assert "IndexError: out of range" in found["parity/training's forward"].evidence
    assert found["parity/packed rows"].result == "ok"


def test_the_export_is_written_nowhere_but_in_a_temporary_folder(clinic: Clinic, tmp_path: Path) -> None:
    """The doctor leaves what it examines as it was."""
    speculator = clinic.copy(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    clinic.examine(speculator)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
