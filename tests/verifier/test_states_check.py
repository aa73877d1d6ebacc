"""Captured states against the verifier's own: what is right passes, what is shifted is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from speculators.verifier.engine import Engine
from speculators.verifier.states_check import TOKENS, StatesCheck, compare_states

IDS = (1, 3)


@pytest.fixture(scope="module")
def engine(tiny_verifier: Path) -> Engine:
    return Engine(tiny_verifier)


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 320, (length,), generator=generator) for length in (20, 300, 7)]


def check(engine: Engine, rows: list[torch.Tensor], captured, states_dtype: str = "float32") -> StatesCheck:
    layers, tokens = compare_states(engine, rows, captured, IDS)
    return StatesCheck(
        source="here", dtype="float32", states_dtype=states_dtype, conversations=len(rows), tokens=tokens, layers=layers
    )


def test_the_verifiers_own_states_pass(engine: Engine, rows: list[torch.Tensor]) -> None:
    """Of a long conversation the beginning is compared, which is the same whatever follows."""
    found = check(engine, rows, engine.capture(rows, IDS))
    assert (found.problems, found.advice) == ((), "")
    assert found.tokens == 20 + TOKENS + 7
    assert [layer.layer for layer in found.layers] == [1, 3, 4]
    assert all(layer.error < 1e-5 and layer.nearest == layer.layer for layer in found.layers)


def test_rounding_passes(engine: Engine, rows: list[torch.Tensor]) -> None:
    """States that went through bfloat16."""
    rounded = [(a.bfloat16(), b.bfloat16()) for a, b in engine.capture(rows, IDS)]
    found = check(engine, rows, rounded)
    assert found.problems == ()
    assert max(layer.error for layer in found.layers) > 1e-4


def test_a_wrong_layer_id_is_named(engine: Engine, rows: list[torch.Tensor]) -> None:
    """One id is off by one (vllm#40727): only that layer is reported, with its true id."""
    found = check(engine, rows, engine.capture(rows, (2, 3)))
    assert found.problems == ("the states of layer 1 match layer 2's",)
    assert "other layer ids" in found.advice


def test_all_layers_off_by_one_are_named(engine: Engine, rows: list[torch.Tensor]) -> None:
    """The last one, too: it is what leaves the layer before it."""
    shifted = [(states[:, :64], states[:, 64:]) for states in engine.capture_layers(rows, (0, 2, 3))]
    found = check(engine, rows, shifted)
    assert found.problems == tuple(f"the states of layer {one} match layer {one - 1}'s" for one in (1, 3, 4))


def test_another_verifiers_states_are_told_as_such(engine: Engine, rows: list[torch.Tensor]) -> None:
    """They are nobody's here."""
    noise = [(torch.randn(len(row), 64), torch.randn(len(row), 32)) for row in rows]
    found = check(engine, rows, noise)
    assert len(found.problems) == 3
    assert "off (at most 0.01 is rounding)" in found.problems[0]
    assert "is it the same verifier" in found.advice


def test_sixteen_bits_have_more_room(engine: Engine, rows: list[torch.Tensor]) -> None:
    """An error of 2% is rounding in bfloat16 and none in float32."""
    off = [(a * 1.02, b * 1.02) for a, b in engine.capture(rows, IDS)]
    assert len(check(engine, rows, off).problems) == 3
    assert check(engine, rows, off, "bfloat16").problems == ()
