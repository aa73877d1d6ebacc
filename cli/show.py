"""Shows a recipe: the file as written, every value with its origin (--resolved), or one of them explained (--why)."""

from __future__ import annotations

import argparse

from speculators.errors import Problem, RecipeError
from speculators.recipe.catalog import recipe_path
from speculators.recipe.document import read_document
from speculators.recipe.load import load_recipe
from speculators.recipe.schema import Recipe
from speculators.recipe.values import flatten
from speculators.registry import near_miss

from .common import add_recipe, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_recipe(parser)
    parser.add_argument("--resolved", action="store_true", help="every value, defaults included, with its origin")
    parser.add_argument(
        "--why", metavar="KEY", type=_key, help="explain a value or section, e.g. schedule.optimizer.lr"
    )


def _key(text: str) -> str:
    """argparse type: a text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must be the path of a value or section, such as schedule.optimizer.lr")
    return text


def run(options: argparse.Namespace) -> int:
    """Prints the text, or values with origins."""
    if not (options.resolved or options.why or options.json or options.overrides):
        print(read_document(recipe_path(options.recipe))[1], end="")
        return 0
    recipe = load_recipe(options.recipe, options.overrides)
    if options.why:
        return _why(recipe, options)
    values = flatten(recipe)
    rows = {path: {"value": value, "origin": str(recipe.origins[path])} for path, value in values.items()}
    if options.json:
        print_json(rows)
    else:
        from speculators.report.console import console
        from speculators.report.recipe import values_table

        console().print(values_table(rows))
    return 0


def _written(options: argparse.Namespace) -> Recipe | None:
    """Returns the recipe without `--set`; None where only those make it one."""
    try:
        return load_recipe(options.recipe)
    except RecipeError:
        return None


def _why(recipe: Recipe, options: argparse.Namespace) -> int:
    """Explains the value at a path, or all below it; raises RecipeError with the near miss."""
    from speculators.recipe.explain import explain

    key, found = options.why, explain(recipe, options.why, _written(options))
    if not found:
        values = flatten(recipe)
        ends = [path for path in values if path.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f"did you mean {ends[0]!r}?" if ends else near_miss(key, list(values))
        raise RecipeError([Problem(key, "the recipe has no such value", hint or "--resolved lists all")])
    if options.json:
        print_json({why.path: why.to_json() for why in found})
    else:
        from speculators.report.console import console
        from speculators.report.recipe import why_lines

        console().print(why_lines(found))
    return 0
