"""Lists your runs, then the shipped recipes and the algorithms."""

from __future__ import annotations

import argparse
from typing import Any

from speculators.config import CONFIGS
from speculators.recipe.catalog import recipe_names
from speculators.recipe.load import load_recipe
from speculators.runs.summary import summaries

from .common import add_runs, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_runs(parser)
    text = "also print each recipe's purpose and the acceptance lengths that it is known to reach"
    parser.add_argument("--long", action="store_true", help=text)


def run(options: argparse.Namespace) -> int:
    """Prints three lists."""
    runs = summaries(options.runs)
    recipes = [_recipe(name) for name in recipe_names()]
    algorithms = CONFIGS.names()
    if options.json:
        print_json({"runs": [each.to_json() for each in runs], "recipes": recipes, "algorithms": algorithms})
        return 0
    from speculators.report.console import console
    from speculators.report.recipe import listing

    console().print(listing(recipes, algorithms, runs, long=options.long))
    return 0


def _recipe(name: str) -> dict[str, Any]:
    recipe = load_recipe(name)
    expect = {setting: list(band.tau) for setting, band in recipe.expect.items()}
    return {
        "name": name,
        "version": recipe.version,
        "summary": recipe.summary,
        "verifier": recipe.verifier.model,
        "family": recipe.verifier.short_name,
        "hardware": recipe.hardware,
        "minutes": recipe.minutes,
        "usual_time": recipe.usual_time,
        "algorithm": recipe.algorithm.name,
        "expect": expect,
    }
