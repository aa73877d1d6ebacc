"""What several verbs share: the recipe argument with its overrides, and JSON results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from speculators.errors import ArtifactError, Problem, RecipeError, SpeculatorsError
from speculators.recipe.checks import check_recipe
from speculators.recipe.load import load_recipe
from speculators.recipe.plan import Plan
from speculators.recipe.schema import Recipe
from speculators.runs.places import RunFolder


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds RECIPE and `--set`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a name that spec ls lists, or a file such as ./mine.toml")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds `--set`, which may be given several times."""
    text = "replace a value of the recipe; the value is TOML (--set schedule.optimizer.lr=3e-4)"
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help=text)


def load_checked(options: argparse.Namespace) -> Recipe:
    """Returns the recipe of the command line; raises RecipeError with all that can be known without its verifier."""
    recipe = load_recipe(options.recipe, options.overrides)
    if problems := check_recipe(recipe, world_size=options.nproc):
        raise RecipeError(problems)
    return recipe


def add_verifier_config(parser: argparse.ArgumentParser) -> None:
    """Adds `--verifier-config`."""
    text = "config.json of the verifier, to check against it without fetching the model"
    parser.add_argument("--verifier-config", metavar="FILE", type=Path, help=text)


@contextmanager
def or_warned(plan: Plan, what: str) -> Iterator[None]:
    """Warns that something cannot be told where the block fails for a reason of the user's, or inside a plug-in.

    A plug-in is somebody else's code and may raise anything; what our own raises is a bug, and stays one.
    """
    from speculators.pipeline.plugins import is_plugin

    try:
        yield
    except Exception as error:
        if not isinstance(error, SpeculatorsError) and not is_plugin(plan.recipe.algorithm.name):
            raise
        print(f"warning: {what}: {type(error).__name__}: {error}", file=sys.stderr)


def counted(plan: Plan) -> Plan:
    """Returns the plan with parameter counts, or without where a plug-in cannot be built before there are weights."""
    from speculators.cost.sizes import with_parameters

    with or_warned(plan, "parameters cannot be counted"):
        return with_parameters(plan)
    return plan


def count(text: str) -> int:
    """argparse type: an integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer from 1, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """argparse type: an integer from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer from 0, got {text!r}")
    return int(text)


def speculator_of(folder: Path) -> Path:
    """Returns the folder of the speculator that a run folder, or the folder itself, holds; ArtifactError if none."""
    for place in (RunFolder(folder).speculator, folder):
        if (place / "config.json").is_file():
            return place
    raise ArtifactError(f"{folder}: neither a run with a speculator nor a speculator", hint="spec ls lists the runs")


def recipe_of(speculator: Path) -> dict[str, Any] | None:
    """Returns the recipe of the run that the speculator is in, None where it is in no run."""
    run = RunFolder.around(speculator)
    if run is None or not run.plan.is_file():
        return None
    try:
        return dict(json.loads(run.plan.read_text(encoding="utf-8"))["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{run.plan}: damaged: {error!r}", hint="spec run of the recipe writes it again") from error


def print_json(value: Any) -> None:
    """Prints a result as JSON."""
    print(json.dumps(value, indent=2, default=str))


def problem_values(problem: Problem) -> dict[str, Any]:
    """Returns a problem as JSON values."""
    return {
        "file": problem.file,
        "line": problem.line,
        "path": problem.path,
        "message": problem.message,
        "hint": problem.hint,
    }
