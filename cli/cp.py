"""Copies a recipe to a file of your own, without [expect], whose bands were measured with the original."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import tomli

from speculators.errors import Problem, RecipeError, SpeculatorsError
from speculators.recipe.checks import check_recipe
from speculators.recipe.expect import without_bands
from speculators.recipe.load import load_recipe
from speculators.runs.places import RunFolder, find_recipe
from speculators.runs.recipes import recipe_text

from .common import RECIPE_HELP, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    text = "the new file, such as ./mine.toml; an existing file is never overwritten"
    parser.add_argument("target", metavar="FILE", type=Path, help=text)


def run(options: argparse.Namespace) -> int:
    """Copies the file, then warns about data that the copy cannot find from its new place."""
    place = find_recipe(options.recipe)
    source = place.recipe if isinstance(place, RunFolder) else place
    target = options.target / source.name if options.target.is_dir() else options.target
    if target.suffix != ".toml":
        raise RecipeError([Problem("", f"{target}: the name of a recipe's file must end in .toml")])
    if target.exists():
        raise RecipeError([Problem("", f"{target} exists already", "name another file, or remove this one first")])
    text = recipe_text(place)
    try:
        target.write_text(without_bands(text), encoding="utf-8")
    except OSError as error:
        raise SpeculatorsError(f"{target} cannot be written: {error.strerror}") from None
    for problem in check_recipe(load_recipe(str(target))):
        print(f"warning: {problem}", file=sys.stderr)
    left_out = ["expect"] if "expect" in tomli.loads(text) else []
    if options.json:
        print_json({"recipe": str(source), "copy": str(target), "left_out": left_out})
    elif not options.quiet:
        # Without a slash, the name would be looked up in the catalogue.
        path = str(target) if "/" in str(target) else f"./{target}"
        print(f"{target}: copied from {options.recipe}; edit it, then: spec run {path}")
        if left_out:
            print("[expect] was left out: its bands were measured with the original and do not hold for an edited copy")
    return 0
