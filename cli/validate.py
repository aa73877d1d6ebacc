"""Checks recipes as far as possible without loading a model."""

from __future__ import annotations

import argparse
from pathlib import Path

import attrs

from speculators.errors import Problem, RecipeError
from speculators.facts import VerifierFacts
from speculators.recipe.catalog import recipe_names
from speculators.recipe.checks import check_decoder, check_recipe, check_verifier
from speculators.recipe.families import MODEL_TYPES
from speculators.recipe.load import load_recipe
from speculators.recipe.schema import Recipe
from speculators.recipe.shipped import shipped_facts

from .common import RECIPE_HELP, add_overrides, add_verifier_config, print_json, warn_of_other_model
from .streams import problem_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("recipes", metavar="RECIPE", nargs="+", help=RECIPE_HELP)
    add_overrides(parser)
    add_verifier_config(parser)


@attrs.frozen
class _Checked:
    """The outcome for one recipe.

    Attributes:
        note: which config.json it was checked against.
        servers: why each server would not read the drafts; empty unless a config.json was given.
        line: the same in one line.
    """

    problems: list[Problem]
    note: str = ""
    servers: dict[str, tuple[str, ...]] = attrs.field(factory=dict)
    line: str = ""


def run(options: argparse.Namespace) -> int:
    """Prints one line for each valid recipe, then all problems of the others."""
    config = VerifierFacts.read(options.verifier_config) if options.verifier_config else None
    results, problems = [], []
    for name in options.recipes:
        checked = _check(name, options.overrides, config)
        problems += checked.problems
        values = [problem_values(problem) for problem in checked.problems]
        result = {"recipe": name, "ok": not checked.problems, "note": checked.note}
        results.append({**result, "servers": checked.servers, "problems": values})
        if not (checked.problems or options.quiet or options.json):
            print(f"{name}: ok ({checked.note})")
            if checked.line:
                print(f"  servable by: {checked.line}")
    if options.json:
        print_json(results)
    elif problems:
        raise RecipeError(problems)
    return RecipeError.exit_code if problems else 0


def _check(name: str, overrides: list[str], facts: VerifierFacts | None) -> _Checked:
    """Finds the problems of a recipe, and the servers that read its drafts."""
    try:
        recipe = _loaded(name, overrides)
    except RecipeError as error:
        return _Checked(list(error.problems))
    problems = check_recipe(recipe)
    config = Path(recipe.verifier.model) / "config.json"
    if facts is None and recipe.verifier.kind == "folder" and config.is_file():
        facts = VerifierFacts.read(config)
    # What servers read of a shipped recipe is said by `plan`: the rooms that know it take longer to load than the rest.
    shipped = facts is None
    if facts is None:
        facts = shipped_facts(recipe.verifier)
    else:
        warn_of_other_model(recipe, facts, "the recipe is checked against the file")
    if facts is None:
        note = "not checked against the verifier's config.json: use spec plan, or --verifier-config"
        return _Checked(problems + check_decoder(recipe), note)
    note = f"checked against {facts.source}"
    against = check_verifier(recipe, facts)
    if not against and facts.get("model_type") not in MODEL_TYPES:
        # Late: only an architecture that no test covers has to be built, with torch and transformers.
        from speculators.verifier.supported import architecture_problems

        against = architecture_problems(recipe, facts)
    problems += against
    if problems or shipped:
        return _Checked(problems, note)
    return _Checked([], note, *_servers(recipe, facts))


def _loaded(name: str, overrides: list[str]) -> Recipe:
    if name in recipe_names():
        return load_recipe(name, overrides)
    # Late: only runs need it, and a shipped recipe is checked at once.
    from speculators.runs.recipes import load_any

    return load_any(name, overrides)[0]


def _servers(recipe: Recipe, facts: VerifierFacts) -> tuple[dict[str, tuple[str, ...]], str]:
    # Late: most recipes are checked without the verifier's config.json, and `validate` starts at once.
    from speculators.exchange.servable import servers_line, servers_of

    serving = servers_of(recipe, facts)
    return {each.server: each.reasons for each in serving}, servers_line(serving)
