"""What interop tests share: the real verifier, and speculators that were trained for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trained import train

from speculators.recipe.load import load_recipe
from speculators.verifier.engine import Engine
from speculators.verifier.sources import obtain


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    """The real verifier, unlike the tiny ones, gains from them."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def engine() -> Engine:
    """SmolLM2-135M-Instruct in float32."""
    return Engine(obtain(load_recipe("quickstart").verifier), dtype="float32")


@pytest.fixture(scope="session")
def run_of() -> Callable[[str], Path]:
    """Returns the run folder of a shipped recipe, trained on first use."""
    held: dict[str, Path] = {}

    def run(recipe: str) -> Path:
        if recipe not in held:
            held[recipe] = train(recipe)
        return held[recipe]

    return run
