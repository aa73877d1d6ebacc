"""Looks at what a run would train on: the mask, lengths, what is left out, coverage, leaks, how on-policy it is."""

from __future__ import annotations

import argparse

from speculators.errors import Problem, RecipeError
from speculators.recipe.schema import Recipe

from .common import add_recipe, load_checked, natural, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_recipe(parser)
    parser.add_argument("--show", metavar="N", type=natural, help="print the first N conversations (1)")
    parser.add_argument("--id", metavar="ID", action="append", default=[], help="print this one instead; several times")
    text = "let the verifier read N conversations, to tell how on-policy they are (8); 0 needs none of its weights"
    parser.add_argument("--sample", metavar="N", type=natural, default=8, help=text)
    text = (
        "instead of all that: compare the captured states of N conversations (--sample) with the verifier's, by layer"
    )
    parser.add_argument("--check-states", action="store_true", help=text)


def run(options: argparse.Namespace) -> int:
    """Prints what was found; 1 if an error is among it."""
    if options.check_states:
        _refuse_others(options)
    options.nproc = 1
    recipe = load_checked(options)
    if options.check_states:
        return _check_states(recipe, options)
    from speculators.inspection.inspect import Wish, look
    from speculators.report.console import console
    from speculators.report.data import data_tables
    from speculators.report.progress import RunView
    from speculators.runs.places import Places

    show = 1 if options.show is None else options.show
    wish = Wish(show=show, ids=tuple(options.id), sample=options.sample)
    with RunView(quiet=options.quiet) as view:
        found = look(recipe, wish, places=Places(), listen=view)
    if options.json:
        print_json(found.to_json())
    else:
        console().print(data_tables(found))
    return 1 if found.failed else 0


def _refuse_others(options: argparse.Namespace) -> None:
    """Raises RecipeError for options that say nothing beside `--check-states`."""
    message = "does not go with --check-states, which prints no conversations"
    given = {"--show": options.show is not None, "--id": bool(options.id)}
    problems = [Problem(name, message) for name, there in given.items() if there]
    if options.sample == 0:
        problems.append(Problem("--sample", "must be at least 1 with --check-states, got 0"))
    if problems:
        raise RecipeError(problems)


def _check_states(recipe: Recipe, options: argparse.Namespace) -> int:
    """Prints the comparison; 1 where captured states are not the verifier's."""
    from speculators.inspection.states import check_states
    from speculators.report.console import console
    from speculators.report.progress import RunView
    from speculators.report.states import states_table
    from speculators.runs.places import Places

    with RunView(quiet=options.quiet) as view:
        found = check_states(recipe, options.sample, places=Places(), listen=view)
    if options.json:
        print_json(found.to_json())
    else:
        console().print(states_table(found))
    return 1 if found.problems else 0
