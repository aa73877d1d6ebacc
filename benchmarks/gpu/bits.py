"""The part `bits`: whether the gradients of each algorithm repeat, with the strict mode of training and without it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.built import Trainee, plan_of
from benchmarks.gpu.lines import Judged, VerdictLine, judged
from benchmarks.gpu.part import PartSetup
from speculators.config import CONFIGS
from speculators.recipe.catalog import recipe_names
from speculators.recipe.load import load_recipe
from speculators.training.world import repeatable

REPEATS = 3


def lines(setup: PartSetup) -> Iterator[VerdictLine]:
    """Yields a line for each algorithm, in the shape of SmolLM2-135M."""
    recipes = recipe_by_algorithm()
    for name in CONFIGS.names():
        yield judged(name, partial(repeats, setup, recipes[name]))
        setup.release()


def recipe_by_algorithm() -> dict[str, str]:
    """Finds the quickstart recipe of each algorithm."""
    names = [name for name in recipe_names() if name.startswith("quickstart") and name != "quickstart_short"]
    return {load_recipe(name).algorithm.name: name for name in names}


def repeats(setup: PartSetup, recipe: str) -> Judged:
    """Repeats an update of one row; the strict ones must have the same bits, and nothing may refuse to be strict."""
    lengths = [30, 20] if setup.small else [1200, 848]
    trainee = Trainee.of(plan_of(recipe, "smollm2-135m", setup), lengths, 1, setup.device)
    figures = {}
    for name, strict in (("strict", True), ("not_strict", False)):
        with repeatable(enabled=strict):
            first, *others = (trainee.gradients() for _ in range(REPEATS))
            figures[f"{name}_ms"] = setup.milliseconds(trainee.gradients, 2)
        figures[f"{name}_tensors_that_differ"] = _differing(first, others)
    count = figures["strict_tensors_that_differ"]
    figures["tensors"] = len(first)
    return figures, f"{count} gradients differ between repeats in strict mode" if count else ""


def _differing(first: dict[str, torch.Tensor], others: list[dict[str, torch.Tensor]]) -> int:
    return sum(any(not torch.equal(first[name], other[name]) for other in others) for name in first)
