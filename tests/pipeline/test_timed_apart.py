"""Decoding is timed in `benchmark.timed_dtype`, by a verifier and a draft loaded once more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toys import ToySpeculator

from speculators.pipeline.bench import timed_apart
from speculators.recipe.input_sections import VerifierSection
from speculators.recipe.schema import BenchmarkSection
from speculators.verifier.engine import Engine


@pytest.mark.parametrize(("dtype", "expected"), [(None, None), ("float32", None), ("bfloat16", torch.bfloat16)])
def test_a_second_pair_is_loaded_only_where_the_dtype_differs(
    dtype: str | None, expected: torch.dtype | None, tiny_verifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verifier and draft have the timed dtype; without bf16 products bfloat16 is float32, and nothing differs."""
    engine, section = Engine(tiny_verifier), VerifierSection(model=str(tiny_verifier))

    def apart(products: bool) -> torch.dtype | None:
        monkeypatch.setattr("speculators.nn.precision.has_bf16_products", lambda device_type: products)
        made = timed_apart(
            BenchmarkSection(timed_dtype=dtype),
            engine,
            lambda: ToySpeculator(state_size=96, vocab_size=320),
            section,
        )
        if made is None:
            return None
        assert {each.dtype for each in made.model.parameters() if each.is_floating_point()} == {made.engine.dtype}
        return made.engine.dtype

    assert apart(products=True) == expected
    assert apart(products=False) is None
