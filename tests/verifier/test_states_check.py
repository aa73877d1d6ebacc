"""The check of captured states passes the right ones and names the layers of shifted ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from speculators.data.state_types import from_stored, to_stored
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
    """Only the beginning of a long conversation is compared: what follows cannot change it."""
    result = check(engine, rows, engine.capture(rows, IDS))
    assert (result.problems, result.advice) == ((), "")
    assert result.tokens == 20 + TOKENS + 7
    assert [layer.layer for layer in result.layers] == [1, 3, 4]
    assert all(layer.error < 1e-5 and layer.nearest == layer.layer for layer in result.layers)


def test_rounding_passes(engine: Engine, rows: list[torch.Tensor]) -> None:
    """States that were rounded to bfloat16 pass, although their error is visible."""
    rounded = [(a.bfloat16(), b.bfloat16()) for a, b in engine.capture(rows, IDS)]
    result = check(engine, rows, rounded)
    assert result.problems == ()
    assert max(layer.error for layer in result.layers) > 1e-4


def test_eight_bits_pass(engine: Engine, rows: list[torch.Tensor]) -> None:
    """States that were stored in fp8 pass as such, not as float32; neighbouring layers are still distinguished."""
    kept = [from_stored(to_stored(a, b, "fp8"), torch.device("cpu")) for a, b in engine.capture(rows, IDS)]
    assert check(engine, rows, kept, "fp8").problems == ()
    assert len(check(engine, rows, kept).problems) == 3
    shifted = [from_stored(to_stored(a, b, "fp8"), torch.device("cpu")) for a, b in engine.capture(rows, (2, 3))]
    assert check(engine, rows, shifted, "fp8").problems == ("the states of layer 1 match layer 2's",)


def test_a_wrong_layer_id_is_named(engine: Engine, rows: list[torch.Tensor]) -> None:
    """One id is off by one (vllm#40727): only that layer is reported, with its true id."""
    result = check(engine, rows, engine.capture(rows, (2, 3)))
    assert result.problems == ("the states of layer 1 match layer 2's",)
    assert "other layer ids" in result.advice


def test_all_layers_off_by_one_are_named(engine: Engine, rows: list[torch.Tensor]) -> None:
    """Each layer matches the one before it, the last one included."""
    shifted = [(states[:, :64], states[:, 64:]) for states in engine.capture_layers(rows, (0, 2, 3))]
    result = check(engine, rows, shifted)
    assert result.problems == tuple(f"the states of layer {one} match layer {one - 1}'s" for one in (1, 3, 4))


def test_states_of_another_verifier_are_reported(engine: Engine, rows: list[torch.Tensor]) -> None:
    """No layer matches, and the advice asks whether the verifier is the same."""
    noise = [(torch.randn(len(row), 64), torch.randn(len(row), 32)) for row in rows]
    result = check(engine, rows, noise)
    assert len(result.problems) == 3
    assert "off (at most 0.01 is rounding)" in result.problems[0]
    assert "is it the same verifier" in result.advice


def test_sixteen_bits_have_more_room(engine: Engine, rows: list[torch.Tensor]) -> None:
    """An error of 2% counts as rounding in bfloat16, but not in float32."""
    off = [(a * 1.02, b * 1.02) for a, b in engine.capture(rows, IDS)]
    assert len(check(engine, rows, off).problems) == 3
    assert check(engine, rows, off, "bfloat16").problems == ()
