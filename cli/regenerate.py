"""Answers the prompts of a file with a recipe's verifier: on-policy conversations, with their provenance beside."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import add_recipe, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_recipe(parser)
    parser.add_argument("prompts", metavar="PROMPTS", type=Path, help="JSONL with messages; answers there are dropped")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="JSONL to write")


def run(options: argparse.Namespace) -> int:
    """Writes the conversations."""
    from speculators.recipe.load import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from speculators.pipeline.regenerate import regenerate_file
    from speculators.report.progress import RunView

    with RunView(quiet=options.quiet) as view:
        facts = regenerate_file(recipe, options.prompts, options.out, progress=view)
    if options.json:
        print_json(facts)
    else:
        print(f"{options.out}: {facts['conversations']} conversations")
    return 0
