"""Lists the shipped recipes with what they need and reach, the algorithms, and your runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from speculators.config import CONFIGS
from speculators.recipe.catalog import recipe_names
from speculators.recipe.load import load_recipe
from speculators.runs.places import RunFolder

from .common import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument(
        "--runs", metavar="FOLDER", type=Path, default=Path("runs"), help="folder with the runs (default: ./runs)"
    )


def run(options: argparse.Namespace) -> int:
    """Prints three lists."""
    recipes = [_recipe(name) for name in recipe_names()]
    algorithms = CONFIGS.names()
    runs = [_run(folder) for folder in sorted(options.runs.glob("*")) if RunFolder(folder).recipe.is_file()]
    if options.json:
        print_json({"recipes": recipes, "algorithms": algorithms, "runs": runs})
        return 0
    from speculators.report.console import console
    from speculators.report.recipe import listing

    console().print(listing(recipes, algorithms, runs))
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
        "algorithm": recipe.algorithm.name,
        "expect": expect,
    }


def _run(folder: Path) -> dict[str, Any]:
    return {
        "name": folder.name,
        "trained": (RunFolder(folder).speculator / "config.json").is_file(),
        "measured": any(RunFolder(folder).bench.glob("*.json")),
    }
