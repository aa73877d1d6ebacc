"""Plug-ins that were probably not meant are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from speculators.config import CONFIGS
from speculators.errors import Problem, RecipeError, RegistryError
from speculators.model import SpeculatorModel
from speculators.recipe.load import load_recipe

Write = Callable[..., str]

PLUGIN = """
from speculators.config import SpeculatorModelConfig

@SpeculatorModelConfig.register("{name}")
class MineConfig(SpeculatorModelConfig):
    speculators_model_type: str = "{name}"
"""


def refused(path: str) -> Problem:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    (problem,) = caught.value.problems
    return problem


def test_a_plug_in_cannot_take_the_name_of_an_algorithm_of_ours(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even before ours is looked up: readers of a recipe must be able to rely on the name."""
    CONFIGS.get("medusa")
    monkeypatch.delitem(CONFIGS._things, "medusa")
    Path("taker.py").write_text(PLUGIN.format(name="medusa"))
    problem = refused(write(('name = "eagle3"', 'name = "medusa"\nmodule = "taker"')))
    assert problem.path == "algorithm.module"
    assert "taker.MineConfig is registered as 'medusa', an algorithm of speculators" in problem.message
    with pytest.raises(RegistryError, match="an algorithm of speculators"):
        SpeculatorModel.register("medusa")(type("Mine", (SpeculatorModel,), {}))


def test_a_module_that_registers_nothing_is_named_with_its_file(write: Write) -> None:
    """Most likely the wrong module was imported: `queue` is in the standard library."""
    problem = refused(write(('name = "eagle3"', 'name = "queue"\nmodule = "queue"')))
    assert problem.path == "algorithm.name"
    assert "queue.py, which registers no algorithm of that name" in problem.message
    assert "rename your package" in problem.hint


def test_a_module_beside_the_algorithms_is_not_one(write: Write) -> None:
    """The folder of the algorithms also holds the files that they share."""
    assert "no algorithm 'chains'" in refused(write(('name = "eagle3"', 'name = "chains"'))).message
