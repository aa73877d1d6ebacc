"""Shows what a run would train on: mask, lengths, rows left out, coverage, leaks, how on-policy it is."""

from __future__ import annotations

import argparse

from speculators.errors import Problem, RecipeError
from speculators.recipe.schema import Recipe

from .common import add_recipe, load_checked, natural, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_recipe(parser)
    parser.add_argument("--show", metavar="N", type=natural, help="print the first N conversations (default: 1)")
    text = "print this conversation instead; may be repeated"
    parser.add_argument("--id", metavar="ID", action="append", default=[], help=text)
    text = "measure how on-policy N conversations are (default: 8); with 0, the verifier's weights are not needed"
    parser.add_argument("--sample", metavar="N", type=natural, default=8, help=text)
    text = "only compare the captured states of N conversations (--sample) with the verifier's, layer by layer"
    parser.add_argument("--check-states", action="store_true", help=text)


def run(options: argparse.Namespace) -> int:
    """Prints the measurements; exits with 1 if a finding is an error."""
    if options.check_states:
        _refuse_others(options)
    options.nproc = 1
    recipe = load_checked(options)
    if options.check_states:
        return _check_states(recipe, options)
    from speculators.inspection.inspect import inspect_data
    from speculators.report.console import console
    from speculators.report.data import data_tables
    from speculators.report.progress import RunView
    from speculators.runs.places import Places

    show = 1 if options.show is None else options.show
    with RunView(quiet=options.quiet) as progress:
        view = inspect_data(recipe, show=show, ids=options.id, sample=options.sample, places=Places(), listen=progress)
    if options.json:
        print_json(view.to_json())
    else:
        console().print(data_tables(view))
    return 1 if view.failed else 0


def _refuse_others(options: argparse.Namespace) -> None:
    """Raises RecipeError for options that mean nothing with `--check-states`."""
    message = "cannot be combined with --check-states, which prints no conversations"
    used = {"--show": options.show is not None, "--id": bool(options.id)}
    problems = [Problem(name, message) for name, present in used.items() if present]
    if options.sample == 0:
        problems.append(Problem("--sample", "must be at least 1 with --check-states, got 0"))
    if problems:
        raise RecipeError(problems)


def _check_states(recipe: Recipe, options: argparse.Namespace) -> int:
    """Prints the comparison; exits with 1 where captured states are not the verifier's."""
    from speculators.inspection.states import check_states
    from speculators.report.console import console
    from speculators.report.progress import RunView
    from speculators.report.states import states_table
    from speculators.runs.places import Places

    with RunView(quiet=options.quiet) as progress:
        result = check_states(recipe, options.sample, places=Places(), listen=progress)
    if options.json:
        print_json(result.to_json())
    else:
        console().print(states_table(result))
    return 1 if result.problems else 0
