"""Examines a speculator: files, config, alignment, parity, length, data. Reports each fault with its remedy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from speculators.errors import RecipeError
from speculators.runs.places import find_speculator, recipe_of

from .common import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `spec doctor`."""
    parser.add_argument("checkpoint", metavar="RUN", type=Path, help="a run folder, or a folder with a speculator")
    parser.add_argument("--verifier", metavar="MODEL", help="verifier to use instead of the one that config.json names")
    prompts = parser.add_mutually_exclusive_group()
    text = "JSONL file of prompts like those you will serve; the first few are used"
    prompts.add_argument("--prompts", metavar="FILE", help=text)
    prompts.add_argument(
        "--suite",
        metavar="NAME",
        help="take the prompts from this suite (default: the run's first, or quickstart)",
    )
    parser.add_argument("--quick", action="store_true", help="measure less, in about 20 seconds for a small verifier")
    parser.add_argument("--long", action="store_true", help="print the evidence of every check")


def run(options: argparse.Namespace) -> int:
    """Prints the table; the exit code is 1 if a check is wrong."""
    folder = find_speculator(options.checkpoint)
    recipe = recipe_of(folder)
    suite = _suite(options, recipe)
    from speculators.doctor.effort import FULL, QUICK
    from speculators.doctor.run import examine
    from speculators.pipeline.measure import SavedSpeculator
    from speculators.report.console import console
    from speculators.report.doctor import diagnosis_tables
    from speculators.report.progress import RunView

    with RunView(quiet=options.quiet) as view:
        subject = SavedSpeculator(folder=folder, recipe=recipe, verifier=options.verifier)
        diagnosis = examine(subject, suite, effort=QUICK if options.quick else FULL, listen=view)
    if options.json:
        print_json(diagnosis.to_json())
    else:
        console().print(diagnosis_tables(diagnosis, long=options.long))
    return 1 if diagnosis.failed else 0


def _suite(options: argparse.Namespace, recipe: dict[str, Any] | None) -> Any:
    """Chooses the suite for the prompts: the options', else the run's first, else quickstart."""
    from speculators.recipe.schema import Suite, suite_values
    from speculators.structure.converter import structure

    named: dict[str, Any] = suite_values(options.suite or "quickstart")
    if options.prompts:
        named = {"name": Path(options.prompts).stem, "path": str(Path(options.prompts).resolve())}
    elif options.suite is None and recipe is not None and recipe["benchmark"]["suites"]:
        named = {key: value for key, value in recipe["benchmark"]["suites"][0].items() if value is not None}
    suite, problems = structure(named, Suite, path=("suite",))
    if suite is None:
        raise RecipeError(problems)
    return suite
