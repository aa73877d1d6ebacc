"""Shows a recipe as written, with every value and its origin (--resolved), or with one value explained (--why)."""

from __future__ import annotations

import argparse

import attrs

from speculators.errors import Problem, RecipeError
from speculators.recipe.schema import Recipe
from speculators.recipe.values import flatten
from speculators.registry import near_miss
from speculators.runs.places import RunFolder, find_recipe
from speculators.runs.recipes import load_any, recipe_text

from .common import add_recipe, add_runs, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_recipe(parser)
    add_runs(parser)
    parser.add_argument(
        "--resolved", action="store_true", help="list every value, defaults included, and where it comes from"
    )
    text = "explain a value or section: origin, meaning, the stages that depend on it, files that changed since its run"
    parser.add_argument("--why", metavar="KEY", type=_key, help=text)


def _key(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must be the path of a value or section, such as schedule.optimizer.lr")
    return text


def run(options: argparse.Namespace) -> int:
    """Prints the file, the values with their origins, or the explanation of one."""
    if not (options.resolved or options.why or options.json or options.overrides):
        print(recipe_text(find_recipe(options.recipe, options.runs)), end="")
        return 0
    recipe, run = load_any(options.recipe, options.overrides, options.runs)
    if options.why:
        return _why(recipe, run, options)
    values = flatten(recipe)
    rows = {path: {"value": value, "origin": str(recipe.origins[path])} for path, value in values.items()}
    if options.json:
        print_json(rows)
    else:
        from speculators.report.console import console
        from speculators.report.recipe import values_table

        console().print(values_table(rows))
    return 0


def _without_overrides(options: argparse.Namespace) -> Recipe | None:
    """Loads the recipe without `--set`; None if it is not valid without them."""
    try:
        return load_any(options.recipe, (), options.runs)[0]
    except RecipeError:
        return None


def _why(recipe: Recipe, run: RunFolder | None, options: argparse.Namespace) -> int:
    from speculators.recipe.explain import explain
    from speculators.runs.changed_files import changed_files, newest_finished

    key, explained = options.why, explain(recipe, options.why, _without_overrides(options))
    if not explained:
        values = flatten(recipe)
        ends = [path for path in values if path.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = f"did you mean {ends[0]!r}?" if ends else near_miss(key, list(values))
        raise RecipeError([Problem(key, "the recipe has no such value", hint or "--resolved lists all values")])
    if run := run or newest_finished(recipe.name, options.runs):
        changed = changed_files(recipe, run, [why.path for why in explained])
        explained = [attrs.evolve(why, changed=changed.get(why.path, ())) for why in explained]
    if options.json:
        print_json({why.path: why.to_json() for why in explained})
    else:
        from speculators.report.console import console
        from speculators.report.recipe import why_lines

        console().print(why_lines(explained))
    return 0
