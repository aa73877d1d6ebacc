"""Copies a recipe to a file of your own."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from speculators.errors import SpeculatorsError
from speculators.recipe.catalog import recipe_path
from speculators.recipe.checks import check_recipe
from speculators.recipe.load import load_recipe

from .common import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("recipe", metavar="RECIPE", help="a name that spec ls lists, or a file")
    parser.add_argument("target", metavar="FILE", type=Path, help="where to, e.g. ./mine.toml; never overwritten")


def run(options: argparse.Namespace) -> int:
    """Copies, then says which files the copy no longer finds."""
    source = recipe_path(options.recipe)
    target = options.target / source.name if options.target.is_dir() else options.target
    if target.suffix != ".toml":
        raise SpeculatorsError(f"{target}: a recipe's file ends in .toml")
    if target.exists():
        raise SpeculatorsError(f"{target} exists", hint="name another file, or remove it first")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise SpeculatorsError(f"{target} cannot be written: {error.strerror}") from None
    for problem in check_recipe(load_recipe(str(target))):
        print(f"warning: {problem}", file=sys.stderr)
    if options.json:
        print_json({"recipe": str(source), "copy": str(target)})
    elif not options.quiet:
        print(
            f"{target}: a copy of {options.recipe}; spec run {target if '/' in str(target) else f'./{target}'} runs it"
        )
    return 0
