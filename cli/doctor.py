"""Examines a speculator: files, config, alignment, parity, length, data. Tells what is wrong, and what to do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from speculators.errors import RecipeError

from .common import print_json, recipe_of, speculator_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("checkpoint", metavar="RUN", type=Path, help="a run folder, or a folder with a speculator")
    parser.add_argument("--verifier", metavar="MODEL", help="instead of the one that config.json names")
    prompts = parser.add_mutually_exclusive_group()
    text = "a JSONL file of prompts like those that will be served; the first few are used"
    prompts.add_argument("--prompts", metavar="FILE", help=text)
    prompts.add_argument("--suite", metavar="NAME", help="prompts of this suite (the run's first, or quickstart)")


def run(options: argparse.Namespace) -> int:
    """Prints the table; 1 if something is wrong."""
    folder = speculator_of(options.checkpoint)
    recipe = recipe_of(folder)
    suite = _suite(options, recipe)
    from speculators.doctor.run import Wish, examine
    from speculators.pipeline.measure import SavedSpeculator
    from speculators.report.console import console
    from speculators.report.doctor import diagnosis_tables
    from speculators.report.progress import RunView

    with RunView(quiet=options.quiet) as view:
        subject = SavedSpeculator(folder=folder, recipe=recipe, verifier=options.verifier)
        found = examine(subject, Wish(suite=suite, listen=view))
    result = found.to_json()
    if options.json:
        print_json(result)
    else:
        console().print(diagnosis_tables(result))
    return 0 if found.healthy else 1


def _suite(options: argparse.Namespace, recipe: dict[str, Any] | None) -> Any:
    """Returns the suite that the prompts are taken from."""
    from speculators.recipe.schema import Suite
    from speculators.structure.converter import structure

    named: dict[str, Any] = {"name": options.suite or "quickstart"}
    if options.prompts:
        named = {"name": Path(options.prompts).stem, "path": str(Path(options.prompts).resolve())}
    elif options.suite is None and recipe is not None and recipe["benchmark"]["suites"]:
        named = {key: value for key, value in recipe["benchmark"]["suites"][0].items() if value is not None}
    suite, problems = structure(named, Suite, path=("suite",))
    if suite is None:
        raise RecipeError(problems)
    return suite
