"""Shows a recipe: the file as written, every value with its origin (--resolved), or one of them (--why)."""

from __future__ import annotations

import argparse

from speculators.errors import Problem, RecipeError
from speculators.recipe.catalog import recipe_path
from speculators.recipe.document import read_document
from speculators.recipe.load import load_recipe
from speculators.recipe.values import flatten
from speculators.registry import near_miss

from .common import add_recipe, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_recipe(parser)
    parser.add_argument("--resolved", action="store_true", help="every value, defaults included, with its origin")
    parser.add_argument("--why", metavar="KEY", help="one value or section with its origin, e.g. schedule.optimizer.lr")


def run(options: argparse.Namespace) -> int:
    """Prints the text, or values with origins."""
    if not (options.resolved or options.why or options.json or options.overrides):
        print(read_document(recipe_path(options.recipe))[1], end="")
        return 0
    recipe = load_recipe(options.recipe, options.overrides)
    values = flatten(recipe)
    if options.why:
        values = _below(values, options.why)
    rows = {path: {"value": value, "origin": str(recipe.origins[path])} for path, value in values.items()}
    if options.json:
        print_json(rows)
    else:
        from speculators.report.console import console
        from speculators.report.recipe import values_table

        console().print(values_table(rows))
    return 0


def _below(values: dict[str, object], key: str) -> dict[str, object]:
    """Returns the value at a path, or all below it; raises RecipeError with the near miss."""
    chosen = {path: value for path, value in values.items() if path == key or path.startswith((f"{key}.", f"{key}["))}
    if not chosen:
        ends = [path for path in values if path.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f"did you mean {ends[0]!r}?" if ends else near_miss(key, list(values))
        raise RecipeError([Problem(key, "the recipe has no such value", hint or "--resolved lists all")])
    return chosen
