"""The verifier's config.json: unusable values are reported with file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from speculators.errors import VerifierError
from speculators.facts import VerifierFacts

WRONG = {
    "hidden_size": ["a", 0, -64, 64.0, True],
    "num_attention_heads": [0, "8"],
    "num_hidden_layers": [[8], 0],
    "head_dim": [0],
    "vocab_size": [-1],
    "rope_scaling": ["linear"],
    "text_config": [[1]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_an_unusable_value_is_reported(tmp_path: Path, key: str, value: Any) -> None:
    """Sizes must be integers above 0 and tables tables; the error names the file and the key."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_size": 64, "num_attention_heads": 4, "rope_theta": 1e4, key: value}))
    with pytest.raises(VerifierError, match=f"config.json: {key} must be ") as caught:
        VerifierFacts.read(path)
    assert str(path) in str(caught.value)


def test_a_file_without_an_object_is_reported(tmp_path: Path) -> None:
    """A file that is valid JSON, but contains a list, is refused."""
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(VerifierError, match="must be a JSON object, got a list"):
        VerifierFacts.read(tmp_path / "config.json")


def test_null_counts_as_missing() -> None:
    """Older files write null for values that transformers computes."""
    facts = VerifierFacts({"hidden_size": 64, "num_attention_heads": 4, "head_dim": None, "text_config": None})
    assert (facts.head_dim, facts.num_key_value_heads) == (16, 4)
    assert "head_dim" not in VerifierFacts({"hidden_size": 64, "num_attention_heads": None})
