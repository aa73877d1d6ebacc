"""Shared by several verbs: the recipe argument with its overrides, argparse types, JSON output."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from speculators.errors import Problem, RecipeError, SpeculatorsError
from speculators.facts import VerifierFacts
from speculators.recipe.checks import check_recipe
from speculators.recipe.plan import Plan
from speculators.recipe.schema import Recipe
from speculators.recipe.shipped import shipped_facts

RECIPE_HELP = "a name that spec ls lists, a file such as ./mine.toml, or a run"
RUN_HELP = "a run: its folder, its name, or a beginning that no other has"


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds RECIPE and `--set`."""
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds `--set`, which may be repeated."""
    text = "change a value of the recipe, written as TOML: --set schedule.optimizer.lr=3e-4; may be repeated"
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help=text)


def add_wide(parser: argparse.ArgumentParser) -> None:
    """Adds `--wide`."""
    parser.add_argument("--wide", action="store_true", help="add the columns and tables that 80 columns cannot show")


def load_checked(options: argparse.Namespace) -> Recipe:
    """Loads the recipe of the command line; raises RecipeError with every problem that needs no verifier.

    `options.resumed` becomes the run that was named instead of a recipe, or None.
    """
    # Late, as below: a shipped recipe is validated without the rooms of runs and locks.
    from speculators.runs.places import RUNS
    from speculators.runs.recipes import load_any

    recipe, options.resumed = load_any(options.recipe, options.overrides, vars(options).get("runs", RUNS))
    if problems := check_recipe(recipe, world_size=options.nproc):
        raise RecipeError(problems)
    if not options.quiet:
        for note in recipe.notes:
            print(f"note: {note}", file=sys.stderr)
    return recipe


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Adds `--runs`."""
    from speculators.runs.places import RUNS

    text = f"where runs are kept (default: ./{RUNS})"
    parser.add_argument("--runs", metavar="FOLDER", type=Path, default=RUNS, help=text)


def add_yes(parser: argparse.ArgumentParser) -> None:
    """Adds `--yes`, which `agreed` reads."""
    parser.add_argument("--yes", action="store_true", help="remove without asking")


def agreed(options: argparse.Namespace, question: str) -> None:
    """Asks whether to go on, unless `--yes` was given.

    Raises:
        RecipeError: the answer is no, or nobody can be asked.
    """
    if options.yes:
        return
    if options.json or not sys.stdin.isatty():
        raise RecipeError([Problem("--yes", "needed where nobody can be asked", "--dry-run shows what would go")])
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise RecipeError("nothing was removed")


def add_verifier_config(parser: argparse.ArgumentParser) -> None:
    """Adds `--verifier-config`."""
    text = "the verifier's config.json, to check the recipe against it without downloading the model"
    parser.add_argument("--verifier-config", metavar="FILE", type=existing_file, help=text)


def warn_of_other_model(recipe: Recipe, facts: VerifierFacts, consequence: str) -> None:
    """Warns if a given config.json contradicts the one that is known of the recipe's verifier."""
    from speculators.recipe.lock_check import contradictions

    known = shipped_facts(recipe.verifier)
    if known and (wrong := contradictions(facts, known)):
        mismatch = f"{facts.source} does not belong to {recipe.verifier.model}: {'; '.join(wrong)}"
        print(f"warning: {mismatch}; {consequence}", file=sys.stderr)


@contextmanager
def or_warned(plan: Plan, message: str) -> Iterator[None]:
    """Turns an error of the user or of a plug-in inside the block into a warning that begins with `message`.

    A plug-in is somebody else's code and may raise anything; any other error in our own code is a bug and is raised.
    """
    from speculators.pipeline.plugins import is_plugin

    try:
        yield
    except Exception as error:
        if not isinstance(error, SpeculatorsError) and not is_plugin(plan.recipe.algorithm.name):
            raise
        print(f"warning: {message}: {type(error).__name__}: {error}", file=sys.stderr)


def counted(plan: Plan) -> Plan:
    """Adds parameter counts to a plan, unless it is for a plug-in that cannot be built without weights."""
    from speculators.cost.sizes import with_parameters

    with or_warned(plan, "parameters cannot be counted"):
        return with_parameters(plan)
    return plan


def count(text: str) -> int:
    """argparse type: an integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer from 1, got {text!r}")
    return int(text)


def existing_file(text: str) -> Path:
    """argparse type: the path of a file that is there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"no such file: {text}")
    return path


def natural(text: str) -> int:
    """argparse type: an integer from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer from 0, got {text!r}")
    return int(text)


def print_json(value: Any) -> None:
    """Prints a result as JSON."""
    print(json.dumps(value, indent=2, default=str))
