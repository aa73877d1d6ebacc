"""Compares two recipes or runs by meaning: what changed, what that invalidates, whether results are comparable."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import attrs

from speculators.diff.compare import compare
from speculators.diff.comparison import AGAIN
from speculators.diff.consequence import VOCABULARY
from speculators.diff.revision import unpacked
from speculators.diff.side import DiffSide
from speculators.errors import Problem, RecipeError, SpeculatorsError
from speculators.facts import VerifierFacts
from speculators.recipe.load import load_recipe
from speculators.recipe.lock_check import facts_of_run
from speculators.recipe.plan import make_plan
from speculators.recipe.schema import Recipe
from speculators.recipe.shipped import shipped_facts
from speculators.runs.places import RUNS, RunFolder, find_recipe, find_run

from .common import add_verifier_config, counted, print_json

_REVISION = re.compile(r"(?P<rev>[^:]+):(?P<path>[^:]+\.toml)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    text = "a recipe's name or file, a file at a git revision (REV:path.toml), or a run"
    parser.add_argument("a", metavar="A", help=text)
    parser.add_argument("b", metavar="B", help="what to compare A with, in any of these forms")
    add_verifier_config(parser)
    parser.add_argument("--md", action="store_true", help="print Markdown, for a pull request")


def run(options: argparse.Namespace) -> int:
    """Prints the comparison; exits with 0 if nothing differs, 1 if something does, and therefore 2 for every error."""
    try:
        return _compare(options)
    except SpeculatorsError as error:
        error.exit_code = RecipeError.exit_code
        raise


def _compare(options: argparse.Namespace) -> int:
    options.facts = VerifierFacts.read(options.verifier_config) if options.verifier_config else None
    a, b = (_side(name, options) for name in (options.a, options.b))
    if options.facts and a.facts and b.facts and a.stages["verifier"] != b.stages["verifier"]:
        models = " / ".join(side.values["verifier.model"] for side in (a, b))
        message = f"the verifiers differ ({models}), and one config.json cannot describe both"
        raise RecipeError([Problem("--verifier-config", message, "leave it out")])
    a = _with_parameters(a, b)
    result = compare(a, b)
    if a.run or b.run or (RUNS.is_dir() and any(stage.status == AGAIN for stage in result.stages)):
        from speculators.diff.measured import compare_with_records

        result = compare_with_records(a, b, RUNS)
    if options.json:
        print_json(result.to_json())
    elif options.md:
        from speculators.report.diff import to_markdown

        print(to_markdown(result), end="")
    elif not options.quiet:
        from speculators.report.console import console
        from speculators.report.diff import diff_tables

        console().print(diff_tables(result))
    return 1 if result.differs else 0


def _side(name: str, options: argparse.Namespace) -> DiffSide:
    revision = _REVISION.fullmatch(name)
    if revision and not Path(name).exists():
        with unpacked(revision["rev"], revision["path"]) as recipe_then:
            return recipe_then.relocated(_recipe_side(name, recipe_then.recipe, options))
    if run := _run(name):
        return DiffSide.of_run(name, run)
    return _recipe_side(name, load_recipe(name), options)


def _with_parameters(a: DiffSide, b: DiffSide) -> DiffSide:
    """Counts A's parameters with the draft vocabularies of both sides, where a recipe can build the speculator."""
    plan = a.plan or b.plan
    if plan is None or a.values.get("algorithm.name") != b.values.get("algorithm.name"):
        return a
    sizes = {side.values.get(VOCABULARY) or plan.facts.vocab_size for side in (a, b)}
    plans = {size: counted(attrs.evolve(plan, draft_vocab_size=size)) for size in sizes if len(sizes) > 1}
    return attrs.evolve(
        a, parameters={size: sum(each.parameters.values()) for size, each in plans.items() if each.parameters}
    )


def _run(name: str) -> Path | None:
    """The folder of the run that a name stands for; None for a recipe."""
    if Path(name).is_dir():
        return find_run(name).path
    place = None if _REVISION.fullmatch(name) else find_recipe(name)
    return place.path if isinstance(place, RunFolder) else None


def _recipe_side(name: str, recipe: Recipe, options: argparse.Namespace) -> DiffSide:
    facts = options.facts or _known_facts(recipe, [run for each in (options.a, options.b) if (run := _run(each))])
    return DiffSide.of_recipe(name, recipe, make_plan(recipe, facts) if facts else None)


def _known_facts(recipe: Recipe, runs: list[Path]) -> VerifierFacts | None:
    """Reads the verifier's config.json if it is on this machine; comparing two files never fetches anything."""
    from speculators.verifier.sources import existing_folder

    if folder := existing_folder(recipe.verifier):
        return VerifierFacts.read(folder / "config.json")
    candidates = (facts_of_run(run, recipe.verifier) for run in runs)
    return next((facts for facts in candidates if facts), None) or shipped_facts(recipe.verifier)
