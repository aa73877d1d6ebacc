"""What a verifier cannot do is found before a run spends anything on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Spec
from transformers import DynamicCache


def test_a_verifier_that_cannot_decode_ends_the_run_before_anything_is_captured(
    fresh: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial stands before preparation: an error that says what fails, no conversations, no states, no training."""

    def broken(*_: object) -> None:
        raise AttributeError("'DynamicLayer' object has no attribute 'update_indexer'")

    # Through transformers, as every verifier runs that has no joined form.
    monkeypatch.setattr("speculators.decoding.target.few_rows_verifier", lambda model: None)
    monkeypatch.setattr(DynamicCache, "crop", broken)
    done = fresh.run("--quiet")
    assert done.code == 1
    assert "LlamaForCausalLM: decoding with drafts fails: AttributeError" in done.err
    assert "Traceback" not in done.err
    assert not list(Path(fresh.cache).rglob("*.i32"))
    assert not list(fresh.runs.glob("*/checkpoints/*"))


def test_a_head_that_is_read_wrong_ends_the_run_too(fresh: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of a misread head would be wrong for all of training."""
    from speculators.verifier.head import VerifierHead

    monkeypatch.setattr(VerifierHead, "finish", lambda self, products: products * 2)
    done = fresh.run("--quiet")
    assert done.code == 1
    assert "logits from its final norm and head differ from the model's own" in done.err
