"""Checks recipes as far as possible without loading a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from speculators.errors import Problem, RecipeError
from speculators.exchange.servable import Serving, servers_line, servers_of
from speculators.facts import VerifierFacts
from speculators.recipe.checks import check_decoder, check_recipe, check_verifier
from speculators.runs.recipes import load_any

from .common import RECIPE_HELP, add_overrides, add_verifier_config, print_json
from .streams import problem_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("recipes", metavar="RECIPE", nargs="+", help=RECIPE_HELP)
    add_overrides(parser)
    add_verifier_config(parser)


def run(options: argparse.Namespace) -> int:
    """Prints one line for each valid recipe, then all problems of the others."""
    config = VerifierFacts.read(options.verifier_config) if options.verifier_config else None
    results, problems = [], []
    for name in options.recipes:
        own_problems, note, serving = _check(name, options.overrides, config)
        problems += own_problems
        values = [problem_values(problem) for problem in own_problems]
        servers = {each.server: list(each.reasons) for each in serving}
        results.append({"recipe": name, "ok": not own_problems, "note": note, "servers": servers, "problems": values})
        if not (own_problems or options.quiet or options.json):
            print(f"{name}: ok ({note})")
            if serving:
                print(f"  servable by: {servers_line(serving)}")
    if options.json:
        print_json(results)
    elif problems:
        raise RecipeError(problems)
    return RecipeError.exit_code if problems else 0


def _check(
    name: str, overrides: list[str], facts: VerifierFacts | None
) -> tuple[list[Problem], str, tuple[Serving, ...]]:
    """Finds the problems of a recipe, which config.json it was checked against, and which servers read its drafts."""
    try:
        recipe, _ = load_any(name, overrides)
    except RecipeError as error:
        return list(error.problems), "", ()
    problems = check_recipe(recipe)
    config = Path(recipe.verifier.model) / "config.json"
    if facts is None and recipe.verifier.kind == "folder" and config.is_file():
        facts = VerifierFacts.read(config)
    if facts is None:
        note = "not checked against the verifier's config.json: use spec plan, or --verifier-config"
        return problems + check_decoder(recipe), note, ()
    problems += check_verifier(recipe, facts)
    return problems, f"checked against {facts.source}", () if problems else servers_of(recipe, facts)
