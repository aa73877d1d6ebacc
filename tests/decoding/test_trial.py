"""A verifier's live decoding is tried before a run spends anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from speculators.decoding import cache as cache_module
from speculators.decoding import target as target_module
from speculators.decoding.trial import check_decodes
from speculators.errors import VerifierError
from speculators.verifier.engine import Engine
from speculators.verifier.tiny import make_tiny_verifier


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_verifier_that_decodes_passes(tiny_verifier: Path, dtype: str) -> None:
    """Accepted and rejected drafts leave the logits of a forward of all tokens, but for rounding."""
    check_decodes(Engine(tiny_verifier, dtype=dtype))


def test_a_cache_that_keeps_rejected_drafts_is_found(tiny_verifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a rollback the next logits are others: the error says after what, and that nothing was spent."""
    engine = Engine(tiny_verifier)
    monkeypatch.setattr(target_module, "few_rows_verifier", lambda model: None)
    monkeypatch.setattr(cache_module.DynamicCache, "crop", lambda *_: None)
    with pytest.raises(VerifierError, match=r"logits after a rejected draft differ.*(\n.*)*nothing was spent"):
        check_decodes(engine)


def test_a_forward_that_fails_is_an_error_that_names_the_model(
    tiny_verifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever transformers raises becomes one line with the model's class; the hint says how to train without it."""
    engine = Engine(tiny_verifier)

    def broken(*_: object) -> None:
        raise AttributeError("'DynamicLayer' object has no attribute 'update_indexer'")

    monkeypatch.setattr(target_module, "few_rows_verifier", lambda model: None)
    monkeypatch.setattr(cache_module.DynamicCache, "crop", broken)
    with pytest.raises(VerifierError, match="LlamaForCausalLM: decoding with drafts fails: AttributeError: 'Dynamic"):
        check_decodes(engine)


def test_a_verifier_that_forgets_its_states_is_refused_by_the_trial(tmp_path: Path) -> None:
    """The trial refuses Jamba, whose running states transformers ignores when it scores several tokens."""
    options = {"mamba_dt_rank": 8, "use_mamba_kernels": False, "attn_layer_offset": 1, "attn_layer_period": 2}
    folder = make_tiny_verifier(tmp_path / "v", model_type="jamba", num_experts=1, num_experts_per_tok=1, **options)
    with pytest.raises(VerifierError, match="transformers ignores the running states"):
        check_decodes(Engine(folder))
