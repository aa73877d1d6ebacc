"""Parity checks name the place where training, replay, drafting and export compute different things."""

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
    """After the prompt its cache differs from what replay sees."""
    real = ChainDrafter.advance

    def forgetful(self: Any, state: Any, tokens: Any, hidden_states: Any) -> None:
        if state.cache.length == 0:
            real(self, state, tokens, hidden_states)

    monkeypatch.setattr(ChainDrafter, "advance", forgetful)
    examined = clinic.examine(clinic.run / "speculator")
    assert examined["parity/step by step"].result == "wrong"
    assert "the drafter, step by step with its cache" in examined["parity/step by step"].evidence


def test_documents_that_see_each_other(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a packed row the first document leaks into the second."""
    real = RowLayout.of.__func__
    monkeypatch.setattr(
        RowLayout, "of", classmethod(lambda cls, documents, mask: real(cls, documents.clamp(max=0), mask))
    )
    examined = clinic.examine(clinic.run / "speculator")
    assert examined["parity/packed rows"].result == "wrong"
    assert "attend to each other" in examined["parity/packed rows"].evidence


def test_a_training_forward_that_reads_other_tokens(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training looks fine, but drafts other tokens than those that are served."""
    real = Eagle3DraftModel.forward

    def shifted(self: Any, *, input_ids: Any, **batch: Any) -> Any:
        return real(self, input_ids=input_ids.roll(-1, dims=1), **batch)

    monkeypatch.setattr(Eagle3DraftModel, "forward", shifted)
    examined = clinic.examine(clinic.run / "speculator")
    assert examined["parity/training's forward"].result == "wrong"
    assert "drafts different tokens from replay" in examined["parity/training's forward"].evidence


def test_a_training_forward_that_differs_on_one_answer(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sampled answer is compared, not only the shortest."""
    real = Eagle3DraftModel.forward
    shortest = min(len(row.response.tokens) for row in clinic.answers.rows)

    def shifted(self: Any, *, input_ids: Any, **batch: Any) -> Any:
        longer = input_ids.shape[1] > shortest
        return real(self, input_ids=input_ids.roll(-1, dims=1) if longer else input_ids, **batch)

    monkeypatch.setattr(Eagle3DraftModel, "forward", shifted)
    examined = clinic.examine(clinic.run / "speculator")["parity/training's forward"]
    assert examined.result == "wrong"
    assert "of 3 answers" in examined.evidence


def test_a_drafter_whose_logits_are_a_little_larger(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor of 1.001 changes no draft and hardly a probability, but the logits differ at each depth."""
    real = chains.pick
    monkeypatch.setattr(chains, "pick", lambda logits, *rest: real(1.001 * logits, *rest))
    examined = clinic.examine(clinic.run / "speculator")["parity/step by step"]
    assert examined.result == "wrong"
    assert "by depth, by at most 0.001, 0.001, 0.001 of the largest" in examined.evidence


def test_a_config_that_is_not_wholly_written(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that the export leaves out returns as its default."""
    real = Eagle3SpeculatorConfig.to_dict

    def forgetful(self: Any) -> dict[str, Any]:
        return {**real(self), "norm_before_residual": False}

    monkeypatch.setattr(Eagle3SpeculatorConfig, "to_dict", forgetful)
    examined = clinic.examine(clinic.run / "speculator")
    assert examined["parity/export read again"].result == "wrong"


def test_code_that_raises_is_reported_and_the_rest_goes_on(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    """One check fails without a traceback, and the others still run."""

    def broken(self: Any, **_: Any) -> Any:
        raise IndexError("out of range")

    monkeypatch.setattr(Eagle3DraftModel, "forward", broken)
    examined = clinic.examine(clinic.run / "speculator")
    assert "IndexError: out of range" in examined["parity/training's forward"].evidence
    assert examined["parity/packed rows"].result == "ok"


def test_the_export_is_written_nowhere_but_in_a_temporary_folder(clinic: Clinic, tmp_path: Path) -> None:
    """The doctor does not change what it examines."""
    speculator = clinic.copy(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    clinic.examine(speculator)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
