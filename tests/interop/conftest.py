"""Fixtures of the interop tests: the real verifier, and speculators trained for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from trained import train

from speculators.recipe.load import load_recipe
from speculators.verifier.engine import Engine
from speculators.verifier.sources import obtain


@pytest.fixture(scope="session")
def engine() -> Engine:
    """SmolLM2-135M-Instruct in float32."""
    return Engine(obtain(load_recipe("quickstart").verifier), dtype="float32")


@pytest.fixture(scope="session")
def run_of() -> Callable[[str], Path]:
    """Finds the run folder of a shipped recipe, training it on first use."""
    folders: dict[str, Path] = {}

    def run(recipe: str) -> Path:
        if recipe not in folders:
            folders[recipe] = train(recipe)
        return folders[recipe]

    return run
